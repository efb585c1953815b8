"""What docs/nnunet_features.md promises, with nnU-Net's real commands on synthetic data.

Two datasets in one project share the work: one is anisotropic with an ignore label, in 3d and 2d; one has regions and
a cascade. Both have two channels. HySparK's and SparK's trainers train on the same preprocessed data.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from tests.installations import Installation, build_wheel, copy_sources, needs_build_tools
from tests.nnunet_cases import write_balls
from tests.nnunet_plans import REQUIRING_IMPORT, network_arguments
from tests.nnunet_project import FINETUNER, PRETRAINER, Project

FLAT, NESTED = "Dataset021_Flat", "Dataset022_Nested"
CHANNELS = ("T1", "T2")
PLANS = "nnUNetHySparKSPlans"
LIKE = f"{PLANS}Like021"


@dataclass(frozen=True)
class Family:
    """Trainers of a family, the plans they train on, and the recipe's variable that they do without.

    ``like`` are plans of Nested like those of Flat.
    """

    pretrainer: str
    finetuner: str
    plans: str
    like: str
    unset: str = ""

    def of(self, project: Project) -> Project:
        """The project with this family's recipe."""
        recipe = {name: value for name, value in project.recipe.items() if name != self.unset}
        return Project(project.root, recipe)


HYSPARK = Family(PRETRAINER, FINETUNER, PLANS, LIKE)
SPARK = Family("SparKPretrainTrainer", "SparKFinetuneTrainer", "SparKPlans", "SparKPlansLike021", "HYSPARK_PRESET")
# their networks by the number of the image's axes
NETWORKS = {3: "ResidualEncoderUNet", 2: "PlainConvUNet"}
# nnU-Net's own trainer, shorter
SHORT_TRAINER = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
"""
STILL = "        self.initial_lr = 0.0\n"
# as much of the package as nnU-Net's logger calls; writes down what it is told
WANDB = """
import json, os


class Config(dict):
    pass


class Summary(dict):
    def __setitem__(self, key, value):
        note("summary", {key: value})


class Run:
    step, config, summary = 0, Config(), Summary()

    def log(self, values, step):
        note("log", {**values, "step": step})


def note(kind, values):
    with open(os.environ["WANDB_NOTES"], "a") as file:
        file.write(json.dumps([kind, values], default=float) + "\\n")


def init(**settings):
    note("init", {"project": settings["project"]})
    return Run()
"""


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def plan(project: Project, dataset: int, *more: str) -> str:
    arguments = ("-d", str(dataset), "-preset", "S", "-np", "1", "-npfp", "1", "--no_pbar", *more)
    return project.run("hyspark_nnunet", "plan_and_preprocess", *arguments, nnUNet_n_proc_DA="1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Both datasets planned and preprocessed.

    The second has a plan of its own and one like the first's; its configurations of a cascade are written by hand, as
    nnU-Net plans them for larger images alone.
    """
    project = Project(tmp_path_factory.mktemp("features"))
    project.make_folders()
    labels = {"background": 0, "shell": 1, "ball": 2, "ignore": 3}
    write_balls(project.raw, 21, "Flat", labels, shape=(8, 32, 32), spacing=(5.0, 1.0, 1.0), channels=CHANNELS)
    regions = {"background": 0, "whole": [1, 2], "ball": 2}
    write_balls(project.raw, 22, "Nested", regions, shape=(32, 32, 32), channels=CHANNELS, regions_class_order=[1, 2])
    plan(project, 21, "-c", "3d_fullres", "2d")
    printed = plan(project, 22, "-c", "3d_fullres", "--like", "21", "--fingerprint-cases", "4")
    assert "Fingerprint of 4 of 5 cases" in printed and "5 cases, 5 preprocessed" in printed
    plan(project, 22, "-c", "3d_fullres")
    file = project.preprocessed / NESTED / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    assert plans["fingerprint_sample"] == {"cases": 4, "of": 5, "seed": 12345}
    coarse = {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{PLANS}_3d_lowres",
        "spacing": [2 * s for s in plans["configurations"]["3d_fullres"]["spacing"]],
        "next_stage": "3d_cascade_fullres",
    }
    plans["configurations"] |= {
        "3d_lowres": coarse,
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    file.write_text(json.dumps(plans))
    project.run("nnUNetv2_preprocess", "-d", "22", "-plans_name", PLANS, "-c", "3d_lowres", "-np", "1")
    for dataset, ours, theirs in ((FLAT, PLANS, SPARK.plans), (NESTED, PLANS, SPARK.plans), (NESTED, LIKE, SPARK.like)):
        plans = json.loads((project.preprocessed / dataset / f"{ours}.json").read_text())
        (project.preprocessed / dataset / f"{theirs}.json").write_text(json.dumps(spark_plans(plans, theirs)))
    return project


def spark_plans(plans: dict, name: str) -> dict:
    """The same plans with small networks of nnU-Net: the preprocessed data are shared."""
    for configuration in plans["configurations"].values():
        configuration.pop("hyspark", None)
        if "architecture" not in configuration:
            continue
        given = configuration["architecture"]["arch_kwargs"]
        n_stages, dims = given["n_stages"], len(configuration["patch_size"])
        arguments = {
            **{key: given[key] for key in ("n_stages", "strides", "kernel_sizes")},
            "features_per_stage": [4, 6, 8, 12, 12, 12][:n_stages],
            "n_blocks_per_stage" if dims == 3 else "n_conv_per_stage": [1, 2, 1, 1, 1, 1][:n_stages],
            **network_arguments(dims, n_stages),
        }
        configuration["architecture"] = {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{NETWORKS[dims]}",
            "arch_kwargs": arguments,
            "_kw_requires_import": [*REQUIRING_IMPORT],
        }
    return plans | {"plans_name": name}


@pytest.fixture(scope="module", params=[HYSPARK, SPARK], ids=["HySparK", "SparK"])
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


hyspark_only = pytest.mark.parametrize("family", [HYSPARK], indirect=True, ids=["HySparK"])
spark_only = pytest.mark.parametrize("family", [SPARK], indirect=True, ids=["SparK"])


def pretrain(
    project: Project, family: Family, dataset: str, configuration: str, plans: str | None = None, **variables: str
) -> Path:
    """The folder of a finished pre-training."""
    arguments = ("all", family.pretrainer, "-p", plans or family.plans)
    family.of(project).train(int(dataset[7:10]), *arguments, configuration=configuration, **variables)
    return project.fold_folder(dataset, family.pretrainer, "all", configuration, plans or family.plans)


def finetune(
    project: Project, family: Family, dataset: str, fold: str, configuration: str, weights: Path, *more: str
) -> Path:
    """The folder of a finished fine-tuning."""
    arguments = ("-p", family.plans, "-pretrained_weights", str(weights), *more)
    family.of(project).train(int(dataset[7:10]), fold, family.finetuner, *arguments, configuration=configuration)
    return project.fold_folder(dataset, family.finetuner, fold, configuration, family.plans)


# ------------------------------------------------------------------- anisotropic, ignore label, 3d and 2d


@pytest.fixture(scope="module")
def flat(project: Project, family: Family) -> dict[str, Path]:
    """Folders of fine-tunings on the flat volumes and on their slices, with softmax outputs."""
    folders = {}
    notes, package = project.root / "wandb.jsonl", project.root / "packages/wandb.py"
    package.parent.mkdir(exist_ok=True)
    package.write_text(WANDB)
    python_path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    wandb = {"nnUNet_wandb_enabled": "1", "WANDB_NOTES": str(notes), "PYTHONPATH": python_path}
    # of W&B, which knows nothing of networks, one family is enough
    in_2d = wandb if family is HYSPARK else {}
    for configuration, variables in (("3d_fullres", {"HYSPARK_PROBE_DATASET": "22"}), ("2d", in_2d)):
        weights = (
            pretrain(project, family, FLAT, configuration, HYSPARK_PROBE_EVERY="10", **variables)
            / "checkpoint_final.pth"
        )
        folders[configuration] = finetune(project, family, FLAT, "0", configuration, weights, "--npz")
    return folders


def test_anisotropic_plans_and_dummy_2d_augmentation(project: Project, family: Family, flat: dict[str, Path]) -> None:
    plans = json.loads((project.preprocessed / FLAT / f"{family.plans}.json").read_text())["configurations"]
    architecture = plans["3d_fullres"]["architecture"]["arch_kwargs"]
    assert architecture["kernel_sizes"][0] == [1, 3, 3] and architecture["strides"][1] == [1, 2, 2]
    assert plans["3d_fullres"]["spacing"][0] == 5
    for configuration, is_dummy_2d in (("3d_fullres", True), ("2d", False)):
        pretrained = project.fold_folder(FLAT, family.pretrainer, "all", configuration, family.plans)
        for folder in (flat[configuration], pretrained):
            log = next(folder.glob("training_log_*.txt")).read_text()
            assert f"do_dummy_2d_data_aug: {is_dummy_2d}" in log


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_pretraining_of_slices_and_of_flat_volumes(
    project: Project, family: Family, flat: dict[str, Path], configuration: str
) -> None:
    folder = project.fold_folder(FLAT, family.pretrainer, "all", configuration, family.plans)
    summary = json.loads((folder / "validation/summary.json").read_text())
    assert len(summary["metric_per_case"]) == 5 and 0.5 < summary["mean"]["reconstruction_loss"] < 2.5
    # in 2d every slice is a patch
    assert summary["metric_per_case"][0]["n_patches"] == (8 if configuration == "2d" else 1)
    assert (folder / "reconstructions/epoch_0002.png").is_file() and (folder / "validation/ball_0.png").is_file()
    report = json.loads((flat[configuration] / "pretrained_weights_report.json").read_text())
    assert report["encoder_share"] == 1
    described = read_checkpoint(folder / "checkpoint_final.pth")["hyspark"]
    assert described["input_channels"] == len(CHANNELS)
    assert described.get("network") == (NETWORKS[2 if configuration == "2d" else 3] if family is SPARK else None)


@hyspark_only
def test_the_probe_is_logged_and_reaches_wandb(project: Project, flat: dict[str, Path]) -> None:
    """And with it all that is logged; the ignore label has no Dice."""
    folder = project.fold_folder(FLAT, PRETRAINER, "all", "2d", PLANS)
    logged_lists = read_checkpoint(folder / "checkpoint_final.pth")["logging"]
    curve, before = logged_lists["probe_dice"], logged_lists["probe_dice_before"]
    assert len(curve) == 2 and len(before) == 1 and all(0 < dice <= 1 for dice in [*before, *curve])
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert log.count("probe_dice before the first step ") == 1
    assert "label 2 " in log and "label 3 " not in log
    notes = [json.loads(line) for line in (project.root / "wandb.jsonl").read_text().splitlines()]
    assert ["init", {"project": "nnunet"}] in notes
    logged = {key for kind, values in notes if kind == "log" for key in values}
    assert {"train_losses", "val_losses", "lrs", "probe_dice"} <= logged
    assert ["log", {"probe_dice": curve[1], "step": 1}] in notes
    assert any(kind == "summary" and "final_val/reconstruction_loss" in values for kind, values in notes)


def test_the_probe_looks_at_another_dataset(project: Project, family: Family, flat: dict[str, Path]) -> None:
    """The cases of Nested, preprocessed like those of Flat; they have no ignore label."""
    folder = project.fold_folder(FLAT, family.pretrainer, "all", "3d_fullres", family.plans)
    log = next(folder.glob("training_log_*.txt")).read_text()
    probed = [line for line in log.splitlines() if "probe_dice" in line]
    assert len(probed) == 3 and all("label 1 " in line and "label 2 " in line for line in probed)
    arguments = ("1", family.pretrainer, "-p", family.plans)
    another = {"HYSPARK_PROBE_DATASET": "22", "HYSPARK_PROBE_EVERY": "1"}
    refused = family.of(project).train(21, *arguments, configuration="2d", **another, ok=False)
    assert "probe_dataset is 22, but " in refused and "no preprocessed data for 2d" in refused
    assert "plan_and_preprocess -d 21 --like 22" in refused


@hyspark_only
def test_checkpoints_are_probed(project: Project, flat: dict[str, Path], tmp_path: Path) -> None:
    """Each with its own weights: an encoder of zeros says nothing about any voxel, the others do."""
    pretrained = project.fold_folder(FLAT, PRETRAINER, "all", "3d_fullres", PLANS) / "checkpoint_final.pth"
    zeros = tmp_path / "zeros.pth"
    checkpoint = read_checkpoint(pretrained)
    checkpoint["network_weights"] = {name: 0 * tensor for name, tensor in checkpoint["network_weights"].items()}
    torch.save(checkpoint, zeros)
    files = list(map(str, (zeros, pretrained, flat["3d_fullres"] / "checkpoint_final.pth")))
    said = project.run("hyspark_nnunet", "checkpoint", "probe", *files, "-d", "21", "-p", PLANS, "--cases", "2")
    lines = [line for line in said.splitlines() if " label 1 " in line]
    assert [line.split("  ")[0] for line in lines] == ["random weights", *files]
    random, of_zeros, *trained = (float(line.split("label 1")[0].split()[-1]) for line in lines)
    assert all(of_zeros < dice < 1 for dice in (random, *trained))
    assert "label 3" not in said  # nobody annotated what is to be ignored
    refused = project.run("hyspark_nnunet", "checkpoint", "probe", "-d", "22", "-p", LIKE, "-c", "2d", ok=False)
    assert "is missing or empty. Run: hyspark_nnunet preprocess -d 22 -c 2d -p " in refused


def test_configurations_are_compared_and_ensembled(
    project: Project, family: Family, flat: dict[str, Path], tmp_path: Path
) -> None:
    trainer = family.finetuner
    for configuration, folder in flat.items():
        assert list((folder / "validation").glob("*.npz"))
        more = ("-p", family.plans, "--save_probabilities")
        family.of(project).predict(FLAT, "0", trainer, tmp_path / configuration, *more, configuration=configuration)
    folders = [str(tmp_path / configuration) for configuration in flat]
    project.run("nnUNetv2_ensemble", "-i", *folders, "-o", str(tmp_path / "both"), "-np", "1")
    predicted = voxels(tmp_path / "both/ball_0.nii.gz")
    # the ignore label is none that is predicted
    assert predicted.shape == (8, 32, 32) and predicted.max() <= 2
    arguments = ("21", "-c", "3d_fullres", "2d", "-f", "0", "-tr", trainer, "-p", family.plans, "-np", "1")
    printed = project.run("nnUNetv2_find_best_configuration", *arguments)
    assert f"ensemble___{trainer}" in printed and (project.results / FLAT / "inference_instructions.txt").is_file()


@spark_only
def test_a_model_of_spark_is_exported_and_imported(
    project: Project, family: Family, flat: dict[str, Path], tmp_path: Path
) -> None:
    """Into other folders of the same environment; the next test has a fresh one."""
    archive, elsewhere = tmp_path / "model.zip", Project(tmp_path, family.of(project).recipe)
    elsewhere.make_folders()
    arguments = ("-c", "2d", "-tr", family.finetuner, "-p", family.plans, "-f", "0")
    project.run("nnUNetv2_export_model_to_zip", "-d", "21", "-o", str(archive), *arguments)
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", str(archive))
    for at, to in ((family.of(project), "here"), (elsewhere, "there")):
        images = ("-i", str(project.raw / FLAT / "imagesTs"), "-o", str(tmp_path / to))
        at.run("nnUNetv2_predict", "-d", FLAT, *arguments, *images, "-device", "cpu", "-npp", "1", "-nps", "1")
    assert np.array_equal(voxels(tmp_path / "there/ball_0.nii.gz"), voxels(tmp_path / "here/ball_0.nii.gz"))


@needs_build_tools
@hyspark_only
def test_a_model_exported_here_predicts_in_a_fresh_environment(
    project: Project, flat: dict[str, Path], tmp_path: Path
) -> None:
    """An environment in which nothing was done but install the package (what it needs is lent, which saves minutes)."""
    made = Installation(tmp_path / "venv")
    made.show_dependencies()
    made.pip("install", "--no-deps", "--no-index", build_wheel(copy_sources(tmp_path / "sources"), tmp_path / "wheel"))
    archive = tmp_path / "model.zip"
    arguments = ("-d", "21", "-o", str(archive), "-c", "2d", "-tr", FINETUNER, "-p", PLANS, "-f", "0")
    project.run("nnUNetv2_export_model_to_zip", *arguments)
    elsewhere = Project(tmp_path)
    elsewhere.make_folders()
    command = "import sys; from nnunetv2.{} import {} as main; main()"
    install = command.format("model_sharing.entry_points", "install_from_zip_entry_point")
    made.python_runs(install, archive, **elsewhere.variables())
    predict = command.format("inference.predict_from_raw_data", "predict_entry_point")
    words = [
        "-d",
        "21",
        "-c",
        "2d",
        "-f",
        "0",
        "-tr",
        FINETUNER,
        "-p",
        PLANS,
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
    ]
    images = project.raw / FLAT / "imagesTs"
    made.python_runs(predict, *words, "-i", images, "-o", tmp_path / "there", **elsewhere.variables())
    project.predict(FLAT, "0", FINETUNER, tmp_path / "here", "-p", PLANS, configuration="2d")
    assert np.array_equal(voxels(tmp_path / "there/ball_0.nii.gz"), voxels(tmp_path / "here/ball_0.nii.gz"))


def test_nnunets_own_trainer_on_our_plans(project: Project, tmp_path: Path) -> None:
    (tmp_path / "short_trainer.py").write_text(SHORT_TRAINER)
    folders = os.pathsep.join(filter(None, [os.environ.get("nnUNet_extTrainer"), str(tmp_path)]))
    trainer = "nnUNetTrainerShort"
    project.train(22, "all", trainer, "-p", PLANS, nnUNet_extTrainer=folders)
    to = tmp_path / "predicted"
    project.predict(NESTED, "all", trainer, to, "-p", PLANS, nnUNet_extTrainer=folders)
    assert voxels(to / "ball_0.nii.gz").shape == (32, 32, 32)
    folder = project.fold_folder(NESTED, trainer, "all", plans=PLANS)
    # of nnU-Net's own making: it holds NumPy's numbers
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert "encoder.vit.norm.weight" in checkpoint["network_weights"]


@spark_only
def test_nnunets_own_trainer_starts_from_sparks_weights(
    project: Project, family: Family, flat: dict[str, Path], tmp_path: Path
) -> None:
    """By nnU-Net's own loader; at a learning rate of zero the weights stay what was loaded."""
    folder = project.fold_folder(FLAT, family.pretrainer, "all", "3d_fullres", family.plans)
    source, out = folder / "checkpoint_final.pth", tmp_path / "weights.pth"
    project.run("hyspark_nnunet", "checkpoint", "convert", str(source), str(out), "--to", "nnunet-weights")
    (tmp_path / "still_trainer.py").write_text(SHORT_TRAINER.replace("Short", "Still") + STILL)
    folders = os.pathsep.join(filter(None, [os.environ.get("nnUNet_extTrainer"), str(tmp_path)]))
    arguments = ("-p", family.plans, "-pretrained_weights", str(out))
    project.train(21, "2", "nnUNetTrainerStill", *arguments, nnUNet_extTrainer=folders)
    folder = project.fold_folder(FLAT, "nnUNetTrainerStill", "2", plans=family.plans)
    trained = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    loaded = {
        name: tensor
        for name, tensor in read_checkpoint(source)["network_weights"].items()
        if name.startswith(("encoder.", "decoder.stages.", "decoder.transpconvs."))
    }
    assert len(loaded) > 20 and all(torch.equal(trained[name], tensor) for name, tensor in loaded.items())


# ------------------------------------------------------------------------------------ regions and a cascade


def test_regions_and_a_cascade_from_a_pretraining_like_another_dataset(
    project: Project, family: Family, tmp_path: Path
) -> None:
    """Regions, pre-trained on the plans of the flat volumes; both stages of the cascade are fine-tuned from there."""
    project = family.of(project)
    weights = pretrain(project, family, NESTED, "3d_fullres", family.like) / "checkpoint_final.pth"
    arguments = ("all", family.pretrainer, "-p", family.plans)
    refused = project.train(22, *arguments, configuration="3d_cascade_fullres", ok=False)
    assert "second stage of a cascade" in refused and "pre-train on '3d_lowres'" in refused
    coarse_weights = weights
    if family is SPARK:  # the same weights in the layout of nnssl
        coarse_weights = tmp_path / "nnssl.pth"
        project.run("hyspark_nnunet", "checkpoint", "convert", str(weights), str(coarse_weights), "--to", "nnssl")
    folder = finetune(project, family, NESTED, "all", "3d_lowres", coarse_weights)
    assert json.loads((folder / "pretrained_weights_report.json").read_text())["encoder_share"] == 1
    folder = finetune(project, family, NESTED, "all", "3d_cascade_fullres", weights)
    report = json.loads((folder / "pretrained_weights_report.json").read_text())
    assert report["encoder_share"] == 1
    stem_name = "encoder.stem.convs.0.conv.weight" if family is SPARK else "encoder.stem.weight"
    stem = next(entry for entry in report["tensors"] if entry["name"] == stem_name)
    assert "channels of the previous stage's segmentation: 2 start at zero" in stem["why"]
    trained = read_checkpoint(folder / "checkpoint_final.pth")
    # two channels of the image and one for each label; the weights of the latter have begun to learn
    stem_weight = trained["network_weights"][stem_name]
    assert stem_weight.shape[1] == 4 and 0 < stem_weight[:, 2:].abs().max() < 0.01
    # two regions: two heads, and none for the background
    assert trained["hyspark"]["regions"] is True
    assert trained["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 2

    trainer = family.finetuner
    project.predict(NESTED, "all", trainer, tmp_path / "coarse", "-p", family.plans, configuration="3d_lowres")
    more = ("-p", family.plans, "-prev_stage_predictions", str(tmp_path / "coarse"))
    project.predict(NESTED, "all", trainer, tmp_path / "fine", *more, configuration="3d_cascade_fullres")
    predicted = voxels(tmp_path / "fine/ball_0.nii.gz")
    assert predicted.shape == (32, 32, 32) and set(np.unique(predicted)) <= {0, 1, 2}


def test_the_same_plans_for_both_datasets(project: Project) -> None:
    own, like = (
        json.loads((project.preprocessed / dataset / f"{plans}.json").read_text())["configurations"]["3d_fullres"]
        for dataset, plans in ((FLAT, PLANS), (NESTED, LIKE))
    )
    assert own["architecture"] == like["architecture"] and own["spacing"] == like["spacing"]
    assert own["data_identifier"] == "nnUNetPlans_3d_fullres" and like["data_identifier"] == f"{LIKE}_3d_fullres"
