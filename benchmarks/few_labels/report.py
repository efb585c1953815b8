"""Writes the results into the documentation: tables between the markers of both pages on results, and the plots."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.few_labels.ablations import (
    HALF_THE_STEPS,
    SCRATCH,
    THREE_TIMES_THE_STEPS,
    TWICE_THE_STEPS,
    compared_with,
)
from benchmarks.few_labels.arms import ARMS, REFERENCE
from benchmarks.few_labels.comparison import (
    SMOOTHED_OVER,
    Difference,
    late_rise,
    paired_difference,
    share_to_reach,
    smoothed,
)
from benchmarks.few_labels.results import FOLDER, Results, Row
from benchmarks.few_labels.work import ROOT

DOCUMENTS = tuple(ROOT / "docs" / name for name in ("results.md", "results_appendix.md"))
IMAGES = ROOT / "docs" / "images"
PLOT, PRETRAINING_PLOT = IMAGES / "few_labels.png", IMAGES / "few_labels_pretraining.png"
MARKER = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
# fine-tunings that differ in the learning rates of the encoder's layers and in their length
OF_LAYERS = re.compile(rf"({HALF_THE_STEPS}|({HALF_THE_STEPS}_)?layer_decay_[\d.]+)")
LABELS = (5, 10, 20)
NOT_RUN = "*Not run yet.*\n"
NAMES = {
    "pretrained": "pre-trained",
    "scratch": "from scratch",
    "spark_pretrained": "SparK, pre-trained",
    "spark_scratch": "SparK, from scratch",
    "stock": "stock nnU-Net",
}
COLOURS = dict(zip(NAMES, ("tab:blue", "tab:orange", "tab:green", "tab:red", "0.5"), strict=True))

# pre-trained and from scratch, for each length of fine-tuning; the benchmark's default length first
Pair = tuple[str, str]
OWN_LENGTH: Pair = ("pretrained", "scratch")
HALF, TWICE, THREE_TIMES = ((name, name + SCRATCH) for name in (HALF_THE_STEPS, TWICE_THE_STEPS, THREE_TIMES_THE_STEPS))
LENGTHS: Sequence[Pair] = (OWN_LENGTH, HALF, TWICE, THREE_TIMES)
# lengths for which the goal is checked, each with the pair that trains half as long
GOAL_AT: Mapping[Pair, Pair | None] = {OWN_LENGTH: HALF, TWICE: OWN_LENGTH, THREE_TIMES: None}

# the goal of the benchmark, in Dice points and shares of the steps
GAIN, GAIN_AT = 2.0, (5, 10)
NO_LOSS_AT = 20
STEPS = 0.5
# scratch has reached its plateau where its smoothed curve rises by less in the last epochs
PLATEAU = 1.0


def with_results(text: str, results: Results) -> str:
    """The document with the tables of the results.

    Raises:
        KeyError: a marker names no table.
    """
    return MARKER.sub(lambda match: match[1] + TABLES[match[2]](results) + match[3], text)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or ``NOT_RUN`` if there are no rows."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" if rows else NOT_RUN


def dice_table(results: Results) -> str:
    """Mean and range over seeds, per arm and number of labels."""
    rows = []
    for arm in ARMS:
        cells = []
        for labels in LABELS:
            seeds = results.seeds(labels, arm)
            means = results.dice(arm, labels, seeds).mean(1) if seeds else np.array([])
            cells.append(f"{_mean_and_range(means)}, {len(seeds)}" if seeds else "")
        if any(cells):
            rows.append([NAMES[arm], *(cell or "-" for cell in cells)])
    return markdown(["Dice, mean (range), seeds", *(f"{labels} labelled" for labels in LABELS)], rows)


def seed_table(results: Results) -> str:
    """The Dice of every seed, from which the means are computed."""
    rows = []
    arms = [arm for arm in ARMS if any(results.seeds(labels, arm) for labels in LABELS)]
    for labels in LABELS:
        found = {arm: results.seeds(labels, arm) for arm in arms}
        for seed in sorted(set().union(*found.values())):
            cells = [
                f"{results.dice(arm, labels, [seed]).mean():.1f}" if seed in seeds else "-"
                for arm, seeds in found.items()
            ]
            rows.append([str(labels), str(seed), *cells])
    return markdown(["labelled", "seed", *(NAMES[arm] for arm in arms)], rows)


def difference_table(results: Results) -> str:
    """Paired differences between the arms."""
    rows = []
    for labels in LABELS:
        for other in ("scratch", "stock"):
            seeds = results.seeds(labels, "pretrained", other)
            if seeds:
                found = _difference(results, labels, "pretrained", other, seeds)
                rows.append([str(labels), NAMES[other], str(len(seeds)), _interval(found)])
    return markdown(["labelled", "pre-trained minus", "seeds", "difference [95 % interval]"], rows)


def steps_table(results: Results) -> str:
    """How soon the pre-trained arm reaches scratch's final Dice, and whether scratch has reached its plateau."""
    rows = []
    for labels, steps, pair, seeds in _by_length(results, LENGTHS):
        shares = [f"{share:.0%}" if np.isfinite(share) else "never" for share in _shares(results, labels, seeds, pair)]
        rise = _scratch_rise(results, labels, seeds, pair)
        plateau = ["-", "too few epochs"] if np.isnan(rise) else [f"{rise:+.1f}", "yes" if rise < PLATEAU else "no"]
        rows.append([str(labels), str(steps), ", ".join(shares), *plateau])
    columns = [
        "labelled",
        "steps",
        "steps to scratch's final Dice, per seed",
        f"scratch in its last {SMOOTHED_OVER} epochs",
        "at its plateau",
    ]
    return markdown(columns, rows)


def goal_table(results: Results) -> str:
    """The goal, number by number."""
    rows = []
    for labels, steps, pair, seeds in _by_length(results, tuple(GOAL_AT)):
        where = f"{labels} labels, {steps} steps"
        found = _difference(results, labels, *pair, seeds)
        if labels in GAIN_AT:
            plateau = _scratch_rise(results, labels, seeds, pair) < PLATEAU
            met = found.mean >= GAIN
            verdict = "no" if not met else "yes" if plateau else "not decided: scratch is not at its plateau"
            rows.append(
                [f"{where}: {GAIN:+.1f} points or more", f"{found.mean:+.1f}{_of_all(results, labels, seeds)}", verdict]
            )
        if labels == NO_LOSS_AT:
            verdict = "yes" if found.mean >= 0 else "no, but within the interval" if found.high >= 0 else "no"
            rows.append([f"{where}: no loss", f"{found.mean:+.1f}{_of_all(results, labels, seeds)}", verdict])
        share = float(np.median(_shares(results, labels, seeds, pair)))
        measured = f"{share:.0%}" if np.isfinite(share) else "never"
        rows.append(
            [
                f"{where}: scratch's final Dice in at most {STEPS:.0%} of the steps (median of seeds)",
                measured + _of_all(results, labels, seeds),
                "yes" if share <= STEPS else "no",
            ]
        )
        shorter = GOAL_AT[pair]
        if shorter and (halved := results.seeds(labels, shorter[0], pair[1])):
            found = _difference(results, labels, shorter[0], pair[1], halved)
            goal = f"{where}: trained half as long, no worse than scratch trained in full"
            rows.append(
                [goal, f"{found.mean:+.1f}{_of_all(results, labels, halved)}", "yes" if found.mean >= 0 else "no"]
            )
    return markdown(["goal", "measured", "met"], rows)


def lengths_table(results: Results) -> str:
    """The gain from pre-training for shorter and longer fine-tuning."""
    rows = []
    for labels, steps, pair, seeds in _by_length(results, LENGTHS):
        dice = [results.dice(arm, labels, seeds) for arm in pair]
        means = [of_arm.mean(1) for of_arm in dice]
        by_seed = ", ".join(f"{gain:+.1f}" for gain in means[0] - means[1])
        difference = _interval(paired_difference(*dice))
        rows.append([str(labels), str(steps), *map(_mean_and_range, means), by_seed, difference])
    columns = ["labelled", "steps", "pre-trained", "from scratch", "difference per seed", "mean [95 % interval]"]
    return markdown(columns, rows)


def pretraining_table(results: Results) -> str:
    """What pre-training reached."""
    columns = ["pretraining", "steps", "first loss", "last loss", "loss of whole cases", "probe before", "last probe"]
    return markdown(columns, [[row.get(column) or "-" for column in columns] for row in results.rows("pretrainings")])


def ablation_table(results: Results) -> str:
    """Each ablation compared with the training that differs in one setting, on the same seeds and cases."""
    rows = []
    for name, labels in results.ablations():
        seeds = results.seeds(labels, name)
        reference = compared_with(name)
        shared = results.seeds(labels, name, reference)
        difference = _interval(_difference(results, labels, name, reference, shared)) if shared else "-"
        dice = _mean_and_range(results.dice(name, labels, seeds).mean(1))
        rows.append([name, str(labels), str(len(seeds)), dice, NAMES.get(reference, reference), difference])
    columns = ["ablation", "labelled", "seeds", "Dice, mean over seeds (range)", "minus", "difference [95 % interval]"]
    return markdown(columns, rows)


def changes_table(results: Results) -> str:
    """How far each encoder layer moves in fine-tunings that differ only in the layers' learning rates."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in results.rows("changes"):
        if int(row["labels"]) == LABELS[0] and (row["arm"] == "pretrained" or OF_LAYERS.fullmatch(row["arm"])):
            found.setdefault(row["arm"], {}).setdefault(row["layer"], []).append(float(row["change"]))
    layers = list(dict.fromkeys(layer for of_arm in found.values() for layer in of_arm))
    rows = [
        [NAMES.get(arm, arm), str(max(map(len, of_arm.values()))), *(f"{np.mean(of_arm[name]):.2f}" for name in layers)]
        for arm, of_arm in found.items()
    ]
    return markdown(["fine-tuning", "seeds", *layers], rows)


def provenance(results: Results) -> str:
    """Commits, versions and machines of the runs."""
    rows = results.rows("runs")
    columns = ["commit", "hyspark_nnunet", "nnunetv2", "machine"]
    counted = dict.fromkeys(tuple(row[column] for column in columns) for row in rows)
    return markdown(
        [*columns, "runs"],
        [[*key, str(sum(tuple(row[c] for c in columns) == key for row in rows))] for key in counted],
    )


TABLES: Mapping[str, Callable[[Results], str]] = {
    "goal": goal_table,
    "dice": dice_table,
    "seeds": seed_table,
    "differences": difference_table,
    "steps": steps_table,
    "lengths": lengths_table,
    "pretraining": pretraining_table,
    "ablations": ablation_table,
    "changes": changes_table,
    "provenance": provenance,
}


def _by_length(results: Results, pairs: Sequence[Pair]) -> list[tuple[int, int, Pair, list[int]]]:
    """Number of labels, steps, arms, and the seeds that both arms have finished; sorted."""
    found = [(labels, pair, results.seeds(labels, *pair)) for labels in LABELS for pair in pairs]
    return sorted(
        (labels, results.curve(pair[0], labels, seeds[0])[0][-1], pair, seeds) for labels, pair, seeds in found if seeds
    )


def _of_all(results: Results, labels: int, seeds: Sequence[int]) -> str:
    """The number of these seeds, if the benchmark has more."""
    everything = results.seeds(labels, *OWN_LENGTH)
    return "" if len(seeds) >= len(everything) else f" ({len(seeds)} of {len(everything)} seeds)"


def _difference(results: Results, labels: int, first: str, second: str, seeds: Sequence[int]) -> Difference:
    return paired_difference(results.dice(first, labels, seeds), results.dice(second, labels, seeds))


def _shares(results: Results, labels: int, seeds: Sequence[int], pair: Pair) -> list[float]:
    """Per seed, the share of the steps after which the pre-trained arm reaches scratch's final Dice."""
    curves = [[results.curve(arm, labels, seed)[1] for arm in pair] for seed in seeds]
    return [share_to_reach(pretrained, smoothed(scratch)[-1]) for pretrained, scratch in curves]


def _scratch_rise(results: Results, labels: int, seeds: Sequence[int], pair: Pair) -> float:
    return late_rise([results.curve(pair[1], labels, seed)[1] for seed in seeds])


def _interval(found: Difference) -> str:
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def _mean_and_range(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})" if len(values) else ""


def plot(results: Results, path: Path) -> None:
    """Learning curves: the mean over seeds, in a band from the lowest to the highest seed."""
    shown = [labels for labels in LABELS if any(results.seeds(labels, arm) for arm in ARMS)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), sharey=True, squeeze=False)
    for axis, labels in zip(axes[0], shown, strict=True):
        counts = []
        for arm in ARMS:
            curves = [results.curve(arm, labels, seed) for seed in results.seeds(labels, arm)]
            if not curves:
                continue
            counts.append(str(len(curves)))
            steps, values = curves[0][0], np.array([smoothed(curve) for _, curve in curves])
            axis.plot(steps, values.mean(0), color=COLOURS[arm], label=NAMES[arm])
            axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[arm], alpha=0.15, linewidth=0)
        axis.set_title(f"{labels} labelled cases; seeds: {', '.join(counts)}", fontsize=10)
        axis.set_xlabel("steps")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("Dice of validation patches, points")
    # also names arms that are not finished for some number of labels
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(named.values(), named, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_pretraining(rows: Sequence[Row], before: float | None, path: Path) -> None:
    """The benchmark's pre-training: its losses, and the linear probe of the encoder.

    Args:
        rows: of pretraining.csv, of one pre-training.
        before: the probe of the untrained encoder; None: not known.
        path: of the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    steps = [int(row["steps"]) for row in rows]
    for name, label in (("train_loss", "training"), ("val_loss", "fixed patches and masks")):
        left.plot(steps, [float(row[name]) for row in rows], label=label)
    left.set_ylabel("reconstruction loss")
    left.legend(fontsize=8)
    probed = [row for row in rows if row.get("probe")]
    right.plot([int(row["steps"]) for row in probed], [float(row["probe"]) for row in probed], marker=".")
    if before is not None:
        right.axhline(before, color="0.5", linestyle="--", linewidth=1, label="before the first step")
        right.legend(fontsize=8)
    right.set_ylabel("Dice of the linear probe")
    for axis in (left, right):
        axis.set_xlabel("steps of pre-training")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report() -> None:
    """Writes the tables, and the plots where there are results."""
    results = Results(FOLDER)
    for document in DOCUMENTS:
        document.write_text(with_results(document.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"{document.relative_to(ROOT)} is written")
    if results.rows("runs"):
        plot(results, PLOT)
        print(f"{PLOT.relative_to(ROOT)} is written")
    rows = [row for row in results.rows("pretraining") if row["pretraining"] == REFERENCE.name]
    if rows:
        starts = {row["pretraining"]: row["probe before"] for row in results.rows("pretrainings")}
        start = starts[REFERENCE.name]
        plot_pretraining(rows, float(start) if start else None, PRETRAINING_PLOT)
        print(f"{PRETRAINING_PLOT.relative_to(ROOT)} is written")
