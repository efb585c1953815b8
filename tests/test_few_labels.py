"""The parts of benchmarks/few_labels; its trainings run in test_few_labels_commands.py."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from benchmarks.few_labels.__main__ import main
from benchmarks.few_labels.ablations import ABLATIONS, COMPARED_WITH
from benchmarks.few_labels.arms import ARMS, REFERENCE, STOCK, Run
from benchmarks.few_labels.collect import collect
from benchmarks.few_labels.prepare import STOCK_PLANS, dice_of_resampled_labels, spacing_of_files, with_patch_and_batch
from benchmarks.few_labels.record import dice_of, digest_of, layer_changes
from benchmarks.few_labels.report import DOCUMENTS, TABLES, plot, plot_pretraining, with_results
from benchmarks.few_labels.results import FOLDER, Results, bootstrap, late_rise, shares_to_reach
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import MAX_SEEDS, Splits
from benchmarks.few_labels.training import finetune, fold_folder, pretraining_folder, write_plans
from benchmarks.few_labels.work import PLUGINS, TRAINERS, CommandFailed, Work
from hyspark_nnunet.recipe.recipe import RECIPES
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.runtime.randomness import seed_generators
from tests.nnunet_plans import CUBIC, DATASET_JSON, make_plans

LABELS = (3, 5)


def write_splits(file: Path, **changed: list[str]) -> Path:
    """Splits of nine cases of ``tests.nnunet_cases.write_balls``."""
    cases = [f"ball_{number}" for number in range(9)]
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
        with pytest.raises(ValueError, match=r"no fold has 7 labels: splits\.json has 3, 5"):
            splits.fold(7, 0)

    @pytest.mark.parametrize(
        ("changed", "fault"),
        [
            ({"pretrain": ["ball_7"]}, "ball_7 is in pretrain and in validation"),
            ({"validation": ["ball_6"]}, "ball_6 is in labelled_5 and in validation"),
            ({"labelled_3": ["ball_0", "ball_3", "ball_4"]}, "labelled_5 lacks ball_0: the lists must be nested"),
            ({"labelled_3": ["ball_3"]}, "labelled_3 has 1 cases"),
            ({"validation": []}, "has no validation"),
        ],
    )
    def test_lists_that_do_not_fit_are_refused(self, changed: Any, fault: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=fault):
            Splits.read(write_splits(tmp_path / "splits.json", **changed))


class TestComparison:
    def test_the_interval_is_that_of_the_known_standard_errors(self) -> None:
        of_cases = np.random.default_rng(1).normal(0, 6, 400)
        mean, low, high = bootstrap(np.tile(of_cases, (3, 1)))
        # seeds agree: only the draw of cases counts, 1.96 standard errors to either side
        assert [high - mean, mean - low] == pytest.approx([1.96 * of_cases.std() / 20] * 2, rel=0.06)
        # cases agree: all draws of three seeds, of which one in 27 is three times the lowest
        widest = 3 * np.sqrt(3 / 2)
        assert bootstrap(np.array([[-3.0], [0.0], [3.0]]) + np.zeros((3, 400)))[1:] == pytest.approx((-widest, widest))

    def test_curves(self) -> None:
        curves = pd.DataFrame({0: [10.0 * epoch for epoch in range(12)], 1: [50.0] * 12})
        found = shares_to_reach(curves, pd.DataFrame({1: [0, 50.1], 0: [100, 50], 2: [0, 0]}))
        assert found == pytest.approx([0.5, np.nan], nan_ok=True)
        assert late_rise(curves[[0]]) == 50 and late_rise(curves) == 25 and np.isnan(late_rise(curves[:9]))


class TestCommandLine:
    def test_the_first_command_fixes_the_settings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["prepare", "--data", "nowhere", "--work", str(tmp_path)]
        no_data = "nowhere/splits.json: --data is a dataset in nnU-Net's raw layout with splits.json"
        for more, fault in (
            (["--finetune-epochs", "7"], no_data),
            (["--finetune-epochs", "8"], "was begun with finetune_epochs 7, not 8"),
            ([], no_data),
        ):
            assert main([*words, *more]) == 1 and fault in capsys.readouterr().err
        assert json.loads((tmp_path / "settings.json").read_text())["finetune_epochs"] == 7

    @pytest.fixture
    def words(self, tmp_path: Path) -> list[str]:
        """Words of a command on a prepared work folder."""
        work = Work(tmp_path / "work")
        for folder in (work.root, tmp_path / "data"):
            folder.mkdir()
            write_splits(folder / "splits.json")
        work.prepared_file.write_text("{}")
        return ["run", "--work", str(work.root), "--data", str(tmp_path / "data"), "--labels", "3", "--arms"]

    def test_a_pretraining_is_tried_once_before_the_first_run_that_needs_it(
        self, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[str] = []

        def fail(work: Work, name: str, *_: Any) -> None:
            begun.append(name)
            raise CommandFailed(f"{name}: the disk is full")

        monkeypatch.setattr(Work, "run", fail)
        assert main([*words, "stock", "pretrained", "--seeds", "1", "0"]) == 1
        assert begun == ["stock_labels3_seed1", REFERENCE.run, "stock_labels3_seed0"]
        printed = capsys.readouterr().err
        assert printed.startswith("\n4 failed:") and "pretrain_reference: the disk is full" in printed
        assert re.search("pretrained_labels3_seed0 starts from .*, which is not finished: see .*reference", printed)

    def test_another_benchmark_has_the_run_or_the_folder(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        work = Work(tmp_path / "work")
        with work.alone("scratch_labels3_seed1"):
            assert main([*words, "scratch", "--seeds", "1"]) == 0
        assert "scratch_labels3_seed1: another benchmark runs it" in capsys.readouterr().out
        write_splits(work.splits_file, pretrain=["ball_0"])
        assert main([*words, "scratch"]) == 1 and "was begun with another splits.json" in capsys.readouterr().err


class TestWork:
    def test_environment_log_and_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        work = Work(tmp_path)
        monkeypatch.setenv("HYSPARK_NUM_EPOCHS", "9")
        code = "import os, json; sum(range(10**7)); print(json.dumps(dict(os.environ)))"
        work.run("a", (sys.executable, "-c", code), {"HYSPARK_SEED": "1"}, arm="scratch")
        command, printed = work.log("a").read_text().strip().splitlines()
        assert command.startswith(f"$ HYSPARK_SEED=1 {sys.executable} -c ")
        found = json.loads(printed)
        assert {name: found[name] for name in found if name.startswith("HYSPARK_")} == {"HYSPARK_SEED": "1"}
        assert found["nnUNet_results"] == str(work.results("scratch"))
        assert found["nnUNet_extTrainer"].split(":")[:2] == [str(TRAINERS), str(PLUGINS)]
        # a program beside this Python
        with pytest.raises(CommandFailed, match=r"a: python ended with 3\. [\s\S]*here$"):
            work.run("a", ("python", "-c", "print('here'); raise SystemExit(3)"), {})
        seconds = [float(line) for line in work.cpu_seconds("a").read_text().split()]
        assert len(seconds) == 2 and 0.05 < seconds[0] < 60

    def test_one_benchmark_at_a_run(self, tmp_path: Path) -> None:
        work = Work(tmp_path)
        with work.alone("a") as lock, work.alone("a") as second, work.alone("b") as other:
            assert lock is not None and second is None and other is not None
            # loader processes of nnU-Net's own trainer, when a signal ends it, must not hold the run
            code = "import subprocess, sys; subprocess.Popen(['sleep', '60'], close_fds=False)"
            work.run("a", (sys.executable, "-c", code), {}, lock=lock)
        deadline, free = time.monotonic() + 60, False
        while not free and time.monotonic() < deadline:
            with work.alone("a") as again:
                free = again is not None
        assert free


def test_a_training_goes_on_from_where_its_folder_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, settings, run, started = Work(tmp_path), Settings(), Run(ARMS["pretrained"], 5, 1, fold=11), []

    def begin(work: Work, name: str, command: Any, *_: Any) -> None:
        started.append(" ".join(command))
        work.log(name).touch()

    monkeypatch.setattr(Work, "run", begin)
    work.record(REFERENCE.run).parent.mkdir()
    work.record(REFERENCE.run).touch()
    folder = fold_folder(work, settings, run)
    folder.mkdir(parents=True)
    weights = pretraining_folder(work, settings, REFERENCE) / "checkpoint_final.pth"
    for checkpoint, end in (
        ("nothing", f" -pretrained_weights {weights}"),
        ("checkpoint_best.pth", "-device cpu --c"),
        ("checkpoint_final.pth", "-device cpu --val"),
    ):
        (folder / checkpoint).touch()
        with pytest.raises(CommandFailed, match="ended before its end; the same command continues it"):
            finetune(work, settings, run)
        assert started[-1].endswith(end)
    trainer = "-tr HySparKFinetuneTrainer -p nnUNetHySparKSPlans -device cpu "
    assert f" Dataset001_Labelled 3d_fullres 11 {trainer}" in started[0]
    work.record(run.name).touch()
    finetune(work, settings, run)
    assert len(started) == 3 and capsys.readouterr().out.endswith("already finished\n")


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_in_one_thing_and_its_recipe_is_valid(name: str) -> None:
    arm, against, settings = ABLATIONS[name], (ARMS | ABLATIONS)[COMPARED_WITH[name]], Settings()
    assert (arm.name, arm.family) == (name, against.family)
    assert (arm.pretraining is None) == (against.pretraining is None)
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


class TestPlans:
    @pytest.mark.parametrize(("side", "spacing", "expected"), [(8, (1, 1, 1), 1.0), (2, (2, 2, 2), 0.0)])
    def test_what_a_spacing_costs(self, side: int, spacing: tuple[int, ...], expected: float, tmp_path: Path) -> None:
        label, file = np.zeros((16, 16, 16), np.uint8), tmp_path / "case.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(label), str(file))
        with pytest.raises(ValueError, match=r"no label in .*case\.nii\.gz: choose validation cases with labels"):
            dice_of_resampled_labels([file], spacing)
        label[4 : 4 + side, 5 : 5 + side, 5 : 5 + side] = 1
        sitk.WriteImage(sitk.GetImageFromArray(label), str(file))
        assert dice_of_resampled_labels([file], spacing) == pytest.approx(expected, abs=0.01)

    def test_the_spacing_of_the_files_is_that_of_the_plan_before_its_transposition(self) -> None:
        # the third axis of the files is the first of the plan
        plans = make_plans([16] * 3, CUBIC, spacing=[3, 1, 2]) | {"transpose_forward": [2, 0, 1]}
        assert spacing_of_files(plans | {"transpose_backward": [1, 2, 0]}) == [1, 2, 3]

    def test_a_network_with_other_arguments_has_plans_of_its_own(self, tmp_path: Path) -> None:
        plans, ours = make_plans([16, 16, 16], CUBIC), tmp_path / "nnUNetHySparKSPlans.json"
        ours.write_text(json.dumps(plans))
        for name in ("scratch", "without_vit"):
            write_plans(tmp_path, (ARMS | ABLATIONS)[name], Settings())
        name = "nnUNetHySparKSPlans_vit_n_blocks_0"
        assert {*tmp_path.iterdir()} == {ours, tmp_path / f"{name}.json"} and json.loads(ours.read_text()) == plans
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].pop("vit_n_blocks") == 0
        assert found == plans | {"plans_name": name}

    def test_stock_plans_have_our_data_patch_and_batch(self) -> None:
        stock, ours = make_plans([32, 32, 32], CUBIC), make_plans([40, 56, 40], CUBIC, data_identifier="ours")
        found, before = with_patch_and_batch(stock, ours, batch=3), make_plans([32, 32, 32], CUBIC)
        names = {found["plans_name"], *(ARMS[name].plans(Settings()) for name in ("stock", "spark_scratch"))}
        assert names == {STOCK_PLANS} and stock == before
        changed = {"patch_size": [40, 56, 40], "batch_size": 3, "data_identifier": "ours"}
        assert found["configurations"]["3d_fullres"] == stock["configurations"]["3d_fullres"] | changed
        with pytest.raises(ValueError, match=r"\[32, 36, 32\] is no multiple of the strides \[8, 8, 8\]"):
            with_patch_and_batch(stock, make_plans([32, 36, 32], CUBIC), 2)
        with pytest.raises(ValueError, match=r"spacing \[1, 1, 2\], ours .*: arms must train on the same data"):
            with_patch_and_batch(make_plans([32] * 3, CUBIC, spacing=[1, 1, 2]), ours, 2)


@pytest.mark.parametrize(("width", "expected"), [(96, 96), (0, None)])
def test_the_width_of_the_decoder_is_a_setting_or_the_presets(width: int, expected: int | None) -> None:
    variables = REFERENCE.variables(Settings(pretrain_decoder_width=width))
    assert resolve_recipe(RECIPES["pretrain"], None, variables).as_dict()["decoder_width"] == expected


def test_the_stock_trainer_is_nnunets_at_our_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(finetune_epochs=7, finetune_iterations=3, finetune_val_iterations=15, save_every=5)
    for name, value in Work(tmp_path).environment("stock", ARMS["stock"].variables(settings, seed=4)).items():
        monkeypatch.setenv(name, value)
    found = recursive_find_trainer_class_by_name(ARMS["stock"].trainer)
    trainer = found(make_plans([16] * 3, CUBIC), "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    monkeypatch.setattr(nnUNetTrainer, "initialize", lambda self: None)  # which asks for data
    trainer.initialize()
    lengths = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every")
    assert [getattr(trainer, name) for name in lengths] == [7, 3, 15, 5]

    # the crops of an epoch are those of our trainers with the same seed, whatever was drawn before
    drawn = []
    trainer.network = torch.nn.Conv3d(1, 2, 1)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    for _ in range(2):
        trainer.on_train_epoch_start()
        drawn.append((np.random.rand(), torch.rand(1).item()))
    seed_generators(4, 0, 0, masks=torch.Generator())
    assert drawn == [(np.random.rand(), torch.rand(1).item())] * 2


class TestReport:
    """Synthetic records: pre-trained is 3 points better; with 5 labels, scratch rises to the end."""

    EPOCHS = 16
    FINAL = {"pretrained": 0.63, "scratch": 0.60, "stock": 0.5, "half_the_steps": 0.59}

    def keep(self, work: Work, arm: str, labels: int, seed: int, **changed: Any) -> None:
        final, about = self.FINAL[arm] + 0.01 * seed, {"arm": arm, "labels": labels, "seed": seed}
        rise = np.linspace(0.4, final, 4 if arm == "pretrained" else self.EPOCHS if labels == 5 else 6).tolist()
        curve = [
            {**about, "epoch": epoch, "steps": 7 * epoch, "val_dice": value}
            for epoch, value in enumerate(rise + [final] * (self.EPOCHS - len(rise)), start=1)
        ]
        steps = 56 if arm == "half_the_steps" else 112
        row = {**about, "dice": final, "steps": steps, "CPU seconds": 120.0, "commit": "c", "trained by": "5678"}
        row |= {"starts from": "" if arm in ("scratch", "stock") else "1234", **changed}
        cases = [{**about, "case": f"case_{n}", "dice": final + 0.001 * (n - 1.5)} for n in range(4)]
        tables = {"runs" if arm in ARMS else "ablations": [row], "cases": cases, "curves": curve}
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
        summary = {"pretraining": "reference", "epochs": 2, "steps": 100, "CPU seconds": 600, "weights": "1234"}
        self.write(work, REFERENCE.run, REFERENCE.run, {"pretrainings": [summary]})
        assert collect(work, tmp_path / "results") == 15
        return Results(tmp_path / "results")

    def test_collect_beside_results_of_another_machine(self, results: Results, tmp_path: Path) -> None:
        runs = results.table("runs")
        assert runs["arm"].tolist() == ["pretrained"] * 4 + ["scratch"] * 4 + ["stock"] * 4
        assert results.table("cases")["arm"].unique().tolist() == ["pretrained", "scratch", "stock", "half_the_steps"]
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
        assert both.dice("scratch", 5).index.tolist() == [0, 1, 2]
        assert both.curves("scratch", 5).shape == (self.EPOCHS, 3)
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
        assert results.table("runs").query("arm == 'pretrained' and labels == 5")["seed"].tolist() == [0, 1, 2]
        with pytest.raises(FileNotFoundError, match="holds no finished run"):
            collect(Work(tmp_path), tmp_path)

    @pytest.mark.parametrize(
        ("table", "row"),
        [
            ("costs", "| HySparK, pre-trained | 3 | 2 | 100 | 112 | 63.5 | 2 | 12 | 3 |"),
            # the mean of epochs 3 to 7 is the first above 60 (of 61 with the other seed)
            ("steps", "| HySparK | 3 | 112 | 44%, 44% | 25%, 25% | +0.0 | yes |"),
            (
                "lengths",
                "| HySparK | 3 | 112 | 63.5 (63.0 to 64.0) | 60.5 (60.0 to 61.0) | 50.5 (50.0 to 51.0) "
                "| +3.0 [+3.0, +3.0]: +3.0, +3.0 | +13.0 [+13.0, +13.0]: +13.0, +13.0 |",
            ),
        ],
    )
    def test_tables(self, table: str, row: str, results: Results) -> None:
        assert row in TABLES[table](results).splitlines()

    def test_what_is_not_known_is_not_in_the_tables(self, results: Results) -> None:
        curves, runs = (results.folder / f"{name}.csv" for name in ("curves", "runs"))
        header, *lines = curves.read_text().splitlines()
        curves.write_text("\n".join([header, *(line for line in lines if int(line.split(",")[3]) < 10)]))
        # fewer epochs than a plateau takes, no time of one run, another seed
        assert TABLES["steps"](results).splitlines()[2].endswith("| - | too few epochs |")
        text = runs.read_text().replace("scratch,3,1,", "scratch,3,2,")
        runs.write_text(re.sub(r"(stock,5,1,.*),120\.0,", r"\1,,", text))
        assert "| stock nnU-Net | 5 | 2 | - | 112 | 50.5 | - | - | - |" in TABLES["costs"](results)
        assert "| 3 | 1 | 64.0 | - | 51.0 |" in TABLES["seeds"](results)

    def test_plots_and_a_document(self, results: Results, tmp_path: Path) -> None:
        plot(results, tmp_path / "curves.png")
        plot_pretraining(Results(FOLDER), tmp_path / "pretraining.png")
        assert min((tmp_path / f"{name}.png").stat().st_size for name in ("curves", "pretraining")) > 10_000
        text = with_results("<!-- results: seeds of results -->\nold\n<!-- end -->", tmp_path)
        assert "| 5 | 1 | 64.0 |" in text and "old" not in text


def test_what_a_run_keeps(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    dice = {"b": {"2": {"Dice": 0.5}, "1": {"Dice": 0.7}}, "a.1": {"2": {"Dice": 0.5}, "1": {"Dice": float("nan")}}}
    scores = [{"prediction_file": f"/x/{case}.nii.gz", "metrics": metrics} for case, metrics in dice.items()]
    summary = tmp_path / "fold_0" / "validation" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"metric_per_case": scores}))
    found = dice_of(tmp_path / "fold_0", ["a.1", "b"])
    assert found.index.tolist() == ["a.1", "b"] and found.columns.tolist() == ["dice", "dice_1", "dice_2"]
    assert found.to_numpy().ravel() == pytest.approx([np.nan, np.nan, 0.5, 0.6, 0.7, 0.5], nan_ok=True)
    with pytest.raises(
        ValueError, match=r"scores of a\.1, b, but splits\.json names b for validation: remove .*fold_0"
    ):
        dice_of(tmp_path / "fold_0", ["b"])

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
