"""The report of a transfer: which tensors were loaded, adapted, left at random or unused."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from hyspark_nnunet.atomic_files import replacing

# names of the parts in reports, in order; a tensor belongs to the first pattern that matches. HySparK's reconstruction
# decoder, which only a file has, must not read like the decoder of the network
PARTS = (
    (r"encoder\.stem\.", "stem"),
    (r"encoder\.stages\.(\d+)\.", "stage {}"),
    (r"encoder\.vit\.", "ViT"),
    (r"densify\.projections\.", "densifying projections"),
    (r"densify\.mask_tokens\.", "mask tokens"),
    (r"decoder\.levels\.(\d+)\.(?:fuse|refine|upsample)\.", "reconstruction level {}"),
    (r"decoder\.project\.", "reconstruction head"),
    (r"decoder\.head\.", "reconstruction head"),
    (r"decoder\.levels\.(\d+)\.", "decoder level {}"),
    (r"decoder\.(?:stages|transpconvs)\.(\d+)\.", "decoder stage {}"),
    (r"decoder\.seg_layers\.", "heads"),
)


def part_of(name: str) -> str:
    """The part of a network that a tensor belongs to; "other" for tensors of other networks."""
    for pattern, part in PARTS:
        if match := re.match(pattern, name):
            return part.format(*match.groups())
    return "other"


@dataclass(frozen=True)
class Entry:
    """One tensor: ``fate`` is loaded, adapted, random or unused, ``why`` has the details.

    A head of which only some labels are loaded has two entries, adapted and random, each with its number of parameters.
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
        entries: one per tensor of the network, and one per unused tensor of the file.
        notes: differences that change no tensor, and warnings.
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, fate: str, parameters: int, why: str = "") -> None:
        """Adds an entry."""
        self.entries.append(Entry(name, part_of(name), fate, parameters, why))

    def parameters(self, *fates: str, within: str = "") -> int:
        """Number of parameters with one of the fates, in tensors whose names begin with ``within``."""
        return sum(e.parameters for e in self.entries if e.fate in fates and e.name.startswith(within))

    @property
    def encoder_share(self) -> float:
        """Share of the encoder's parameters that come from the file."""
        total = self.parameters("loaded", "adapted", "random", within="encoder.")
        return self.parameters("loaded", "adapted", within="encoder.") / total

    def table(self) -> str:
        """The report as text: a line per part, fate and reason."""
        rows: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            rows[entry.part, entry.fate, entry.why].append(entry)
        lines = [f"{'part':<24}{'':<10}{'tensors':>8}{'parameters':>14}  details"]
        for (part, fate, why), entries in sorted(rows.items(), key=lambda row: _place(row[0][0])):
            lines.append(
                f"{part:<24}{fate:<10}{len(entries):>8}{sum(e.parameters for e in entries):>14,}  {why}".rstrip()
            )
        lines.append(f"{self.encoder_share:.1%} of the encoder's parameters come from the file.")
        return "\n".join(lines + self.notes)

    def save(self, path: Path, file: str) -> None:
        """Writes the report as JSON; a reader sees the old file or the complete new one."""
        content = {
            "pretrained_weights": file,
            "encoder_share": self.encoder_share,
            "notes": self.notes,
            "tensors": [vars(entry) for entry in self.entries],
        }
        with replacing(path) as beside:
            beside.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _place(part: str) -> tuple[int, str]:
    """Sorts the parts of the table."""
    kinds = [pattern_part.partition(" {}")[0] for _, pattern_part in PARTS]
    kind = part.rstrip("0123456789").rstrip()
    return (kinds.index(kind) if kind in kinds else len(kinds)), part
