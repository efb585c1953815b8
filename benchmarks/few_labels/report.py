"""Writes the results into the documentation: tables between the markers of both pages on results, and the plots."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks.few_labels.ablations import COMPARED_WITH, OF_ALL_LENGTHS
from benchmarks.few_labels.arms import ARMS, HYSPARK, REFERENCE, SPARK, STOCK
from benchmarks.few_labels.results import FOLDER, SMOOTHED_OVER, Results, bootstrap, late_rise, shares_to_reach
from benchmarks.few_labels.work import ROOT

DOCUMENTS = tuple(ROOT / "docs" / name for name in ("results.md", "results_appendix.md"))
IMAGES = ROOT / "docs" / "images"
# a table of the results, or of a folder in them
MARKER = re.compile(r"(<!-- results: (\w+)(?: of (\w+))? -->\n).*?(<!-- end -->)", flags=re.DOTALL)
# fine-tunings that differ in the learning rates of the encoder's layers and in their length
OF_LAYERS = r"pretrained|half_the_steps|(half_the_steps_)?layer_decay_[\d.]+"
NAMES = {
    "pretrained": "HySparK, pre-trained",
    "scratch": "HySparK, from scratch",
    "spark_pretrained": "SparK, pre-trained",
    "spark_scratch": "SparK, from scratch",
    "stock": "stock nnU-Net",
}
COLOURS = dict(zip(NAMES, ("tab:blue", "tab:orange", "tab:green", "tab:red", "0.5"), strict=True))
# scratch is at its plateau if its smoothed curve rises by less in the last epochs, in points of Dice
PLATEAU = 1.0
# an arm is at rest if twice the steps give less, in points of Dice
REST = 0.5


def with_results(text: str, folder: Path) -> str:
    """The document with the tables of the results.

    Raises:
        KeyError: a marker names no table.
    """
    return MARKER.sub(lambda m: m[1] + TABLES[m[2]](Results(folder / m[3] if m[3] else folder)) + m[4], text)


def markdown(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; "-" in empty cells."""
    head = list(columns)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) or '-' for cell in line)} |\n" for line in lines)


def seed_table(results: Results) -> str:
    """The Dice of every seed, from which the means are computed."""
    cells = results.table("runs").pivot(index=["labels", "seed"], columns="arm", values="dice")[_arms(results)]
    rows = [[*run, *(f"{dice:.1f}" for dice in row)] for run, row in zip(cells.index, cells.values, strict=True)]
    return markdown(["labelled", "seed", *map(NAMES.get, cells)], rows).replace(" nan ", " - ")


def cost_table(results: Results) -> str:
    """Dice and CPU time, the pre-training's share in it for one fine-tuning and for ten."""
    pretrainings, rows = results.table("pretrainings"), []
    for (arm, labels, steps), runs in results.table("runs").groupby(["arm", "labels", "steps"]):
        before = pretrainings[pretrainings["weights"] == runs["starts from"].iloc[0]]
        own, shared = _minutes(runs), _minutes(before) if len(before) else 0
        costs = [f"{cost:.0f}" for cost in (own, own + shared, own + shared / 10)]
        pretraining = before["steps"].iloc[0] if len(before) else ""
        rows.append([NAMES[arm], labels, len(runs), pretraining, steps, f"{runs['dice'].mean():.1f}", *costs])
    columns = ["arm", "labelled", "seeds", "steps of pre-training", "steps", "Dice", "CPU minutes"]
    return markdown([*columns, "with pre-training", "with a tenth of it"], rows).replace(" nan ", " - ")


def steps_table(results: Results) -> str:
    """How soon the pre-trained arm reaches the final Dice of the others, and whether scratch is at its plateau."""
    rows = []
    for (labels, steps, family), arms in _by_length(results).items():
        pretrained, *others = (results.curves(arm, labels) for arm in arms.values())
        if any(pretrained.columns.isin(others[0].columns)):
            shares = (shares_to_reach(pretrained, other) if len(other) else [] for other in others)
            reached = [", ".join(f"{share:.0%}" for share in found).replace("nan%", "never") for found in shares]
            rise = late_rise(others[0][others[0].columns.intersection(pretrained.columns)])
            plateau = ["", "too few epochs"] if np.isnan(rise) else [f"{rise:+.1f}", "yes" if rise < PLATEAU else "no"]
            rows.append([family, labels, steps, *reached, *plateau])
    columns = ["network", "labelled", "steps", "steps to scratch's final Dice, per seed", "to stock's"]
    return markdown([*columns, f"scratch in its last {SMOOTHED_OVER} epochs", "at its plateau"], rows)


def lengths_table(results: Results) -> str:
    """The gain over scratch and stock nnU-Net, for shorter and longer fine-tuning."""
    rows = []
    for (labels, steps, family), arms in _by_length(results).items():
        pretrained, *others = (results.dice(arm, labels) for arm in arms.values())
        gains = [_difference(pretrained, other, by_seed=True) for other in others]
        if any(gains):
            rows.append([family, labels, steps, *map(_mean_and_range, (pretrained, *others)), *gains])
    columns = ["network", "labelled", "steps", "pre-trained", "from scratch", "stock nnU-Net", "gain over scratch"]
    return markdown([*columns, "over stock"], rows)


def rest_table(results: Results) -> str:
    """What twice the steps give each arm: below ``REST`` it was at rest."""
    rows, lengths = {}, _by_length(results)
    for (labels, steps, family), arms in lengths.items():
        for start, arm in arms.items():
            longer = lengths.get((labels, 2 * steps, family), {}).get(start, "")
            short, long = results.dice(arm, labels), results.dice(longer, labels)
            if seeds := sorted({*short.index} & {*long.index}):
                before, after = (dice.loc[seeds].to_numpy().mean() for dice in (short, long))
                name, rest = STOCK if start == "stock" else f"{family}, {start}", after - before < REST
                found = [f"{before:.1f}", f"{after:.1f}", "yes" if rest else "no"]
                rows[name, labels, steps] = [name, labels, len(seeds), steps, *found]  # stock is in both families
    columns = ["arm", "labelled", "seeds", "steps", "Dice", "after twice the steps", "at rest"]
    return markdown(columns, rows.values())


def pretraining_table(results: Results) -> str:
    """What pre-training reached; the first results have a linear probe, too."""
    columns = ["pretraining", "steps", "first loss", "last loss", "loss of whole cases", "probe before", "last probe"]
    shown = results.table("pretrainings").filter(columns)
    return markdown(shown, shown.values)


def ablation_table(results: Results) -> str:
    """Each ablation compared with the training that differs in one setting, on the same seeds and cases."""
    rows = []
    for arm, labels in results.table("ablations")[["arm", "labels"]].drop_duplicates().itertuples(index=False):
        dice, other = results.dice(arm, labels), COMPARED_WITH[arm]
        difference = _difference(dice, results.dice(other, labels))
        rows.append([arm, labels, len(dice), _mean_and_range(dice), NAMES.get(other, other), difference])
    columns = ["ablation", "labelled", "seeds", "Dice, mean over seeds (range)", "minus", "difference [95 % interval]"]
    return markdown(columns, rows)


def changes_table(results: Results) -> str:
    """How far each encoder layer moves in fine-tunings that differ only in the layers' learning rates."""
    table = results.table("changes").astype({"change": float})
    table = table[(table["labels"] == table["labels"].min()) & table["arm"].str.fullmatch(OF_LAYERS)]
    means = table.pivot_table("change", "arm", "layer", sort=False)
    seeds = table.groupby("arm")["seed"].nunique()
    rows = [[NAMES.get(arm, arm), seeds[arm], *(f"{x:.2f}" for x in row)] for arm, row in means.T.items()]
    return markdown(["fine-tuning", "seeds", *means], rows)


def provenance(results: Results) -> str:
    """Commits, versions and machines of the runs."""
    columns = ["commit", "hyspark_nnunet", "nnunetv2", "machine"]
    counted = results.table("runs").groupby(columns, sort=False).size()
    return markdown([*columns, "runs"], [[*key, n] for key, n in counted.items()])


TABLES: Mapping[str, Callable[[Results], str]] = {
    "seeds": seed_table,
    "costs": cost_table,
    "steps": steps_table,
    "lengths": lengths_table,
    "rest": rest_table,
    "pretraining": pretraining_table,
    "ablations": ablation_table,
    "changes": changes_table,
    "provenance": provenance,
}


def _arms(results: Results) -> list[str]:
    return [arm for arm in ARMS if arm in set(results.runs["arm"])]


def _minutes(runs: pd.DataFrame) -> float:
    """Mean CPU time; NaN where a run does not know it."""
    return float(pd.to_numeric(runs["CPU seconds"], errors="coerce").mean(skipna=False)) / 60


def _by_length(results: Results) -> dict[tuple[int, int, str], dict[str, str]]:
    """By number of labels, steps and network, the arms with these; "" if there is none."""
    runs, lengths = results.runs[results.runs["arm"].isin(list(OF_ALL_LENGTHS))], {}
    for (labels, steps), found in runs.groupby(["labels", "steps"])["arm"]:
        names = {(OF_ALL_LENGTHS[name].family, OF_ALL_LENGTHS[name].pretraining is None): name for name in found}
        for family in (HYSPARK, SPARK):
            kinds = {"pre-trained": (family, False), "scratch": (family, True), "stock": (STOCK, True)}
            lengths[labels, steps, family] = {kind: names.get(key, "") for kind, key in kinds.items()}
    return lengths


def _difference(first: pd.DataFrame, second: pd.DataFrame, by_seed: bool = False) -> str:
    """The mean difference with its interval, over the seeds that both have; then, if asked for, those of the seeds."""
    found = (first - second).dropna(how="all")
    if found.empty:
        return ""
    mean, low, high = bootstrap(found.to_numpy())
    seeds = f": {', '.join(f'{gain:+.1f}' for gain in found.mean(axis=1, skipna=False))}" if by_seed else ""
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{seeds}"


def _mean_and_range(dice: pd.DataFrame) -> str:
    """Over seeds; "" where there is none."""
    seeds = dice.mean(axis=1, skipna=False)
    return f"{seeds.mean():.1f} ({seeds.min():.1f} to {seeds.max():.1f})" if len(seeds) else ""


def plot(results: Results, path: Path) -> None:
    """Learning curves: the mean over seeds, in a band from the lowest to the highest seed."""
    shown = sorted(set(results.runs["labels"]))
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), sharey=True, squeeze=False)
    for axis, labels in zip(axes[0], shown, strict=True):
        found = {arm: results.curves(arm, labels) for arm in _arms(results)}
        for arm, curves in found.items():
            low, high = curves.min(axis=1), curves.max(axis=1)
            axis.fill_between(curves.index, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            axis.plot(curves.mean(axis=1), color=COLOURS[arm], label=NAMES[arm])
        counts = sorted({len(curves.columns) for curves in found.values()})
        seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        axis.set_title(f"{labels} labelled cases; {seeds} per arm", fontsize=10)
    axes[0][0].set_ylabel("Dice of validation patches, points")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    _save(figure, "steps", path)


def plot_pretraining(results: Results, path: Path) -> None:
    """The losses of the benchmark's pre-training, and the linear probe that the first results have."""
    rows = results.table("pretraining").query("pretraining == @REFERENCE.name").set_index("steps")
    starts = results.table("pretrainings").set_index("pretraining")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    losses = rows[["train_loss", "val_loss"]].astype(float)
    losses.set_axis(["training", "fixed patches and masks"], axis=1).plot(ax=left, ylabel="reconstruction loss")
    pd.to_numeric(rows["probe"]).dropna().plot(ax=right, marker=".", label="", ylabel="Dice of the linear probe")
    start = float(starts.loc[REFERENCE.name, "probe before"])
    right.axhline(start, color="0.5", linestyle="--", linewidth=1, label="before the first step")
    right.legend(fontsize=8)
    _save(figure, "steps of pre-training", path)


def _save(figure: plt.Figure, label: str, path: Path) -> None:
    for axis in figure.axes:
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report() -> None:
    """Writes the tables and the plots."""
    for document in DOCUMENTS:
        document.write_text(with_results(document.read_text(encoding="utf-8"), FOLDER), encoding="utf-8")
        print(f"{document.relative_to(ROOT)} is written")
    plot(Results(FOLDER), IMAGES / "few_labels.png")
    for file in FOLDER.glob("*/runs.csv"):
        plot(Results(file.parent), IMAGES / f"few_labels_{file.parent.name}.png")
    plot_pretraining(Results(FOLDER), IMAGES / "few_labels_pretraining.png")
