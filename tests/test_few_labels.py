"""The parts of benchmarks/few_labels; its trainings run in test_few_labels_commands.py."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from benchmarks.few_labels.__main__ import main, runs_of_arms
from benchmarks.few_labels.ablations import ABLATIONS, COMPARED_WITH, OF_ALL_LENGTHS
from benchmarks.few_labels.arms import ARMS, REFERENCE, STOCK, Run, runs_of
from benchmarks.few_labels.collect import collect
from benchmarks.few_labels.commands import CommandFailed, Commands, alone
from benchmarks.few_labels.comparison import late_rise, paired_difference, share_to_reach, smoothed
from benchmarks.few_labels.prepare import LABELLED, STOCK_PLANS, spacing_of_files, with_patch_and_batch, write_plans
from benchmarks.few_labels.record import dice_by_case, digest_of, layer_changes
from benchmarks.few_labels.report import DOCUMENTS, TABLES, plot, plot_pretraining, with_results
from benchmarks.few_labels.results import FOLDER, Results
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.spacing import dice_of_resampled_labels
from benchmarks.few_labels.subsets import MAX_SEEDS, Splits
from benchmarks.few_labels.training import finetune, fold_folder, pretrain, pretraining_folder
from benchmarks.few_labels.work import PLUGINS, TRAINERS, Work
from hyspark_nnunet.recipe.recipe import RECIPES
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.runtime.randomness import seed_generators
from tests.nnunet_plans import CUBIC, DATASET_JSON, make_plans

LABELS = (3, 5)


def write_splits(file: Path, **changed: list[str]) -> Path:
    cases = [f"case_{number:02d}" for number in range(9)]
    labelled = {"labelled_5": cases[2:7], "labelled_3": cases[3:6]}
    file.write_text(json.dumps({"pretrain": cases[:4], **labelled, "validation": cases[7:], **changed}))
    return file


class TestSubsets:
    @pytest.fixture
    def splits(self, tmp_path: Path) -> Splits:
        return Splits.read(write_splits(tmp_path / "splits.json"))

    def test_every_seed_has_nested_subsets_and_seed_0_the_lists_of_the_file(self, splits: Splits) -> None:
        drawn = [[splits.training_cases(labels, seed) for labels in LABELS] for seed in range(MAX_SEEDS)]
        assert drawn[0] == [sorted(splits.labelled[n]) for n in LABELS]
        for three, five in drawn:
            assert len(set(three)) == 3 and set(three) < set(five) == set(splits.all_labelled)
        assert len({tuple(three) for three, _ in drawn}) > MAX_SEEDS // 2

    def test_the_fold_of_a_number_is_that_of_its_labels_and_seed(self, splits: Splits) -> None:
        folds = splits.folds()
        assert (splits.fold(3, 0), splits.fold(5, 1), len(folds)) == (0, 11, 2 * MAX_SEEDS)
        for labels, seed in ((3, 2), (5, 9)):
            fold = {"train": splits.training_cases(labels, seed), "val": sorted(splits.validation)}
            assert folds[splits.fold(labels, seed)] == fold
        for labels, seed in ((7, 0), (5, MAX_SEEDS)):
            with pytest.raises(ValueError, match=f"{labels} labels and seed {seed}"):
                splits.fold(labels, seed)

    @pytest.mark.parametrize(
        ("changed", "fault"),
        [
            ({"pretrain": ["case_07"]}, "case_07 is in pretrain and in validation"),
            ({"validation": ["case_06"]}, "case_06 is in labelled_5 and in validation"),
            ({"labelled_3": ["case_00", "case_03", "case_04"]}, "labelled_5 lacks case_00: the lists must be nested"),
            ({"labelled_3": ["case_03"]}, "labelled_3 has 1 cases"),
            ({"validation": []}, "has no validation"),
        ],
    )
    def test_lists_that_do_not_fit_are_refused(self, changed: Any, fault: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=fault):
            Splits.read(write_splits(tmp_path / "splits.json", **changed))

    def test_runs_are_in_the_order_given(self, splits: Splits) -> None:
        runs = runs_of([ARMS["stock"], ARMS["spark_scratch"]], [5, 3], [1, 0], splits)
        assert [run.name for run in runs[1:3]] == ["spark_scratch_labels5_seed1", "stock_labels3_seed1"]
        assert [run.fold for run in runs] == [11, 11, 1, 1, 10, 10, 0, 0]
        # and a pre-training comes before the first run that needs it
        arguments = argparse.Namespace(arms=["stock", "pretrained"], labels=[3], seeds=[0, 1])
        ordered = [getattr(run, "run", "") or run.name for run in runs_of_arms(arguments, splits)]
        assert ordered[:3] == ["stock_labels3_seed0", "pretrain_reference", "pretrained_labels3_seed0"]
        assert len(ordered) == 5


class TestComparison:
    def test_the_interval_is_that_of_the_known_standard_errors(self) -> None:
        of_cases = np.random.default_rng(1).normal(0, 6, 400)
        found = paired_difference(np.tile(of_cases, (3, 1)), np.zeros((3, 400)))
        # seeds agree: only the draw of cases counts, 1.96 standard errors to either side
        expected = 1.96 * of_cases.std() / 20
        assert [found.high - found.mean, found.mean - found.low] == pytest.approx([expected] * 2, rel=0.06)
        of_seeds = np.array([[-3.0], [0.0], [3.0]]) + np.zeros((3, 400))
        found = paired_difference(of_seeds, np.zeros((3, 400)))
        # cases agree: all draws of three seeds, of which one in 27 is three times the lowest
        widest = 3 * np.sqrt(3 / 2)
        assert (found.low, found.high) == (pytest.approx(-widest), pytest.approx(widest))
        with pytest.raises(ValueError, match=r"\(3, 400\) and \(2, 30\) are not paired"):
            paired_difference(of_seeds, np.zeros((2, 30)))

    def test_curves(self) -> None:
        curve = [10.0 * epoch for epoch in range(12)]
        assert smoothed(curve)[[0, 1, 4, 9]] == pytest.approx([0, 5, 20, 70])
        assert [share_to_reach(curve[:10], target) for target in (20, 70, 70.1)] == [0.5, 1, float("inf")]
        assert late_rise([curve]) == 50 and late_rise([curve, [50.0] * 12]) == 25
        assert np.isnan(late_rise([curve[:9]]))


def test_the_first_command_fixes_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "--data", "nowhere", "--work", str(tmp_path)]
    no_data = "nowhere/splits.json: --data is a dataset in nnU-Net's raw layout with splits.json"
    for more, fault in (
        (["--finetune-epochs", "7"], no_data),
        (["--finetune-epochs", "8"], "was begun with finetune_epochs 7, not 8"),
        ([], no_data),
    ):
        assert main([*words, *more]) == 1 and fault in capsys.readouterr().err
    assert json.loads((tmp_path / "settings.json").read_text())["finetune_epochs"] == 7


class TestCommands:
    @pytest.fixture
    def commands(self, tmp_path: Path) -> Commands:
        return Commands(Work(tmp_path), threads=1)

    def test_environment_log_and_time(self, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HYSPARK_NUM_EPOCHS", "9")
        code = "import os, json; sum(range(10**7)); print(json.dumps(dict(os.environ)))"
        commands.run("a", ("python", "-c", code), {"HYSPARK_SEED": "1"}, arm="scratch")
        command, printed = commands.work.log("a").read_text().strip().splitlines()
        assert command.startswith("$ HYSPARK_SEED=1 python -c ")
        found = json.loads(printed)
        assert {name: found[name] for name in found if name.startswith("HYSPARK_")} == {"HYSPARK_SEED": "1"}
        assert found["nnUNet_results"] == str(commands.work.results("scratch"))
        assert found["nnUNet_extTrainer"].split(":")[:2] == [str(TRAINERS), str(PLUGINS)]
        with pytest.raises(CommandFailed, match=r"a: python ended with 3\. [\s\S]*here$"):
            commands.run("a", ("python", "-c", "print('here'); raise SystemExit(3)"), {})
        seconds = [float(line) for line in commands.work.cpu_seconds("a").read_text().split()]
        assert len(seconds) == 2 and 0.05 < seconds[0] < 60

    def test_one_benchmark_at_a_run(self, commands: Commands) -> None:
        with alone(commands.work, "a") as lock, alone(commands.work, "a") as second, alone(commands.work, "b") as other:
            assert lock is not None and second is None and other is not None
            # loader processes of nnU-Net's own trainer, when a signal ends it, must not hold the run
            code = "import subprocess, sys; subprocess.Popen(['sleep', '60'], close_fds=False)"
            commands.run("a", ("python", "-c", code), {}, lock=lock)
        deadline, free = time.monotonic() + 60, False
        while not free and time.monotonic() < deadline:
            with alone(commands.work, "a") as again:
                free = again is not None
        assert free


class RecordingCommands(Commands):
    """Starts nothing: what would be run is the question."""

    def __init__(self, work: Work) -> None:
        super().__init__(work, threads=1)
        self.lines: list[str] = []

    def run(self, name: str, command: Any, variables: Any, arm: str = "", lock: int | None = None) -> None:
        self.lines.append(" ".join(command))
        self.work.log(name).touch()


class TestContinuing:
    RUN = Run(ARMS["pretrained"], 5, 1, fold=11)

    @pytest.fixture
    def commands(self, tmp_path: Path) -> RecordingCommands:
        work = Work(tmp_path)
        work.record(REFERENCE.run).parent.mkdir(parents=True)
        work.record(REFERENCE.run).write_text("{}")
        return RecordingCommands(work)

    def started(self, commands: RecordingCommands) -> str:
        """The command of the run, which ends before its end here."""
        with pytest.raises(CommandFailed, match="ended before its end"):
            finetune(commands, Settings(), self.RUN)
        return commands.lines[-1]

    def test_from_where_the_fold_stands(self, commands: RecordingCommands) -> None:
        folder = fold_folder(commands.work, Settings(), self.RUN)
        weights = pretraining_folder(commands.work, Settings(), REFERENCE) / "checkpoint_final.pth"
        line = self.started(commands)
        assert line.endswith(f"-pretrained_weights {weights}")
        assert " 1 3d_fullres 11 -tr HySparKFinetuneTrainer -p nnUNetHySparKSPlans -device cpu " in line
        folder.mkdir(parents=True)
        (folder / "checkpoint_best.pth").touch()
        line = self.started(commands)
        assert line.endswith(" --c") and "-pretrained_weights" not in line
        (folder / "checkpoint_final.pth").touch()
        assert self.started(commands).endswith(" --val")

    def test_what_is_finished_is_skipped(
        self, commands: RecordingCommands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = commands.work
        work.record(self.RUN.name).write_text("{}")
        finetune(commands, Settings(), self.RUN)
        pretrain(commands, Settings(), REFERENCE)
        assert commands.lines == [] and capsys.readouterr().out.count("already finished") == 2
        # by the command line, too
        (work.root / "data").mkdir()
        for file in (work.root / "data" / "splits.json", work.splits_file):
            write_splits(file)
        work.prepared_file.write_text("{}")
        words = ["run", "--work", str(work.root), "--data", str(work.root / "data"), "--labels", "5", "--seeds", "1"]
        other = Work(work.root / "other")
        other.root.mkdir()
        for file in (work.splits_file, work.prepared_file):
            (other.root / file.name).write_bytes(file.read_bytes())
        with alone(other, "scratch_labels5_seed1"):
            assert main([*words, "--work", str(other.root), "--arms", "scratch"]) == 0
        assert "scratch_labels5_seed1: another benchmark runs it" in capsys.readouterr().out
        monkeypatch.setattr("benchmarks.few_labels.__main__.collect", lambda work, to, quietly: None)
        assert main([*words, "--arms", "pretrained"]) == 0
        assert not (work.root / "nnUNet_results").exists()
        write_splits(work.splits_file, pretrain=["case_00"])
        assert main(words) == 1 and "was begun with another splits.json" in capsys.readouterr().err

    def test_no_pretraining(self, commands: RecordingCommands) -> None:
        commands.work.record(REFERENCE.run).unlink()
        with pytest.raises(FileNotFoundError, match="run pretrain first"):
            finetune(commands, Settings(), self.RUN)
        assert commands.lines == []


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_in_one_thing_and_its_recipe_is_valid(name: str) -> None:
    arm, against, settings = ABLATIONS[name], (ARMS | ABLATIONS)[COMPARED_WITH[name]], Settings()
    assert (arm.name, arm.family) == (name, against.family)
    kept = ("recipe", "length", "network")
    differ = [getattr(arm, field) != getattr(against, field) for field in kept]
    before, after = (each.pretraining or REFERENCE for each in (against, arm))
    differ += [] if differ[2] else [getattr(after, field) != getattr(before, field) for field in kept[:2]]
    assert sum(differ) == 1 and (after == before) == (after.name == before.name)
    for kind, training in (("pretrain", after), ("finetune", arm)):
        variables = after.variables(settings) if kind == "pretrain" else arm.variables(settings, seed=1)
        if training.family != STOCK:
            recipe = resolve_recipe(RECIPES[kind], None, variables)
            assert {field: getattr(recipe, field) for field in training.recipe} == training.recipe
    epochs = next(value for key, value in arm.variables(settings, 1).items() if key.endswith("NUM_EPOCHS"))
    assert int(epochs) == round(settings.finetune_epochs * arm.length)


def test_ablations_of_all_families() -> None:
    for name, against in (
        ("half_the_steps_scratch", "scratch"),
        ("spark_twice_the_steps_scratch", "spark_scratch"),
        ("stock_four_times_the_steps", "stock"),
        ("without_vit_scratch", "half_the_steps_scratch"),
        ("spark_sgd", "spark_layer_decay_1"),
        ("mask_ratio_0.6", "brief_pretraining"),
    ):
        assert COMPARED_WITH[name] == against
        assert (ABLATIONS[name].pretraining is None) == ((ARMS | ABLATIONS)[against].pretraining is None)
    assert set(OF_ALL_LENGTHS) == {*ARMS, *(name for name in ABLATIONS if "_the_steps" in name and "decay" not in name)}
    ratio = ABLATIONS["mask_ratio_0.6"].pretraining
    assert ratio is not None and ratio.epochs(Settings()) == 12 and ratio.recipe == {"mask_ratio": 0.6}


@pytest.mark.parametrize(("side", "spacing", "expected"), [(8, (1, 1, 1), 1.0), (2, (2, 2, 2), 0.0)])
def test_what_a_spacing_costs(side: int, spacing: tuple[int, ...], expected: float, tmp_path: Path) -> None:
    label = np.zeros((16, 16, 16), np.uint8)
    label[4 : 4 + side, 5 : 5 + side, 5 : 5 + side] = 1
    image = sitk.GetImageFromArray(label)
    sitk.WriteImage(image, str(tmp_path / "case.nii.gz"))
    assert dice_of_resampled_labels(tmp_path, spacing) == pytest.approx(expected, abs=0.01)
    with pytest.raises(FileNotFoundError, match="holds no labels"):
        dice_of_resampled_labels(tmp_path / "nothing", spacing)


def test_the_spacing_of_the_files_is_that_of_the_plan_before_its_transposition() -> None:
    # the third axis of the files is the first of the plan
    plans = make_plans([16] * 3, CUBIC, spacing=[3, 1, 2]) | {"transpose_forward": [2, 0, 1]}
    assert spacing_of_files(plans | {"transpose_backward": [1, 2, 0]}) == [1, 2, 3]


@pytest.mark.parametrize(("width", "expected"), [(96, 96), (0, None)])
def test_the_width_of_the_decoder_is_a_setting_or_the_presets(width: int, expected: int | None) -> None:
    variables = REFERENCE.variables(Settings(pretrain_decoder_width=width))
    assert resolve_recipe(RECIPES["pretrain"], None, variables).as_dict()["decoder_width"] == expected


def test_a_network_with_other_arguments_has_plans_of_its_own(tmp_path: Path) -> None:
    work, settings, folder = Work(tmp_path), Settings(), tmp_path / "nnUNet_preprocessed" / LABELLED
    arm = ABLATIONS["without_vit"]
    name, plans = arm.plans(settings), make_plans([16, 16, 16], CUBIC)
    folder.mkdir(parents=True)
    (folder / "ours.json").write_text(json.dumps(plans))
    write_plans(work, LABELLED, "ours", name, arm.network)
    write_plans(work, LABELLED, "ours", "ours", {})
    assert json.loads((folder / "ours.json").read_text()) == plans
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].pop("vit_n_blocks") == 0
    assert found == plans | {"plans_name": name} and name == "nnUNetHySparKSPlans_vit_n_blocks_0"


def test_stock_plans_have_our_data_patch_and_batch() -> None:
    stock, ours = make_plans([32, 32, 32], CUBIC), make_plans([40, 56, 40], CUBIC, data_identifier="ours")
    found = with_patch_and_batch(stock, ours, batch=3)
    assert (
        found["plans_name"] == STOCK_PLANS == ARMS["stock"].plans(Settings()) == ARMS["spark_scratch"].plans(Settings())
    )
    changed = {"patch_size": [40, 56, 40], "batch_size": 3, "data_identifier": "ours"}
    assert found["configurations"]["3d_fullres"] == stock["configurations"]["3d_fullres"] | changed
    with pytest.raises(ValueError, match=r"\[32, 36, 32\] is no multiple of the strides \[8, 8, 8\]"):
        with_patch_and_batch(stock, make_plans([32, 36, 32], CUBIC), 2)
    with pytest.raises(ValueError, match=r"spacing \[1, 1, 2\], ours .*: arms must train on the same data"):
        with_patch_and_batch(make_plans([32] * 3, CUBIC, spacing=[1, 1, 2]), ours, 2)


def test_the_stock_trainer_is_nnunets_at_our_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(finetune_epochs=7, finetune_iterations=3, finetune_val_iterations=15, save_every=5)
    for name, value in Work(tmp_path).environment("stock", 1, ARMS["stock"].variables(settings, seed=4)).items():
        monkeypatch.setenv(name, value)
    trainer_class = recursive_find_trainer_class_by_name(ARMS["stock"].trainer)
    ours, stock = (
        made(make_plans([16] * 3, CUBIC), "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
        for made in (trainer_class, nnUNetTrainer)
    )
    lengths = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every")
    assert [getattr(ours, name) for name in lengths] == [7, 3, 15, 5]
    same = ("initial_lr", "weight_decay", "oversample_foreground_percent", "enable_deep_supervision")
    assert [getattr(ours, name) for name in same] == [getattr(stock, name) for name in same]

    # the crops of an epoch are those of our trainers with the same seed, whatever was drawn before
    drawn = []
    ours.network = torch.nn.Conv3d(1, 2, 1)
    ours.optimizer, ours.lr_scheduler = ours.configure_optimizers()
    for _ in range(2):
        ours.on_train_epoch_start()
        drawn.append((np.random.rand(), torch.rand(1).item()))
    seed_generators(4, 0, 0, masks=torch.Generator())
    assert drawn == [(np.random.rand(), torch.rand(1).item())] * 2


class TestReport:
    """Synthetic records: pre-trained is 3 points better; with 5 labels, scratch rises to the end."""

    EPOCHS = 16
    FINAL = {"pretrained": 0.63, "scratch": 0.60, "stock": 0.5, "layer_decay_1": 0.605, "half_the_steps": 0.59}
    CIRCUMSTANCES = {key: key[0] for key in ("commit", "hyspark_nnunet", "nnunetv2", "machine")}

    def keep(self, work: Work, arm: str, labels: int, seed: int, **changed: Any) -> None:
        final, about = self.FINAL[arm] + 0.01 * seed, {"arm": arm, "labels": labels, "seed": seed}
        rise = np.linspace(0.4, final, 4 if arm == "pretrained" else self.EPOCHS if labels == 5 else 6).tolist()
        curve = [
            {**about, "epoch": epoch, "steps": 7 * epoch, "val_dice": value}
            for epoch, value in enumerate(rise + [final] * (self.EPOCHS - len(rise)), start=1)
        ]
        steps = 56 if arm == "half_the_steps" else 112
        row = {**about, "dice": final, "steps": steps, "seconds": 60.5, "CPU seconds": 120.0, **self.CIRCUMSTANCES}
        row |= {"starts from": "" if arm in ("scratch", "stock") else "1234", "trained by": "5678", **changed}
        cases = [{**about, "case": f"case_{n}", "dice": final + 0.001 * (n - 1.5)} for n in range(4)]
        tables = {"runs" if arm in ARMS else "ablations": [row], "cases": cases, "curves": curve}
        if arm == "pretrained":
            tables["changes"] = [{**about, "layer": "stem", "change": f"{0.1 * seed}"}]
        self.write(work, f"{arm}_labels{labels}_seed{seed}", arm, tables)

    def write(self, work: Work, name: str, recipe_name: str, tables: Any) -> None:
        work.record(name).parent.mkdir(parents=True, exist_ok=True)
        record = {"name": name, "tables": tables, "recipe_name": recipe_name, "recipe": {}}
        work.record(name).write_text(json.dumps(record))
        for file in (work.prepared_file, work.settings_file):
            file.write_text("{}")

    @pytest.fixture
    def results(self, tmp_path: Path) -> Results:
        work = Work(tmp_path / "work")
        for arm in self.FINAL:
            for labels in LABELS if arm in ARMS else LABELS[:1]:
                for seed in (0, 1):
                    self.keep(work, arm, labels, seed)
        about = {"pretraining": "reference"}
        reached = {
            "first loss": 1.1,
            "last loss": 0.8,
            "loss of whole cases": 0.75,
            "CPU seconds": 600,
            "weights": "1234",
        }
        curve = [{**about, "steps": 50, "train_loss": 1.2, "val_loss": 1.1}]
        summary = {**about, "epochs": 2, "steps": 100, **reached}
        self.write(work, REFERENCE.run, REFERENCE.run, {"pretrainings": [summary], "pretraining": curve})
        collect(work, tmp_path / "results")
        return Results(tmp_path / "results")

    def test_collect_beside_results_of_another_machine(self, results: Results, tmp_path: Path) -> None:
        runs = results.table("runs")
        assert runs["arm"].tolist() == ["pretrained"] * 4 + ["scratch"] * 4 + ["stock"] * 4
        assert (results.folder / "recipes" / "stock.json").is_file()
        work = Work(tmp_path / "another machine")
        for seed in (1, 2):
            self.keep(work, "scratch", 5, seed, commit="def")
        collect(work, results.folder)
        both = Results(results.folder)
        found = both.table("runs")
        assert len(found) == 13 and found.columns.tolist() == runs.columns.tolist()
        places = found[["arm", "labels", "seed", "commit"]].values.tolist()[6:9]
        assert places == [["scratch", 5, 0, "c"], ["scratch", 5, 1, "def"], ["scratch", 5, 2, "def"]]
        assert both.seeds(5, "scratch") == [0, 1, 2] and both.seeds(5, "scratch", "pretrained") == [0, 1]
        assert len(both.curve("scratch", 5, 1)[0]) == self.EPOCHS
        assert both.table("ablations").equals(results.table("ablations"))

    def test_results_that_do_not_compare_are_refused(self, results: Results, tmp_path: Path) -> None:
        work = Work(tmp_path / "another machine")
        before = {file: file.read_text() for file in results.folder.glob("*.csv")}
        for changed, fault in (
            ({"starts from": "9"}, r"pretrained start from different weights: 1234 \(.*9 \(5 labels, seed 2\)"),
            ({"trained by": "9"}, "pretrained were trained by different recipes or rates: .*seed 2"),
        ):
            self.keep(work, "pretrained", 5, 2, **changed)
            with pytest.raises(ValueError, match=fault):
                collect(work, results.folder)
        self.keep(work, "pretrained", 5, 2)
        work.settings_file.write_text('{"preset": "L"}')
        with pytest.raises(ValueError, match=r"results of other settings than .*settings\.json.*collect --to"):
            collect(work, results.folder)
        assert {file: file.read_text() for file in results.folder.glob("*.csv")} == before
        # a setting that the first results do not name has its default; nor do they name recipes
        work.settings_file.write_text('{"spacing": ""}')
        table = results.folder / "runs.csv"
        table.write_text(table.read_text().replace(",5678", ","))
        collect(work, results.folder)
        assert Results(results.folder).seeds(5, "pretrained") == [0, 1, 2]
        with pytest.raises(FileNotFoundError, match="holds no finished run"):
            collect(Work(tmp_path), tmp_path)

    @pytest.mark.parametrize(
        ("table", "row"),
        [
            ("dice", "| HySparK, pre-trained | 63.5 (63.0 to 64.0), 2 | 63.5 (63.0 to 64.0), 2 |"),
            ("seeds", "| 5 | 1 | 64.0 | 61.0 | 51.0 |"),
            ("differences", "| 3 | HySparK, pre-trained | HySparK, from scratch | 2 | +3.0 [+3.0, +3.0] |"),
            ("costs", "| HySparK, pre-trained | 3 | 2 | 100 | 112 | 63.5 | 2 | 12 | 3 |"),
            ("costs", "| stock nnU-Net | 5 | 2 | - | 112 | 50.5 | 2 | 2 | 2 |"),
            # the mean of epochs 3 to 7 is the first above 60 (of 61 with the other seed)
            ("steps", "| HySparK | 3 | 112 | 44%, 44% | 25%, 25% | +0.0 | yes |"),
            ("steps", "| HySparK | 5 | 112 | 38%, 38% | 25%, 25% | +6.8 | no |"),
            (
                "lengths",
                "| HySparK | 3 | 112 | 63.5 (63.0 to 64.0) | 60.5 (60.0 to 61.0) | 50.5 (50.0 to 51.0) "
                "| +3.0 [+3.0, +3.0]: +3.0, +3.0 | +13.0 [+13.0, +13.0]: +13.0, +13.0 |",
            ),
            ("rest", "| HySparK, pre-trained | 3 | 2 | 56 | 59.5 | 63.5 | no |"),
            ("ablations", "| layer_decay_1 | 3 | 2 | 61.0 (60.5 to 61.5) | HySparK, pre-trained | -2.5 [-2.5, -2.5] |"),
            ("pretraining", "| reference | 100 | 1.1 | 0.8 | 0.75 |"),
            ("changes", "| HySparK, pre-trained | 2 | 0.05 |"),
            ("provenance", "| c | h | n | m | 12 |"),
        ],
    )
    def test_tables(self, table: str, row: str, results: Results) -> None:
        assert row in TABLES[table](results).splitlines()

    def test_a_short_curve_says_nothing_of_a_plateau(self, results: Results) -> None:
        curves = results.folder / "curves.csv"
        header, *lines = curves.read_text().splitlines()
        curves.write_text("\n".join([header, *(line for line in lines if int(line.split(",")[3]) < 10)]))
        assert TABLES["steps"](results).splitlines()[2].endswith("| - | too few epochs |")

    def test_plots_and_a_document(self, results: Results, tmp_path: Path) -> None:
        plot(results, tmp_path / "curves.png")
        plot_pretraining(Results(FOLDER), tmp_path / "pretraining.png")
        assert min((tmp_path / f"{name}.png").stat().st_size for name in ("curves", "pretraining")) > 10_000
        text = with_results("<!-- results: seeds of results -->\nold\n<!-- end -->", tmp_path)
        assert "| 5 | 1 | 64.0 |" in text and "old" not in text


def test_what_a_run_keeps() -> None:
    scores = {"metric_per_case": [{"prediction_file": "/x/case_1.nii.gz", "metrics": {"1": {"Dice": 0.5}}}]}
    assert dice_by_case(scores) == {"case_1": {"1": 0.5}}
    recipe = {"recipe": {"seed": 1, "layer_decay": None, "batch_size": 2}, "peak_rates": {"stem": 0.1}}
    # layer_decay is compared by the rates it gave
    same, other = {"seed": 2, "layer_decay": 0.5, "batch_size": 2}, {"seed": 1, "batch_size": 4}
    assert digest_of(recipe) == digest_of(recipe | {"recipe": same}) != digest_of(recipe | {"recipe": other})
    assert digest_of(recipe) != digest_of(recipe | {"peak_rates": {"stem": 0.2}})
    names = [f"encoder.stages.1.{name}" for name in ("weight", "other.weight", "norm.weight")] + ["decoder.weight"]
    before = {name: torch.full((2, 2) if "norm" not in name else (2,), 2.0) for name in names}
    after = {name: tensor + 1 for name, tensor in before.items()} | {"encoder.stem.weight": torch.ones(1, 1)}
    after[names[1]] = before[names[1]]
    # in parts of what it was
    assert layer_changes(before, after) == {"stage 1": pytest.approx((4 / 32) ** 0.5)}


def test_the_tables_of_the_documents_are_current() -> None:
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    assert set(re.findall(r"<!-- results: (\w+)", "".join(texts))) >= set(TABLES)
    for text in texts:
        assert with_results(text, FOLDER) == text
