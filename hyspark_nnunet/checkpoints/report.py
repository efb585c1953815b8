"""The account of a transfer: what became of every tensor of the network and of the file."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from hyspark_nnunet.atomic_files import replacing

# how the parts are called and ordered in reports; a name belongs to the first pattern that matches
PARTS = (
    (r"encoder\.stem\.", "stem"),
    (r"encoder\.stages\.(\d+)\.", "stage {}"),
    (r"encoder\.vit\.", "ViT"),
    (r"densify\.projections\.", "densifying projections"),
    (r"densify\.mask_tokens\.", "mask tokens"),
    (r"decoder\.levels\.(\d+)\.", "decoder level {}"),
    (r"decoder\.project\.", "decoder projection"),
    (r"decoder\.seg_layers\.", "heads"),
)


def part_of(name: str) -> str:
    """The part of a network that a tensor belongs to, in words; "other" where no network of ours has it."""
    for pattern, part in PARTS:
        if match := re.match(pattern, name):
            return part.format(*match.groups())
    return "other"


@dataclass(frozen=True)
class Entry:
    """What became of one tensor: ``fate`` is loaded, adapted, random or unused; ``why`` says how, or why not.

    A head of which some labels are taken over has two entries, adapted and random, with their parameters each.
    """

    name: str
    part: str
    fate: str
    parameters: int
    why: str = ""


@dataclass
class TransferReport:
    """What ``transfer_weights`` did.

    Attributes:
        entries: one per tensor of the network, and per tensor of the file that was left unused.
        notes: differences that change no tensor, and warnings.
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, fate: str, parameters: int, why: str = "") -> None:
        """One more entry."""
        self.entries.append(Entry(name, part_of(name), fate, parameters, why))

    def parameters(self, *fates: str, within: str = "") -> int:
        """Number of parameters with one of the fates, in tensors whose name begins so."""
        return sum(e.parameters for e in self.entries if e.fate in fates and e.name.startswith(within))

    @property
    def encoder_share(self) -> float:
        """Share of the encoder's parameters that came from the file."""
        total = self.parameters("loaded", "adapted", "random", within="encoder.")
        return self.parameters("loaded", "adapted", within="encoder.") / total

    def table(self) -> str:
        """The report for people: a line per part, fate and reason."""
        rows: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            rows[entry.part, entry.fate, entry.why].append(entry)
        lines = [f"{'part':<24}{'':<10}{'tensors':>8}{'parameters':>14}  how, or why not"]
        for (part, fate, why), entries in sorted(rows.items(), key=lambda row: _place(row[0][0])):
            lines.append(
                f"{part:<24}{fate:<10}{len(entries):>8}{sum(e.parameters for e in entries):>14,}  {why}".rstrip()
            )
        lines.append(f"{self.encoder_share:.1%} of the encoder's parameters come from the file.")
        return "\n".join(lines + self.notes)

    def save(self, path: Path, file: str) -> None:
        """Writes the report as JSON, beside its place and renamed."""
        content = {
            "pretrained_weights": file,
            "encoder_share": self.encoder_share,
            "notes": self.notes,
            "tensors": [vars(entry) for entry in self.entries],
        }
        with replacing(path) as beside:
            beside.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _place(part: str) -> tuple[int, str]:
    """Where a part stands in the table."""
    kinds = [pattern_part.partition(" {}")[0] for _, pattern_part in PARTS]
    kind = part.rstrip("0123456789").rstrip()
    return (kinds.index(kind) if kind in kinds else len(kinds)), part
