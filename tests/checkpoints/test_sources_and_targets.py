"""The table of docs/checkpoints.md: every source into every target, its values and what the table says of it.

Preset B, the release's size, so that the shares are those of practice. Targets are filled with one number, which shows
what was left alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.checkpoints.reference import to_reference
from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.checkpoints.storage import SourceWeights, read_weights, write_atomically
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from tests.small_networks import preset_arguments

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
UNTOUCHED = 7.0
SOURCE_LABELS, TARGET_LABELS = ["background", "liver", "spleen"], ["background", "spleen", "kidney"]
CUBIC = {"kernel_sizes": ((3, 3, 3),) * 5, "strides": ((1, 1, 1),) + ((2, 2, 2),) * 4}
ANISOTROPIC = {
    "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
}
SOURCES = ("own", "release", "fine-tuned")
# per target: channels of the file and of the network, stages, geometry, patch size
TARGETS: dict[str, tuple[int, int, int, dict, tuple[int, int, int]]] = {
    "equal plan": (1, 1, 5, CUBIC, (16, 16, 16)),
    "other patch": (1, 1, 5, CUBIC, (16, 32, 16)),
    "anisotropic": (1, 1, 5, ANISOTROPIC, (4, 16, 16)),
    "1 -> 4 channels": (1, 4, 5, CUBIC, (16, 16, 16)),
    "4 -> 1": (4, 1, 5, CUBIC, (16, 16, 16)),
    "4 stages <- 5 stages": (1, 1, 4, CUBIC, (16, 16, 16)),
}


def arguments(channels: int, n: int, geometry: dict) -> dict[str, Any]:
    """Of preset B, as a plan yields them."""
    return preset_arguments(
        "B",
        n,
        input_channels=channels,
        kernel_sizes=geometry["kernel_sizes"][:n],
        strides=geometry["strides"][:n],
    )


def filled(network_class: Callable, value: float | None = None, **more: Any) -> torch.nn.Module:
    """A network of one value everywhere, or of small random ones, faster than by its own initial weights."""
    with torch.device("meta"):
        network = network_class(**more)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if value is not None:
                tensor.fill_(value)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.1, 0.1)
            else:
                tensor.zero_()
    return network


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], SourceWeights]:
    """Files of all sources, read as a training reads them."""
    folder, known = tmp_path_factory.mktemp("sources"), {}

    def read_source(source: str, channels: int) -> SourceWeights:
        if (source, channels) not in known:
            torch.manual_seed(channels)
            sizes, path = arguments(channels, 5, CUBIC), folder / f"{source}_{channels}.pth"
            if source == "fine-tuned":
                network = filled(HySparKUNet, **sizes, num_classes=3, deep_supervision=True)
                about = {"hyspark": {"labels": SOURCE_LABELS, "regions": False}}
            else:
                network, about = filled(HySparKMaskedAutoencoder, **sizes, decoder_width=16), {}
            state = network.state_dict()
            if source == "release":
                write_atomically({"state_dict": to_reference(state).state}, path)
            else:
                write_atomically({"network_weights": state, "trainer_name": source, **about}, path)
            known[source, channels] = read_weights(path)
            path.unlink()
        return known[source, channels]

    return read_source


def expected(name: str, source: dict[str, Tensor], target: str) -> Tensor | None:
    """The value a tensor of the network must have; None: it was left alone."""
    if target == "4 stages <- 5 stages":
        if name.startswith(("encoder.stages.3.", "encoder.vit.")):
            return None
        name = re.sub(r"^(decoder\.(?:levels|seg_layers))\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) + 1}", name)
    value = source.get(name)
    if value is None:
        return None
    if name == "encoder.stem.weight" and target == "1 -> 4 channels":
        return (value / 4).expand(-1, 4, -1, -1, -1)
    if name == "encoder.stem.weight" and target == "4 -> 1":
        return value.double().sum(1, keepdim=True).float()
    # anisotropic: the first two stages, and the two finest decoder levels, see one slice
    thin = r"encoder\.stem\.weight|encoder\.stages\.[01]\..*weight|decoder\.levels\.[23]\..*weight"
    if target == "anisotropic" and value.ndim == 5 and max(value.shape[2:]) > 1 and re.fullmatch(thin, name):
        return value.double().sum(2, keepdim=True).float()
    if "seg_layers" in name:  # labels background, spleen, kidney from background, liver, spleen
        return torch.cat([value[[0, 2]], torch.full_like(value[:1], UNTOUCHED)])
    return value


# files that give equal rows share one
SHOWN = {"own": "own, release", "release": "own, release", "fine-tuned": "fine-tuned"}


def row_of(source: str, target: str, report: TransferReport) -> str:
    """The row of docs/checkpoints.md."""
    total = report.parameters("loaded", "adapted", "random", within="encoder.")
    shares = [f"{report.parameters(f, within='encoder.') / total:.1%}" for f in ("loaded", "adapted", "random")]
    hows: dict[str, None] = {}
    for entry in report.entries:
        if entry.fate == "adapted" and entry.part != "heads" and entry.name.startswith("encoder."):
            hows[entry.why] = None
    levels = [e for e in report.entries if e.part.startswith("decoder level") and e.fate != "unused"]
    left = {e.part for e in levels if e.fate == "random"}
    n_levels = len({e.part for e in levels})
    heads = {e.why.removeprefix("by label: ") for e in report.entries if e.part == "heads" and e.fate == "adapted"}
    hows.update({note.removeprefix("WARNING: "): None for note in report.notes if "WARNING" in note})
    decoder = f"{n_levels - len(left)} of {n_levels} levels"
    cells = [SHOWN[source], target, *shares, "; ".join(hows) or "as it is", decoder, "; ".join(heads) or "none"]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_row(source: str, target: str, read, monkeypatch: pytest.MonkeyPatch) -> None:
    file_channels, channels, n, geometry, patch = TARGETS[target]
    weights = read(source, file_channels)
    network = filled(HySparKUNet, UNTOUCHED, **arguments(channels, n, geometry), num_classes=3)
    description = {"labels": TARGET_LABELS, "regions": False}
    if n == 4:  # less than 90 % of the encoder: an error unless a person allows it
        with pytest.raises(ValueError, match=r"would fill only \d+\.\d% of the encoder"):
            transfer_weights(network, weights.state, "file.pth", weights.description, description)
        monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
    report = transfer_weights(network, weights.state, "file.pth", weights.description, description)

    for name, tensor in network.state_dict().items():
        value = expected(name, weights.state, target)
        assert torch.equal(tensor, torch.full_like(tensor, UNTOUCHED) if value is None else value), name
    # every tensor of the network and of the file is accounted for
    fates = ("loaded", "adapted", "random")
    assert report.parameters(*fates) == sum(t.numel() for t in network.state_dict().values())
    assert {e.name for e in report.entries if e.fate in fates} == set(network.state_dict())
    if source == SOURCES[0]:  # once per target: positions are computed for its patch
        network.eval().requires_grad_(False)
        assert network(torch.zeros(1, channels, *patch)).shape == (1, 3, *patch)
    assert row_of(source, target, report) in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_the_table_has_no_other_rows() -> None:
    rows = re.findall(r"^\| (own, release|fine-tuned) \| (.+?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(shown, target) for target in TARGETS for shown in dict.fromkeys(SHOWN.values())]
