"""The parts of benchmarks/few_labels; its trainings run in test_few_labels_commands.py."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from benchmarks.few_labels.__main__ import main
from benchmarks.few_labels.ablations import (
    ABLATIONS,
    ALL_LAYERS_ALIKE,
    BRIEF_PRETRAINING,
    HALF_THE_STEPS,
    THREE_TIMES_THE_STEPS,
    TWICE_THE_STEPS,
    Ablation,
    compared_with,
)
from benchmarks.few_labels.arms import ARMS, HYSPARK, REFERENCE, SPARK, SPARK_REFERENCE, Run, runs_of
from benchmarks.few_labels.collect import collect
from benchmarks.few_labels.commands import CommandFailed, Commands, Stopped, alone
from benchmarks.few_labels.comparison import late_rise, paired_difference, share_to_reach, smoothed
from benchmarks.few_labels.layer_changes import layer_changes
from benchmarks.few_labels.log_lines import key_lines
from benchmarks.few_labels.prepare import (
    LABELLED,
    LIKE,
    STOCK_PLANS,
    UNLABELLED,
    hyspark_plans,
    with_patch_and_batch,
    write_plans,
)
from benchmarks.few_labels.record import mean_dice
from benchmarks.few_labels.report import DOCUMENTS, TABLES, plot, plot_pretraining, with_results
from benchmarks.few_labels.results import FOLDER, Results
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import MAX_SEEDS, Splits
from benchmarks.few_labels.training import finetune, fold_folder, pretrain, pretraining_folder
from benchmarks.few_labels.work import PLUGINS, TRAINERS, Work
from benchmarks.measuring import write_csv
from hyspark_nnunet.recipe.recipe import RECIPES
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.runtime.randomness import seed_generators
from tests.nnunet_plans import CUBIC, DATASET_JSON, make_plans

LABELS = (3, 5)
REPORTED = (5, 10, 20)


def write_splits(file: Path, **changed: list[str]) -> Path:
    cases = [f"case_{number:02d}" for number in range(9)]
    content = {
        "pretrain": cases[:4],
        "labelled_5": cases[2:7],
        "labelled_3": cases[3:6],
        "validation": cases[7:],
    }
    file.write_text(json.dumps(content | changed))
    return file


class TestSubsets:
    @pytest.fixture
    def splits(self, tmp_path: Path) -> Splits:
        return Splits.read(write_splits(tmp_path / "splits.json"))

    def test_seed_0_takes_the_lists_of_the_file(self, splits: Splits) -> None:
        assert [splits.training_cases(labels, 0) for labels in LABELS] == [sorted(splits.labelled[n]) for n in LABELS]

    def test_every_seed_has_nested_subsets_of_its_own(self, splits: Splits) -> None:
        drawn = [[splits.training_cases(labels, seed) for labels in LABELS] for seed in range(MAX_SEEDS)]
        for three, five in drawn:
            assert len(set(three)) == 3 and set(three) < set(five) == set(splits.all_labelled)
        assert len({tuple(three) for three, _ in drawn}) > MAX_SEEDS // 2

    def test_the_fold_of_a_number_is_that_of_its_labels_and_seed(self, splits: Splits) -> None:
        folds = splits.folds()
        assert (splits.fold(3, 0), splits.fold(5, 1)) == (0, 11)
        assert len(folds) == len(LABELS) * MAX_SEEDS
        for labels in LABELS:
            for seed in range(MAX_SEEDS):
                fold = folds[splits.fold(labels, seed)]
                assert fold == {"train": splits.training_cases(labels, seed), "val": sorted(splits.validation)}

    @pytest.mark.parametrize("labels, seed", [(7, 0), (5, MAX_SEEDS), (5, -1)])
    def test_there_is_no_other_fold(self, splits: Splits, labels: int, seed: int) -> None:
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


class TestComparison:
    def test_the_same_difference_everywhere_has_no_spread(self) -> None:
        second = np.random.default_rng(0).uniform(40, 80, (3, 30))
        found = paired_difference(second + 2.5, second)
        assert found.mean == pytest.approx(2.5)
        assert (found.low, found.high) == (pytest.approx(2.5), pytest.approx(2.5))

    def test_the_interval_is_that_of_the_known_standard_errors(self) -> None:
        rng = np.random.default_rng(1)
        of_cases = rng.normal(0, 6, 400)
        found = paired_difference(np.tile(of_cases, (3, 1)), np.zeros((3, 400)))
        # seeds agree: only the draw of cases counts, 1.96 standard errors to either side
        expected = 1.96 * of_cases.std() / 20
        assert found.high - found.mean == pytest.approx(expected, rel=0.06)
        assert found.mean - found.low == pytest.approx(expected, rel=0.06)
        of_seeds = np.array([[-3.0], [0.0], [3.0]]) + np.zeros((3, 400))
        found = paired_difference(of_seeds, np.zeros((3, 400)))
        # cases agree: all draws of three seeds, of which one in 27 is three times the lowest
        widest = 3 * np.sqrt(3 / 2)
        assert (found.low, found.high) == (pytest.approx(-widest), pytest.approx(widest))

    def test_scores_must_be_paired(self) -> None:
        with pytest.raises(ValueError, match=r"\(3, 30\) and \(2, 30\) are not paired"):
            paired_difference(np.zeros((3, 30)), np.zeros((2, 30)))

    def test_share_to_reach(self) -> None:
        curve = [10.0 * epoch for epoch in range(10)]
        assert smoothed(curve)[[0, 1, 4, 9]] == pytest.approx([0, 5, 20, 70])
        assert share_to_reach(curve, 20) == 0.5
        assert share_to_reach(curve, 70) == 1
        assert share_to_reach(curve, 70.1) == float("inf")

    def test_late_rise(self) -> None:
        flat, rising = [50.0] * 12, [float(epoch) for epoch in range(12)]
        assert late_rise([flat]) == 0
        assert late_rise([rising]) == 5
        assert late_rise([flat, rising]) == 2.5
        assert np.isnan(late_rise([flat[:9]]))


class TestSettings:
    OPTIONS = ("prepare", "--data", "nowhere")
    FAULT = "nowhere/splits.json: --data is a dataset in nnU-Net's raw layout with splits.json"

    @pytest.mark.parametrize("option", ["--jobs", "--cores"])
    def test_counts_begin_at_one(self, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([*self.OPTIONS, "--work", str(tmp_path), option, "0"])
        assert f"argument {option}: 0: 1 or more" in capsys.readouterr().err

    def test_the_first_command_fixes_them(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        work = ["--work", str(tmp_path)]
        assert main([*self.OPTIONS, *work, "--finetune-epochs", "7"]) == 1  # there are no data
        assert json.loads((tmp_path / "settings.json").read_text())["finetune_epochs"] == 7
        assert self.FAULT in capsys.readouterr().err
        assert main([*self.OPTIONS, *work, "--finetune-epochs", "8"]) == 1
        assert "was begun with finetune_epochs 7, not 8" in capsys.readouterr().err
        assert main([*self.OPTIONS, *work]) == 1
        assert self.FAULT in capsys.readouterr().err


class TestCommands:
    @pytest.fixture
    def commands(self, tmp_path: Path) -> Commands:
        return Commands(Work(tmp_path), threads=1)

    def test_environment_and_log(self, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HYSPARK_NUM_EPOCHS", "9")
        code = "import os, json; sum(range(10**7)); print(json.dumps(dict(os.environ)))"
        commands.run("a", ("python", "-c", code), {"HYSPARK_SEED": "1"}, arm="scratch")
        command, printed = commands.work.log("a").read_text().strip().splitlines()
        assert command.startswith("$ HYSPARK_SEED=1 python -c ")
        found = json.loads(printed)
        assert {name: found[name] for name in found if name.startswith("HYSPARK_")} == {"HYSPARK_SEED": "1"}
        assert 0 < float(commands.work.cpu_seconds("a").read_text()) < 60
        assert found["nnUNet_results"] == str(commands.work.results("scratch"))
        assert found["nnUNet_extTrainer"].split(":")[:2] == [str(TRAINERS), str(PLUGINS)]

    def test_the_others_go_on_where_one_fails(self, commands: Commands) -> None:
        def task(name: str, status: int) -> None:
            commands.run(name, ("python", "-c", f"print('here'); raise SystemExit({status})"), {})

        failures = commands.side_by_side([lambda: task("a", 3), lambda: task("b", 0)], jobs=1)
        assert len(failures) == 1
        assert "a: python ended with 3" in failures[0] and failures[0].endswith("here")
        assert commands.work.log("b").is_file()

    def test_stop_ends_what_runs_and_starts_nothing(self, commands: Commands) -> None:
        code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print('up'); time.sleep(60)"
        ended: list[BaseException] = []

        def task() -> None:
            with pytest.raises(Stopped) as error:
                commands.run("a", ("python", "-c", code), {})
            ended.append(error.value)

        thread = threading.Thread(target=task)
        thread.start()
        wait_for(lambda: "\nup" in log_of(commands.work, "a"))
        commands.stop()
        thread.join(30)
        assert len(ended) == 1
        with pytest.raises(Stopped):
            commands.run("b", ("python", "-c", "print('never')"), {})
        assert "\nnever" not in log_of(commands.work, "b")

    def test_one_benchmark_at_a_run(self, commands: Commands) -> None:
        with alone(commands.work, "a") as lock, alone(commands.work, "a") as second, alone(commands.work, "b") as other:
            assert lock is not None and second is None and other is not None
        with alone(commands.work, "a") as lock:
            assert lock is not None

    def test_a_training_that_outlives_its_benchmark_holds_the_run(self, commands: Commands) -> None:
        code = "import time; print('up'); time.sleep(1.5)"
        with alone(commands.work, "a") as lock:
            thread = threading.Thread(target=lambda: commands.run("a", ("python", "-c", code), {}, lock=lock))
            thread.start()
            wait_for(lambda: "\nup" in log_of(commands.work, "a"))
        # as when the benchmark alone is killed: its own hold is gone
        with alone(commands.work, "a") as again:
            assert again is None
        thread.join()
        with alone(commands.work, "a") as again:
            assert again is not None

    def test_what_a_training_leaves_running_does_not_hold_its_run(self, commands: Commands) -> None:
        """Loader processes of nnU-Net's own trainer, when a signal ends it."""
        code = "import subprocess, sys; subprocess.Popen(['sleep', '60'], close_fds=False)"
        with alone(commands.work, "a") as lock:
            commands.run("a", ("python", "-c", code), {}, lock=lock)
        wait_for(lambda: self.is_free(commands.work))

    def is_free(self, work: Work) -> bool:
        with alone(work, "a") as lock:
            return lock is not None


def log_of(work: Work, name: str) -> str:
    return work.log(name).read_text() if work.log(name).is_file() else ""


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class RecordingCommands(Commands):
    """Starts nothing: what would be run is the question."""

    def __init__(self, work: Work) -> None:
        super().__init__(work, threads=1)
        self.lines: list[str] = []

    def run(self, name: str, command: Any, variables: Any, arm: str = "", lock: int | None = None) -> None:
        self.lines.append(" ".join(command))
        self.work.log(name).parent.mkdir(parents=True, exist_ok=True)
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

    def test_a_finished_run_is_skipped(self, commands: RecordingCommands, capsys: pytest.CaptureFixture[str]) -> None:
        commands.work.record(self.RUN.name).write_text("{}")
        finetune(commands, Settings(), self.RUN)
        pretrain(commands, Settings(), REFERENCE)
        assert commands.lines == []
        assert capsys.readouterr().out.count("already finished") == 2

    def test_no_pretraining(self, commands: RecordingCommands) -> None:
        commands.work.record(REFERENCE.run).unlink()
        with pytest.raises(FileNotFoundError, match="run pretrain first"):
            finetune(commands, Settings(), self.RUN)
        assert commands.lines == []

    def prepared(self, work: Work) -> Work:
        (work.root / "data").mkdir()
        for file in (work.root / "data" / "splits.json", work.splits_file):
            write_splits(file)
        work.prepared_file.write_text("{}")
        return work

    def folders(self, work: Work) -> list[str]:
        return ["--work", str(work.root), "--data", str(work.root / "data")]

    def test_the_command_line_skips_what_is_finished(
        self, commands: RecordingCommands, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = self.prepared(commands.work)
        monkeypatch.setattr("benchmarks.few_labels.__main__.collect", lambda work, to, quietly: None)
        for labels in LABELS:
            work.record(Run(ARMS["scratch"], labels, 2, 0).name).write_text("{}")
        assert main(["run", "--arms", "scratch", "--seeds", "2", *self.folders(work)]) == 0
        assert list((work.root / "nnUNet_results").glob("*")) == []

    def test_what_another_machine_has_done_is_left_out(
        self, commands: RecordingCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work, results = self.prepared(commands.work), tmp_path / "others"
        run, other = Run(ARMS["scratch"], 3, 2, 2), Run(ARMS["scratch"], 5, 2, 12)
        results.mkdir()
        (results / "runs.csv").write_text("arm,labels,seed\nscratch,3,1\nscratch,3,2\n")
        monkeypatch.setattr("benchmarks.few_labels.__main__.collect", lambda work, to, quietly: None)
        monkeypatch.setattr("benchmarks.few_labels.__main__.FOLDER", results)
        done: list[Run] = []
        monkeypatch.setattr("benchmarks.few_labels.__main__.finetune", lambda c, s, run: done.append(run))
        words = ["run", "--arms", "scratch", "--labels", "5", "3", "--seeds", "2", *self.folders(work)]
        assert main(words) == 0 and done == [other, run]
        done.clear()
        assert main([*words, "--but-collected"]) == 0 and done == [other]
        (results / "settings.json").write_text('{"preset": "L"}')
        done.clear()
        assert main([*words, "--but-collected"]) == 1 and done == []


def test_runs_are_in_the_order_given(tmp_path: Path) -> None:
    splits = Splits.read(write_splits(tmp_path / "splits.json"))
    runs = runs_of([ARMS["stock"], ARMS["spark_scratch"]], [5, 3], [1, 0], splits)
    assert [run.name for run in runs[:3]] == [
        "stock_labels5_seed1",
        "spark_scratch_labels5_seed1",
        "stock_labels3_seed1",
    ]
    assert [run.fold for run in runs] == [11, 11, 1, 1, 10, 10, 0, 0]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_the_recipe_it_says(name: str) -> None:
    ablation, settings = ABLATIONS[name], Settings()
    pretraining = ablation.pretraining(name)
    for kind, variables, changed in (
        ("pretrain", pretraining.variables(settings), ablation.pretrain),
        ("finetune", ablation.arms(name)[0].variables(settings, seed=1), ablation.finetune),
    ):
        recipe = resolve_recipe(RECIPES[kind], None, variables)
        assert {field: getattr(recipe, field) for field in changed} == changed
    assert pretraining.epochs(settings) == round(settings.pretrain_epochs * ablation.pretrain_length)
    changed = bool(ablation.pretrain or ablation.network) or ablation.pretrain_length != 1
    assert (pretraining != (SPARK_REFERENCE if ablation.family == SPARK else REFERENCE)) == changed
    assert {arm.family for arm in ablation.arms(name)} == {pretraining.family}
    arms = ablation.arms(name)
    assert [arm.pretraining for arm in arms[1:]] == [None] * ablation.with_scratch
    epochs = round(settings.finetune_epochs * ablation.finetune_length)
    assert [int(arm.variables(settings, 1)["HYSPARK_FINETUNE_NUM_EPOCHS"]) for arm in arms] == [epochs] * len(arms)
    assert compared_with(name) == ablation.against


def test_from_scratch_an_ablation_is_compared_with_scratch_of_that_length() -> None:
    assert compared_with("half_the_steps_scratch") == "scratch"
    assert compared_with("finetune_lr_1e-2_scratch") == "half_the_steps_scratch"
    # through the ablation of the pre-training between them
    assert compared_with("without_vit_scratch") == "half_the_steps_scratch"


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_compared_with_what_differs_in_one_thing(name: str) -> None:
    ablation = ABLATIONS[name]
    other = ABLATIONS.get(ablation.against, Ablation(family=ARMS.get(ablation.against, ARMS["scratch"]).family))
    fields = ("pretrain", "pretrain_length", "finetune", "finetune_length", "network")
    assert ablation.family == (other.family if ablation.against in ARMS else HYSPARK)
    assert sum(getattr(ablation, field) != getattr(other, field) for field in fields) == 1


@pytest.mark.parametrize(("width", "expected"), [(96, 96), (0, None)])
def test_the_width_of_the_decoder_is_a_setting_or_the_presets(width: int, expected: int | None) -> None:
    variables = REFERENCE.variables(Settings(pretrain_decoder_width=width))
    assert resolve_recipe(RECIPES["pretrain"], None, variables).as_dict()["decoder_width"] == expected


def test_a_network_with_other_arguments_has_plans_of_its_own(tmp_path: Path) -> None:
    work, settings, ablation = Work(tmp_path), Settings(), ABLATIONS["without_vit"]
    arm, scratch = ablation.arms("without_vit")
    for dataset, names in (
        (LABELLED, (hyspark_plans(settings), arm.plans(settings))),
        (UNLABELLED, (hyspark_plans(settings) + LIKE, arm.pretraining.plans(settings))),
    ):
        folder = work.preprocessed / dataset
        folder.mkdir(parents=True)
        plans = make_plans([16, 16, 16], CUBIC)
        (folder / f"{names[0]}.json").write_text(json.dumps(plans))
        write_plans(work, dataset, *names, arm.network)
        write_plans(work, dataset, names[0], names[0], {})
        assert json.loads((folder / f"{names[0]}.json").read_text()) == plans
        found = json.loads((folder / f"{names[1]}.json").read_text())
        assert found["plans_name"] == names[1] != names[0]
        assert found["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].pop("vit_n_blocks") == 0
        assert found | {"plans_name": plans["plans_name"]} == plans
    assert scratch.plans(settings) == arm.plans(settings) and ARMS["stock"].plans(settings) == STOCK_PLANS


class TestStockPlans:
    def test_ours_are_patch_and_batch_alone(self) -> None:
        stock, ours = make_plans([32, 32, 32], CUBIC), make_plans([40, 56, 40], CUBIC)
        found = with_patch_and_batch(stock, ours, batch=3)
        assert found["plans_name"] == STOCK_PLANS
        configuration = found["configurations"]["3d_fullres"]
        assert (configuration["patch_size"], configuration["batch_size"]) == ([40, 56, 40], 3)
        same = configuration | {key: stock["configurations"]["3d_fullres"][key] for key in ("patch_size", "batch_size")}
        assert same == stock["configurations"]["3d_fullres"]

    def test_the_network_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"stride 8 on axis 1.*\[32, 36, 32\]"):
            with_patch_and_batch(make_plans([32] * 3, CUBIC), make_plans([32, 36, 32], CUBIC), 2)
        others = make_plans([32] * 3, CUBIC, spacing=[1, 1, 2])
        with pytest.raises(ValueError, match=r"spacing \[1, 1, 2\], ours .*: arms must train on the same data"):
            with_patch_and_batch(others, make_plans([32] * 3, CUBIC), 2)


def test_the_stock_trainer_is_nnunets_at_our_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path)
    settings = Settings(finetune_epochs=7, finetune_iterations=3, finetune_val_iterations=15, save_every=5)
    for name, value in work.environment("stock", 1, ARMS["stock"].variables(settings, seed=4)).items():
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


def test_key_lines_hold_no_path_of_the_machine(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.log("a").parent.mkdir()
    lines = [
        f"$ HYSPARK_SEED=1 nnUNetv2_train -pretrained_weights {tmp_path}/x.pth",
        "2026-01-01 10:00:00.123456: This split has 5 training and 30 validation cases.",
        f"Weights from {tmp_path}/x.pth (HySparKPretrainTrainer):",
        "part    tensors",
        "100.0% of the encoder's parameters come from the file.",
        "something else",
        *(f"2026-01-01 10:00:00: {line}" for epoch in range(3) for line in (f"Epoch {epoch}", f"train_loss 0.{epoch}")),
        "2026-01-01 10:00:09: Mean Validation Dice: 0.5",
    ]
    work.log("a").write_text("\n".join(lines))
    assert key_lines(work.log("a"), work) == [
        "$ HYSPARK_SEED=1 nnUNetv2_train -pretrained_weights $WORK/x.pth",
        "This split has 5 training and 30 validation cases.",
        "Weights from $WORK/x.pth (HySparKPretrainTrainer):",
        "part    tensors",
        "100.0% of the encoder's parameters come from the file.",
        "Epoch 0",
        "train_loss 0.0",
        "Epoch 2",
        "train_loss 0.2",
        "Mean Validation Dice: 0.5",
    ]


class TestReport:
    """Synthetic records: pre-trained is 3 points better (1 worse at 20 labels); at 10, scratch rises to the end."""

    EPOCHS = 16
    ABLATED = {
        "mask_ratio_0.5": 0.62,
        BRIEF_PRETRAINING: 0.61,
        ALL_LAYERS_ALIKE: 0.605,
        HALF_THE_STEPS: 0.59,
        f"{HALF_THE_STEPS}_scratch": 0.55,
    }
    FINAL = {"pretrained": 0.63, "scratch": 0.60, "stock": 0.5, **ABLATED}

    def record(self, arm: str, labels: int, seed: int) -> dict[str, Any]:
        final = self.FINAL[arm] + 0.01 * seed - (0.04 if (arm, labels) == ("pretrained", 20) else 0)
        rising = 4 if arm == "pretrained" else self.EPOCHS if labels == 10 else 6
        rise = np.linspace(0.4, final, rising).tolist()
        curve = rise + [final] * (self.EPOCHS - len(rise))
        dice = {f"case_{n}": {"1": final + 0.001 * n, "2": final - 0.001 * n} for n in range(4)}
        return {
            **{"arm": arm, "labels": labels, "seed": seed, "fold": 10 * REPORTED.index(labels) + seed, "dice": dice},
            "cpu_seconds": 70.5,
            "changes": {},
            **{"steps": 120, "seconds": 60.5, "recipe": {"seed": seed}, "log": ["$ nnUNetv2_train", "Epoch 0"]},
            "peak_rates": {"decoder": 0.003, "stem": 0.003 if arm == ALL_LAYERS_ALIKE else 2.3e-5},
            "starts_from": "" if arm in ("scratch", "stock") else "1234",
            **{
                "commit": "abc",
                "hyspark_nnunet": "0",
                "nnunetv2": "2",
                "torch": "2",
                "machine": "a machine, 1 threads",
            },
            "curve": [{"train_loss": 1 - value, "val_dice": value} for value in curve],
        }

    @pytest.fixture
    def results(self, tmp_path: Path) -> Results:
        work = Work(tmp_path / "work")
        for arm in self.FINAL:
            for labels in REPORTED if arm in ARMS else REPORTED[:1]:
                for seed in (0, 1):
                    self.keep(work, f"{arm}_{labels}_{seed}", self.record(arm, labels, seed))
        provenance = {key: "?" for key in ("commit", "hyspark_nnunet", "nnunetv2", "torch", "machine")}
        curve = [
            {"train_loss": 1.2, "val_loss": 1.1},
            {"train_loss": 0.9, "val_loss": 0.8},
        ]
        pretraining = {
            "pretraining": "reference",
            "epochs": 2,
            "steps": 100,
            "seconds": 9,
            "cpu_seconds": 8,
            "recipe": {},
            "log": ["x"],
        }
        reached = {"reconstruction_loss": 0.75, "weights": "1234"}
        self.keep(work, REFERENCE.run, {**pretraining, **provenance, "curve": curve, **reached})
        for file in (work.prepared_file, work.settings_file):
            file.write_text("{}")
        collect(work, tmp_path / "results")
        return Results(tmp_path / "results")

    def keep(self, work: Work, name: str, record: dict[str, Any]) -> None:
        work.record(name).parent.mkdir(parents=True, exist_ok=True)
        work.record(name).write_text(json.dumps(record))

    def test_collect(self, results: Results) -> None:
        assert [row["arm"] for row in results.rows("runs")] == ["pretrained"] * 6 + ["scratch"] * 6 + ["stock"] * 6
        assert results.rows("runs")[0]["dice"] == "0.63000" and results.rows("runs")[0]["dice_2"] == "0.62850"
        assert [row["arm"] for row in results.rows("ablations")] == [arm for arm in sorted(self.ABLATED) for _ in "01"]
        assert len(results.rows("cases")) == 28 * 4 and len(results.rows("curves")) == 28 * self.EPOCHS
        assert [row["val_loss"] for row in results.rows("pretraining")] == ["1.1", "0.8"]
        assert (results.folder / "logs" / "scratch_labels5_seed1.txt").read_text() == "$ nnUNetv2_train\nEpoch 0\n"
        assert (results.folder / "recipes" / "stock.json").is_file()

    def test_results_of_several_machines_come_together(self, results: Results, tmp_path: Path) -> None:
        before = {name: results.rows(name) for name in ("runs", "ablations", "cases", "curves", "pretrainings")}
        work = Work(tmp_path / "another machine")
        for labels, seed in ((5, 1), (5, 2)):
            changed = {"commit": "def"}
            self.keep(work, f"scratch_{labels}_{seed}", self.record("scratch", labels, seed) | changed)
        for file in (work.prepared_file, work.settings_file):
            file.write_text("{}")
        collect(work, results.folder)
        found = {name: results.rows(name) for name in before}
        assert [found[name] for name in ("ablations", "pretrainings")] == [before["ablations"], before["pretrainings"]]
        assert {name: len(found[name]) - len(before[name]) for name in ("runs", "cases", "curves")} == {
            "runs": 1,
            "cases": 4,
            "curves": self.EPOCHS,
        }
        places = [(row["arm"], row["labels"], row["seed"], row["commit"]) for row in found["runs"]][6:9]
        assert places == [("scratch", "5", "0", "abc"), ("scratch", "5", "1", "def"), ("scratch", "5", "2", "def")]
        assert results.seeds(5, "scratch") == [0, 1, 2] and results.seeds(5, "scratch", "pretrained") == [0, 1]
        assert len(results.curve("scratch", 5, 1)[0]) == self.EPOCHS

    def test_results_of_other_settings_are_refused(self, results: Results, tmp_path: Path) -> None:
        work = Work(tmp_path / "work")
        work.settings_file.write_text('{"preset": "L"}')
        before = (results.folder / "runs.csv").read_text()
        with pytest.raises(ValueError, match=r"results of other settings than .*settings\.json.*collect --to"):
            collect(work, results.folder)
        assert (results.folder / "runs.csv").read_text() == before

    def test_runs_from_another_pretraining_are_refused(self, results: Results, tmp_path: Path) -> None:
        work = Work(tmp_path / "another machine")
        self.keep(work, "pretrained_5_2", self.record("pretrained", 5, 2) | {"starts_from": "5678"})
        for file in (work.prepared_file, work.settings_file):
            file.write_text("{}")
        before = (results.folder / "cases.csv").read_text()
        with pytest.raises(
            ValueError, match=r"pretrained start from different weights: 1234 .*5678 \(5 labels, seed 2\)"
        ):
            collect(work, results.folder)
        assert (results.folder / "cases.csv").read_text() == before
        self.keep(work, "pretrained_5_2", self.record("pretrained", 5, 2))
        collect(work, results.folder)
        assert results.seeds(5, "pretrained") == [0, 1, 2]

    def test_runs_at_other_rates_are_refused(self, results: Results, tmp_path: Path) -> None:
        work, record = Work(tmp_path / "another machine"), self.record("pretrained", 5, 2)
        for file in (work.prepared_file, work.settings_file):
            file.parent.mkdir(exist_ok=True)
            file.write_text("{}")
        for changed in ({"peak_rates": {"decoder": 0.003, "stem": 0.003}}, {"recipe": {"seed": 2, "batch_size": 4}}):
            self.keep(work, "pretrained_5_2", record | changed)
            with pytest.raises(ValueError, match="pretrained were trained by different recipes or rates: .*seed 2"):
                collect(work, results.folder)
        # layer_decay is compared by the rates it gave
        self.keep(work, "pretrained_5_2", record | {"recipe": {"seed": 2, "layer_decay": None}})
        collect(work, results.folder)
        assert results.seeds(5, "pretrained") == [0, 1, 2]
        assert json.loads((results.folder / "recipes" / "pretrained.json").read_text())["peak_rates"]["stem"] == 2.3e-5

    def test_results_that_know_less_of_their_runs_stay(self, results: Results, tmp_path: Path) -> None:
        file = results.folder / "runs.csv"
        rows = [{key: value for key, value in row.items() if key != "trained by"} for row in results.rows("runs")]
        write_csv(file, rows)
        work = Work(tmp_path / "another machine")
        self.keep(work, "scratch_5_2", self.record("scratch", 5, 2))
        for source in (work.prepared_file, work.settings_file):
            source.write_text("{}")
        collect(work, results.folder)
        known = {(row["arm"], row["seed"]): bool(row["trained by"]) for row in results.rows("runs")}
        assert known[("scratch", "2")] and not known[("scratch", "1")] and len(known) == 7

    def test_tables(self, results: Results) -> None:
        assert "| pre-trained | 63.5 (63.0 to 64.0), 2 | 63.5 (63.0 to 64.0), 2 | 59.5 (59.0 to 60.0), 2 |" in TABLES[
            "dice"
        ](results)
        assert "| 5 | from scratch | 2 | +3.0 [+3.0, +3.0] |" in TABLES["differences"](results)
        assert "| 20 | from scratch | 2 | -1.0 [-1.0, -1.0] |" in TABLES["differences"](results)
        steps = TABLES["steps"](results).splitlines()[2:]
        # the mean of epochs 3 to 7 is the first above 60 (of 61 with the other seed)
        assert steps[1] == "| 5 | 112 | 44%, 44% | +0.0 | yes |"
        assert re.fullmatch(r"\| 10 \| 112 \| 38%, 38% \| \+6\.\d \| no \|", steps[2])
        assert steps[3] == "| 20 | 112 | never, never | +0.0 | yes |"
        assert "| 10 | 1 | 64.0 | 61.0 | 51.0 |" in TABLES["seeds"](results)
        goal = TABLES["goal"](results)
        assert "| 5 labels, 112 steps: +2.0 points or more | +3.0 | yes |" in goal
        rising = "not decided: scratch is not at its plateau"
        assert f"| 10 labels, 112 steps: +2.0 points or more | +3.0 | {rising} |" in goal
        in_half = "steps: scratch's final Dice in at most 50% of the steps (median of seeds)"
        assert f"| 5 labels, 112 {in_half} | 44% | yes |" in goal
        assert "| 20 labels, 112 steps: no loss | -1.0 | no |" in goal
        assert f"| 20 labels, 112 {in_half} | never | no |" in goal
        ablations = TABLES["ablations"](results)
        for row in (
            "| mask_ratio_0.5 | 5 | 2 | 62.5 (62.0 to 63.0) | brief_pretraining | +1.0 [+1.0, +1.0] |",
            "| layer_decay_1 | 5 | 2 | 61.0 (60.5 to 61.5) | pre-trained | -2.5 [-2.5, -2.5] |",
            "| half_the_steps_scratch | 5 | 2 | 55.5 (55.0 to 56.0) | from scratch | -5.0 [-5.0, -5.0] |",
        ):
            assert row in ablations
        lengths = TABLES["lengths"](results)
        assert "| 5 | 112 | 59.5 (59.0 to 60.0) | 55.5 (55.0 to 56.0) | +4.0, +4.0 | +4.0 [+4.0, +4.0] |" in lengths
        assert (
            "| 5 labels, 112 steps: trained half as long, no worse than scratch trained in full | -1.0 | no |" in goal
        )
        assert "| abc | 0 | 2 | a machine, 1 threads | 18 |" in TABLES["provenance"](results)

    def test_one_seed_of_longer_trainings(
        self, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        twice = {TWICE_THE_STEPS: 0.64, f"{TWICE_THE_STEPS}_scratch": 0.61}
        three_times = {THREE_TIMES_THE_STEPS: 0.64, f"{THREE_TIMES_THE_STEPS}_scratch": 0.63}
        monkeypatch.setattr(self, "FINAL", self.FINAL | twice | three_times)
        work = Work(tmp_path / "another machine")
        for arms, steps in ((twice, 240), (three_times, 352)):
            for arm in arms:
                self.keep(work, arm, self.record(arm, 5, 1) | {"steps": steps})
        for file in (work.prepared_file, work.settings_file):
            file.write_text("{}")
        collect(work, results.folder)
        goal = TABLES["goal"](results)
        assert "| 5 labels, 240 steps: +2.0 points or more | +3.0 (1 of 2 seeds) | yes |" in goal
        # against the pre-trained arm of half the steps, with the same seed
        half = "5 labels, 240 steps: trained half as long, no worse than scratch trained in full"
        assert f"| {half} | +2.0 (1 of 2 seeds) | yes |" in goal
        assert "| 5 labels, 352 steps: +2.0 points or more | +1.0 (1 of 2 seeds) | no |" in goal
        assert "5 labels, 352 steps: trained half as long" not in goal
        lengths = TABLES["lengths"](results)
        assert "| 5 | 240 | 65.0 (65.0 to 65.0) |" in lengths
        assert "| 5 | 352 | 65.0 (65.0 to 65.0) |" in lengths

    def test_the_table_of_changes(self, results: Results) -> None:
        rows = ["arm,labels,seed,layer,change"]
        for arm, change in (("pretrained", 0.1), (f"{HALF_THE_STEPS}_layer_decay_0.9", 0.4), ("mask_ratio_0.5", 0.2)):
            rows += [
                f"{arm},5,{seed},{layer},{change + 0.1 * seed}" for seed in (0, 1) for layer in ("stem", "stage 0")
            ]
        rows.append("pretrained,10,0,stem,0.9")
        (results.folder / "changes.csv").write_text("\n".join(rows) + "\n")
        assert TABLES["changes"](results).splitlines()[2:] == [
            "| pre-trained | 2 | 0.15 | 0.15 |",
            "| half_the_steps_layer_decay_0.9 | 2 | 0.45 | 0.45 |",
        ]

    def test_a_short_curve_says_nothing_of_a_plateau(self, results: Results) -> None:
        curves = results.folder / "curves.csv"
        header, *lines = curves.read_text().splitlines()
        epoch = header.split(",").index("epoch")
        curves.write_text("\n".join([header, *(line for line in lines if int(line.split(",")[epoch]) < 10)]))
        assert TABLES["steps"](results).splitlines()[2].endswith("| - | too few epochs |")

    def test_plot(self, results: Results, tmp_path: Path) -> None:
        plot(results, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 10_000

    def test_the_probe_of_the_pretraining(self, results: Results, tmp_path: Path) -> None:
        assert "| reference | 100 | 1.1 | 0.8 | 0.7500 | - | - |" in TABLES["pretraining"](results)
        rows = [row | {"probe": "0.5"} for row in results.rows("pretraining")]
        for name, before in (("without", None), ("with", 0.4)):
            plot_pretraining(rows, before, tmp_path / f"{name}.png")
        without_start, with_start = (imread(tmp_path / f"{name}.png") for name in ("without", "with"))
        assert without_start.shape == with_start.shape and (without_start != with_start).any()

    def test_the_mean_is_nnunets(self) -> None:
        assert mean_dice({"a": {"1": 0.5, "2": 0.7}, "b": {"1": 0.6, "2": 1.0}}) == pytest.approx(0.7)

    def test_nothing_to_collect(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="holds no finished run"):
            collect(Work(tmp_path), tmp_path / "results")


def test_the_change_of_a_layer_is_in_parts_of_what_it_was() -> None:
    names = [f"encoder.stages.1.{name}" for name in ("weight", "other.weight", "norm.weight")] + ["decoder.weight"]
    before = {name: torch.full((2, 2) if "norm" not in name else (2,), 2.0) for name in names}
    after = {name: tensor + 1 for name, tensor in before.items()} | {"encoder.stem.weight": torch.ones(1, 1)}
    after[names[1]] = before[names[1]]
    assert layer_changes(before, after) == {"stage 1": pytest.approx((4 / 32) ** 0.5)}


def test_the_tables_of_the_documents_are_current() -> None:
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    assert set(re.findall(r"<!-- results: (\S+) -->", "".join(texts))) == set(TABLES)
    for text in texts:
        assert with_results(text, Results(FOLDER)) == text
