"""Writes the results into the documentation: tables between the markers of both pages on results, and the plots."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks.few_labels.ablations import COMPARED_WITH, HALF_THE_STEPS, OF_ALL_LENGTHS
from benchmarks.few_labels.arms import ARMS, HYSPARK, REFERENCE, SPARK, STOCK
from benchmarks.few_labels.comparison import SMOOTHED_OVER, late_rise, paired_difference, share_to_reach, smoothed
from benchmarks.few_labels.results import FOLDER, Results
from benchmarks.few_labels.work import ROOT

DOCUMENTS = tuple(ROOT / "docs" / name for name in ("results.md", "results_appendix.md"))
IMAGES = ROOT / "docs" / "images"
# a table of the results, or of a folder in them
MARKER = re.compile(r"(<!-- results: (\w+)(?: of (\w+))? -->\n).*?(<!-- end -->)", flags=re.DOTALL)
# fine-tunings that differ in the learning rates of the encoder's layers and in their length
OF_LAYERS = re.compile(rf"pretrained|{HALF_THE_STEPS}|({HALF_THE_STEPS}_)?layer_decay_[\d.]+")
NAMES = {
    "pretrained": "HySparK, pre-trained",
    "scratch": "HySparK, from scratch",
    "spark_pretrained": "SparK, pre-trained",
    "spark_scratch": "SparK, from scratch",
    "stock": "stock nnU-Net",
}
COLOURS = dict(zip(NAMES, ("tab:blue", "tab:orange", "tab:green", "tab:red", "0.5"), strict=True))
PAIRS = [("pretrained", "scratch"), ("spark_pretrained", "spark_scratch")]
# scratch has reached its plateau where its smoothed curve rises by less in the last epochs
PLATEAU = 1.0
# an arm rests where twice the steps give less, in points of Dice
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


def dice_table(results: Results) -> str:
    """Mean and range over seeds, per arm and number of labels."""
    rows = [[NAMES[arm], *(_dice(results, arm, labels) for labels in results.labels)] for arm in _arms(results)]
    return markdown(["Dice, mean (range), seeds", *(f"{labels} labelled" for labels in results.labels)], rows)


def seed_table(results: Results) -> str:
    """The Dice of every seed, from which the means are computed."""
    arms = _arms(results)
    cells = results.runs[results.runs["arm"].isin(arms)].pivot(index=["labels", "seed"], columns="arm", values="dice")
    rows = [
        [*run, *("" if np.isnan(x) else f"{x:.1f}" for x in row)]
        for run, row in zip(cells.index, cells[arms].values, strict=True)
    ]
    return markdown(["labelled", "seed", *(NAMES[arm] for arm in arms)], rows)


def difference_table(results: Results) -> str:
    """Paired differences between the arms."""
    rows = [
        [labels, NAMES[first], NAMES[other], len(seeds), _difference(results, labels, first, other, seeds)]
        for labels in results.labels
        for first, scratch in PAIRS
        for other in (scratch, "stock")
        if (seeds := results.seeds(labels, first, other))
    ]
    return markdown(["labelled", "arm", "minus", "seeds", "difference [95 % interval]"], rows)


def cost_table(results: Results) -> str:
    """Dice and CPU time, the pre-training's share in it for one fine-tuning and for ten."""
    pretrainings, rows = results.table("pretrainings").set_index("weights"), []
    for arm in _arms(results):
        for (labels, steps), runs in results.runs[results.runs["arm"] == arm].groupby(["labels", "steps"]):
            before = pretrainings[pretrainings.index == runs["starts from"].iloc[0]]
            own = _minutes(runs["CPU seconds"])
            shared = _minutes(before["CPU seconds"]) if len(before) else 0
            minutes = ["" if np.isnan(m) else f"{m:.0f}" for m in (own, own + shared, own + shared / 10)]
            dice = f"{runs['dice'].mean():.1f}"
            rows.append(
                [NAMES[arm], labels, len(runs), *(before["steps"] if len(before) else [""]), steps, dice, *minutes]
            )
    columns = ["arm", "labelled", "seeds", "steps of pre-training", "steps", "Dice", "CPU minutes"]
    return markdown([*columns, "with pre-training", "with a tenth of it"], rows)


def steps_table(results: Results) -> str:
    """How soon the pre-trained arm reaches the final Dice of the others, and whether scratch is at its plateau."""
    rows = []
    for labels, steps, family, arms in _by_length(results):
        if seeds := results.seeds(labels, arms["pre-trained"], arms["scratch"]):
            reached = [_reached(results, labels, arms, other) for other in ("scratch", "stock")]
            rise = late_rise([results.curve(arms["scratch"], labels, seed)[1] for seed in seeds])
            plateau = ["", "too few epochs"] if np.isnan(rise) else [f"{rise:+.1f}", "yes" if rise < PLATEAU else "no"]
            rows.append([family, labels, steps, *reached, *plateau])
    columns = ["network", "labelled", "steps", "steps to scratch's final Dice, per seed", "to stock's"]
    return markdown([*columns, f"scratch in its last {SMOOTHED_OVER} epochs", "at its plateau"], rows)


def lengths_table(results: Results) -> str:
    """The gain over scratch and stock nnU-Net, for shorter and longer fine-tuning."""
    rows = []
    for labels, steps, family, arms in _by_length(results):
        dice = [_mean_and_range(results, labels, arm) for arm in arms.values()]
        gains = [_gain(results, labels, arms["pre-trained"], arms[other]) for other in ("scratch", "stock")]
        if any(gains):
            rows.append([family, labels, steps, *dice, *gains])
    columns = ["network", "labelled", "steps", "pre-trained", "from scratch", "stock nnU-Net", "gain over scratch"]
    return markdown([*columns, "over stock"], rows)


def rest_table(results: Results) -> str:
    """What twice the steps give each arm: below ``REST`` it was at rest."""
    rows = []
    for labels, steps, family, arms in _by_length(results):
        for start, arm in arms.items():
            longer = _arms_of(results, labels, 2 * steps, family)[start]
            seeds = results.seeds(labels, arm, longer)
            if seeds and not (start == "stock" and family == SPARK):  # once, although both families have it
                found = [results.dice(name, labels, seeds).mean() for name in (arm, longer)]
                rest = "yes" if found[1] - found[0] < REST else "no"
                name = STOCK if start == "stock" else f"{family}, {start}"
                rows.append([name, labels, len(seeds), steps, *(f"{x:.1f}" for x in found), rest])
    columns = ["arm", "labelled", "seeds", "steps", "Dice", "after twice the steps", "at rest"]
    return markdown(columns, rows)


def pretraining_table(results: Results) -> str:
    """What pre-training reached; the first results have a linear probe, too."""
    columns = ["pretraining", "steps", "first loss", "last loss", "loss of whole cases", "probe before", "last probe"]
    table = results.table("pretrainings")
    shown = table[table.columns.intersection(columns, sort=False)]
    return markdown(shown.columns, shown.values)


def ablation_table(results: Results) -> str:
    """Each ablation compared with the training that differs in one setting, on the same seeds and cases."""
    rows = []
    for arm, labels in dict.fromkeys(results.table("ablations")[["arm", "labels"]].itertuples(index=False, name=None)):
        seeds, reference = results.seeds(labels, arm), COMPARED_WITH[arm]
        shared = results.seeds(labels, arm, reference)
        difference = _difference(results, labels, arm, reference, shared) if shared else ""
        dice = _mean_and_range(results, labels, arm)
        rows.append([arm, labels, len(seeds), dice, NAMES.get(reference, reference), difference])
    columns = ["ablation", "labelled", "seeds", "Dice, mean over seeds (range)", "minus", "difference [95 % interval]"]
    return markdown(columns, rows)


def changes_table(results: Results) -> str:
    """How far each encoder layer moves in fine-tunings that differ only in the layers' learning rates."""
    table = results.table("changes")
    table = table[(table["labels"] == results.labels[0]) & table["arm"].map(OF_LAYERS.fullmatch).notna()]
    means = table.assign(change=table["change"].astype(float)).pivot_table("change", "arm", "layer", sort=False)
    seeds = table.groupby("arm")["seed"].nunique()
    rows = [
        [NAMES.get(arm, arm), seeds[arm], *(f"{x:.2f}" for x in row)]
        for arm, row in zip(means.index, means.values, strict=True)
    ]
    return markdown(["fine-tuning", "seeds", *means.columns], rows)


def provenance(results: Results) -> str:
    """Commits, versions and machines of the runs."""
    columns = ["commit", "hyspark_nnunet", "nnunetv2", "machine"]
    counted = results.table("runs").groupby(columns, sort=False).size()
    return markdown([*columns, "runs"], [[*key, n] for key, n in counted.items()])


TABLES: Mapping[str, Callable[[Results], str]] = {
    "dice": dice_table,
    "seeds": seed_table,
    "differences": difference_table,
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


def _minutes(seconds: "pd.Series[str]") -> float:
    """Mean of CPU times; NaN where a run does not know it."""
    return float(pd.to_numeric(seconds, errors="coerce").mean(skipna=False)) / 60


def _arms_of(results: Results, labels: int, steps: int, family: str) -> dict[str, str]:
    """The arms of a family and of stock nnU-Net with that length, "" where there is none."""
    runs = results.runs[(results.runs["labels"] == labels) & (results.runs["steps"] == steps)]
    found = {name: OF_ALL_LENGTHS[name] for name in runs["arm"] if name in OF_ALL_LENGTHS}
    kinds = {"pre-trained": (family, True), "scratch": (family, False), "stock": (STOCK, False)}
    return {
        kind: next((name for name, arm in found.items() if (arm.family, arm.pretraining is not None) == wanted), "")
        for kind, wanted in kinds.items()
    }


def _by_length(results: Results) -> Iterator[tuple[int, int, str, dict[str, str]]]:
    """Number of labels, steps, network and the arms with these; sorted."""
    lengths = results.runs[results.runs["arm"].isin(list(OF_ALL_LENGTHS))][["labels", "steps"]].drop_duplicates()
    for labels, steps in sorted(lengths.itertuples(index=False, name=None)):
        for family in (HYSPARK, SPARK):
            yield labels, steps, family, _arms_of(results, labels, steps, family)


def _reached(results: Results, labels: int, arms: Mapping[str, str], other: str) -> str:
    """Parts of the training after which the pre-trained curve reaches the end of the other's, per seed."""
    seeds = results.seeds(labels, arms["pre-trained"], arms[other])
    curves = [[results.curve(arms[name], labels, seed)[1] for name in ("pre-trained", other)] for seed in seeds]
    parts = [share_to_reach(pretrained, smoothed(other)[-1]) for pretrained, other in curves]
    return ", ".join(f"{part:.0%}" if np.isfinite(part) else "never" for part in parts)


def _gain(results: Results, labels: int, first: str, second: str) -> str:
    """The mean difference with its interval, and those of the seeds."""
    seeds = results.seeds(labels, first, second)
    if not seeds:
        return ""
    gains = results.dice(first, labels, seeds).mean(1) - results.dice(second, labels, seeds).mean(1)
    by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
    return f"{_difference(results, labels, first, second, seeds)}: {by_seed}"


def _difference(results: Results, labels: int, first: str, second: str, seeds: Sequence[int]) -> str:
    found = paired_difference(results.dice(first, labels, seeds), results.dice(second, labels, seeds))
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def _dice(results: Results, arm: str, labels: int) -> str:
    dice = _mean_and_range(results, labels, arm)
    return f"{dice}, {len(results.seeds(labels, arm))}" if dice else ""


def _mean_and_range(results: Results, labels: int, arm: str) -> str:
    """Over seeds; "" where there is none."""
    seeds = results.seeds(labels, arm)
    values = results.dice(arm, labels, seeds).mean(1) if seeds else []
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if seeds else ""


def plot(results: Results, path: Path) -> None:
    """Learning curves: the mean over seeds, in a band from the lowest to the highest seed."""
    arms, shown = _arms(results), results.labels
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), sharey=True, squeeze=False)
    for axis, labels in zip(axes[0], shown, strict=True):
        found = {arm: [results.curve(arm, labels, seed) for seed in results.seeds(labels, arm)] for arm in arms}
        for arm, curves in found.items():
            steps, values = curves[0][0] if curves else [], np.array([smoothed(curve) for _, curve in curves])
            if curves:
                axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[arm], alpha=0.15, linewidth=0)
            # without values, too: the legend names arms that are not finished
            axis.plot(steps, values.mean(0) if curves else [], color=COLOURS[arm], label=NAMES[arm])
        counts = sorted({len(curves) for curves in found.values()})
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
