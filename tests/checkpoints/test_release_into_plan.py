"""The public HySparK-B, with made values, into the network of nnU-Net's plan for the real CT scans."""

import json
import os
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.from_plans import encoder_arguments
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer
from tests.checkpoints.test_reference import FORMS, HYSPARK_B, KEY_LIST

CT = Path(os.environ.get("HYSPARK_REAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "ct"
DATASET = "Dataset061_CT"

pytestmark = [
    pytest.mark.skipif(not KEY_LIST.is_file(), reason=f"the key list of HySparK-B is not at hand: {KEY_LIST}"),
    pytest.mark.skipif(not CT.is_dir(), reason=f"the real CT scans are not at hand: {CT}"),
]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> PlansManager:
    """nnU-Net's planner on the scans' geometry; its intensity statistics, which the plan only copies, are made."""
    root = tmp_path_factory.mktemp("ct")
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    raw.mkdir(parents=True)
    preprocessed.mkdir(parents=True)
    (raw / "imagesTr").symlink_to(CT / "imagesTr")
    images = [sitk.ReadImage(str(path)) for path in sorted((CT / "imagesTr").glob("*.nii.gz"))]
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "body": 1},
        "numTraining": len(images),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    fingerprint = {
        "spacings": [image.GetSpacing()[::-1] for image in images],
        "shapes_after_crop": [image.GetSize()[::-1] for image in images],
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(default_experiment_planner, "nnUNet_raw", str(root / "raw"))
        patched.setattr(default_experiment_planner, "nnUNet_preprocessed", str(root / "preprocessed"))
        patched.setattr(default_experiment_planner, "maybe_convert_to_dataset_name", lambda name: name)
        default_experiment_planner.ExperimentPlanner(DATASET).plan_experiment()
    return PlansManager(str(preprocessed / "nnUNetPlans.json"))


def test_the_plan_is_of_the_releases_kind(plans: PlansManager) -> None:
    arguments = encoder_arguments(plans.get_configuration("3d_fullres"), "B")
    assert arguments["n_stages"] == 5
    assert {tuple(kernel) for kernel in arguments["kernel_sizes"]} == {(3, 3, 3)}


@pytest.mark.parametrize("form", FORMS)
def test_all_of_the_encoder_is_loaded(form: str, plans: PlansManager, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.rand(shape, generator=generator) * 0.1).to(getattr(torch, dtype))
        for name, shape, dtype in json.loads(KEY_LIST.read_text())[form]
    }
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "hyspark_b.pth")
    weights = read_weights(tmp_path / "hyspark_b.pth")
    network = HySparKFinetuneTrainer.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 2)
    report = transfer_weights(network, weights.state, "hyspark_b.pth", weights.description)
    assert report.encoder_share > 0.99
    assert {e.why for e in report.entries if e.part == "heads"} <= {
        "heads are matched by label; the file does not name its labels",
        "heads are matched by label; not in the file",
    }
    ours = network.state_dict()
    assert torch.equal(ours["encoder.stem.weight"], state[next(n for n in state if n.endswith("stem.weight"))])
    if form != "sparse_encoder":
        return
    # the release's layout: strides 1, 2, 4, 8, 16 of channels c1, c2, c3, c4, c4
    reference = HySparKMaskedAutoencoder(**HYSPARK_B, decoder_width=16).encoder
    reference.load_state_dict({n.removeprefix("encoder."): t for n, t in weights.state.items()}, strict=True)
    with torch.no_grad():
        features = network.encoder(torch.randn(1, 1, 96, 96, 96, generator=generator))
        small = torch.randn(1, 1, 32, 32, 32, generator=generator)
        pairs = list(zip(network.encoder(small), reference(small), strict=True))
    sizes = [(64, 96), (128, 48), (256, 24), (384, 12), (384, 6)]
    assert [tuple(f.shape) for f in features] == [(1, channels, n, n, n) for channels, n in sizes]
    assert all(torch.equal(one, other) for one, other in pairs)
