"""Whatever a scan looks like, it is refused by name, or nnU-Net gets its voxels and geometry as they are.

``SCANS=2000 pytest tests/datasets/test_random_scans.py`` tries other scans, and more of them.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from hyspark_nnunet.datasets.check import check
from hyspark_nnunet.datasets.dataset_json import read_dataset
from hyspark_nnunet.datasets.prepare import PrepareOptions, prepare
from tests.datasets.random_scans import Truth, Writer, scans
from tests.datasets.scans import mr, write

EXAMPLES = os.environ.get("SCANS")


def preprocessed(folder: Path, out: Path) -> dict[str, tuple[np.ndarray, dict]]:
    """Every case as nnU-Net's preprocessing writes it, without normalisation and at its own spacing."""
    dataset = read_dataset(folder)
    (out / "cases").mkdir()
    for name, files in get_filenames_of_train_images_and_targets(str(folder)).items():
        spacing = sitk.ReadImage(files["images"][0]).GetSpacing()[2::-1]
        resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        configuration = {
            "spacing": list(spacing),
            "patch_size": [8, 8, 8],
            "normalization_schemes": ["NoNormalization"],
            "use_mask_for_norm": [False],
            "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": resampling,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        }
        plans = PlansManager(
            {
                "image_reader_writer": "SimpleITKIO",
                "transpose_forward": [0, 1, 2],
                "label_manager": "LabelManager",
                "foreground_intensity_properties_per_channel": {"0": {}},
                "configurations": {"3d_fullres": configuration},
            }
        )
        DefaultPreprocessor(verbose=False).run_case_save(
            str(out / "cases" / name),
            files["images"],
            files["label"],
            plans,
            plans.get_configuration("3d_fullres"),
            dataset.content,
        )
    cases = nnUNetDatasetBlosc2(str(out / "cases"))
    assert sorted(cases.identifiers) == sorted(dataset.cases), "nnU-Net does not find every case"
    return {name: (np.asarray(cases.load_case(name)[0]), cases.load_case(name)[3]) for name in cases.identifiers}


def compare(found: np.ndarray, properties: dict, image: sitk.Image, truth: Truth) -> None:
    (low_z, _), (low_y, _), (low_x, _) = properties["bbox_used_for_cropping"]
    z, y, x = found.shape[1:]
    expected = truth.voxels.T
    outside = expected.copy()
    outside[low_z : low_z + z, low_y : low_y + y, low_x : low_x + x] = 0
    cropped = expected[low_z : low_z + z, low_y : low_y + y, low_x : low_x + x]
    assert expected.shape == properties["shape_before_cropping"] and not outside.any()
    assert np.allclose(found[0], cropped, rtol=1e-5, atol=1e-5)
    assert np.allclose(properties["spacing"], np.linalg.norm(truth.affine[:3, :3], axis=0)[::-1], rtol=1e-4)
    for corner in np.ndindex(2, 2, 2):
        index = np.multiply(corner, np.array(image.GetSize()) - 1)
        place = image.TransformIndexToPhysicalPoint(index.tolist())
        assert np.allclose(place, (truth.affine @ [*index, 1])[:3], atol=0.01)


@settings(
    max_examples=int(EXAMPLES or 60),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(scan=scans(), files=st.sampled_from(("listed", "copied")), labels=st.sampled_from(("foreground", "none")))
def test_a_scan_is_refused_by_name_or_read_as_it_is(scan: tuple[str, Writer], files: str, labels: str) -> None:
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        home = Path(temporary)
        (home / "scans").mkdir()
        name, writer = scan
        write(mr(), home / "scans/zz.nii.gz")
        truth = writer(home / "scans", name)
        note(f"{sorted(path.name for path in (home / 'scans').rglob('*'))}, readable: {truth is not None}")
        options = PrepareOptions(
            str(home / "scans"), 60, "Scans", ("MRI",), files, labels, skip_bad=True, exclude=("*.raw", "*.zraw")
        )
        folder = prepare(options, home / "raw")
        written = read_dataset(folder)
        refused = written.content["hyspark_nnunet"].get("left_out", {})
        made = set(written.cases) - {"zz"}
        note(f"made {made}, refused {refused}")
        assert len(made) + len(refused) == 1
        assert check(folder, 1) == 0
        found = preprocessed(folder, home)
        if made:
            (case,) = made
            assert truth is not None, "a damaged scan was taken"
            compare(*found[case], sitk.ReadImage(written.path(written.cases[case].images[0])), truth)
