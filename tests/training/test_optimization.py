"""Parameter groups, and the fine-tuning schedules that act on them."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.architectures import HySparKUNet
from hyspark_nnunet.train import leave
from hyspark_nnunet.training.optimization import (
    describe_groups,
    encoder_layers,
    layer_of,
    layer_rates,
    parameter_groups,
    rates_of_groups,
    skip_frozen,
)
from hyspark_nnunet.training.schedules import ProgressScheduler, decoder_first, frozen_first, warmup_polynomial
from tests.small_networks import small_arguments

ARGUMENTS = small_arguments()
LAYERS = ["stem", "stage 0", "stage 1", "stage 2", "transformer block 0", "transformer block 1"]


@pytest.fixture
def network() -> HySparKUNet:
    torch.manual_seed(0)
    return HySparKUNet(**ARGUMENTS, num_classes=2)


def names_by_group(network: torch.nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(p): n for n, p in network.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


class TestGroups:
    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("decay", [1.0, 0.5])
    def test_every_parameter_is_in_one_group(self, network, apart: bool, decay: float) -> None:
        groups = parameter_groups(network, 0.04, 1e-3, apart, layer_rates(network, decay))
        found = [id(p) for group in groups for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in network.parameters())
        assert groups[0]["lr"] == 1e-3 and groups[0]["part"] == "decoder"  # the rate nnU-Net logs
        for group in groups:
            exempt = group["name"].endswith("norms, biases, mask tokens")
            assert group["weight_decay"] == (0.0 if exempt else 0.04)
            assert all((p.ndim <= 1) == exempt for p in group["params"])

    def test_by_default_two(self, network) -> None:
        groups = parameter_groups(network, 0.04, 1e-3)
        assert [group["name"] for group in groups] == ["weights", "norms, biases, mask tokens"]

    def test_the_encoder_apart(self, network) -> None:
        found = names_by_group(network, parameter_groups(network, 0.04, 1e-3, apart=True))
        assert [name.partition(":")[0] for name in found] == ["decoder", "decoder", "encoder", "encoder"]
        encoder = found["encoder: weights"] | found["encoder: norms, biases, mask tokens"]
        assert encoder == {n for n, _ in network.named_parameters() if n.startswith("encoder.")}

    def test_layer_decay(self, network) -> None:
        groups = parameter_groups(network, 0.04, 1e-3, rates=layer_rates(network, 0.5))
        rates = {group["name"].partition(":")[0]: group["lr"] for group in groups}
        for distance, layer in enumerate(reversed(LAYERS), start=1):
            assert rates[layer] == pytest.approx(1e-3 * 0.5**distance)
        found = names_by_group(network, groups)
        last = found["transformer block 1: norms, biases, mask tokens"]
        assert "encoder.vit.norm.weight" in last  # the final norm goes with the last block

    def test_by_default_the_first_layer_has_a_fixed_part_of_the_rate(self, network) -> None:
        rates = layer_rates(network, None)
        assert rates["stem"] == pytest.approx(1 / 128)
        assert rates["transformer block 1"] == rates["final norm"] == pytest.approx((1 / 128) ** (1 / 6))

    def test_new_layers_have_the_whole_rate(self, network) -> None:
        rates = layer_rates(network, 0.5, ["stage 2", "final norm"])
        found = {layer: rates[layer] for layer in LAYERS}
        expected = [0.5**6, 0.5**5, 0.5**4, 1, 0.5**2, 1]
        assert found == dict(zip(LAYERS, expected, strict=True)) and rates["final norm"] == 1

    @pytest.mark.parametrize("rates", [0.5, None, 1.0])
    def test_the_groups_tell_the_rates(self, network, rates: float | None) -> None:
        wanted = layer_rates(network, rates)
        groups = parameter_groups(network, 0.04, 1e-3, apart=True, rates=wanted)
        assert rates_of_groups(network, groups) == pytest.approx(wanted)

    def test_layers_count_from_the_input(self, network) -> None:
        layers = encoder_layers(network)
        assert [layers[name] for name in LAYERS] == list(range(6)) and layers["final norm"] == 5
        assert layer_of("encoder.stages.1.blocks.0.conv.weight") == "stage 1"

    def test_are_described(self, network) -> None:
        optimizer = torch.optim.AdamW(parameter_groups(network, 0.04, 1e-3, apart=True), lr=1e-3)
        lines = describe_groups(optimizer, {"encoder": "frozen for 3 epochs"}).splitlines()
        assert len(lines) == 5
        assert [line.endswith("frozen for 3 epochs") for line in lines[1:]] == [False, False, True, True]
        count = sum(p.numel() for n, p in network.named_parameters() if n.startswith("encoder.") and p.ndim > 1)
        assert f"{count:,}" in lines[3] and "0.001   0.04" in lines[3]


def optimizer_and_schedule(network, epochs=10, alone=0, hold=0, layer_decay=1.0):
    """As HySparKFinetuneTrainer makes them, without a warm-up."""
    optimizer = torch.optim.AdamW(
        parameter_groups(network, 0.04, 1e-2, True, layer_rates(network, layer_decay)), lr=1e-2
    )
    optimizer.register_step_pre_hook(skip_frozen)
    curve = partial(decoder_first, alone_fraction=alone / epochs, curve=partial(warmup_polynomial, warmup_fraction=0))
    back = partial(frozen_first, frozen_fraction=max(alone, hold) / epochs)
    return optimizer, ProgressScheduler(optimizer, epochs, curve, None, back)


def step(network, optimizer, image) -> None:
    optimizer.zero_grad(set_to_none=True)
    logits = network(image)
    sum(output.square().mean() for output in (logits if isinstance(logits, list) else [logits])).backward()
    optimizer.step()


IMAGE = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class TestFrozen:
    @pytest.mark.parametrize("kind", ["alone", "hold"])
    def test_the_encoder_stays_to_the_bit_then_trains(self, network, kind: str) -> None:
        optimizer, scheduler = optimizer_and_schedule(network, **{kind: 3})
        start = copy.deepcopy(network.state_dict())
        for epoch in range(4):
            before = copy.deepcopy(network.state_dict())
            scheduler.step(epoch)
            step(network, optimizer, IMAGE)
            moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
            assert any(name.startswith("decoder.") for name in moved)
            assert any(name.startswith("encoder.") for name in moved) == (epoch == 3)
            if epoch < 3:
                held = [p for n, p in network.named_parameters() if n.startswith("encoder.")]
                assert not any(parameter in optimizer.state for parameter in held)  # no moments of steps not taken
                assert all(torch.equal(t, start[n]) for n, t in network.state_dict().items() if n.startswith("enc"))
        assert all(parameter.requires_grad for parameter in network.parameters())

    def test_nothing_is_frozen_by_default(self, network) -> None:
        optimizer, _ = optimizer_and_schedule(network)
        before = copy.deepcopy(network.state_dict())
        step(network, optimizer, IMAGE)
        assert not torch.equal(network.encoder.stem.weight, before["encoder.stem.weight"])


class TestRates:
    def rates(self, network, epoch: float, **options) -> tuple[float, float]:
        optimizer, scheduler = optimizer_and_schedule(network, **options)
        scheduler.step(epoch)
        by_part = {group["part"]: group["lr"] for group in optimizer.param_groups}
        return by_part["decoder"], by_part["encoder"]

    @pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (3.99, 0.0), (4, 1.0), (9, 1.0)])
    def test_zero_for_the_first_epochs(self, network, epoch: float, share: float) -> None:
        decoder, encoder = self.rates(network, epoch, hold=4)
        assert encoder == pytest.approx(share * decoder) and decoder > 0

    def test_the_decoder_warms_up_alone_before_the_whole_schedule(self, network) -> None:
        assert self.rates(network, 0, alone=2) == (pytest.approx(1e-2 * 0.005), 0)
        assert self.rates(network, 1, alone=2) == (pytest.approx(1e-2 * (1 + 0.005) / 2), 0)
        assert self.rates(network, 2, alone=2) == (1e-2, 1e-2)
        half = 1e-2 * 0.5**0.9  # the polynomial runs over the 8 epochs that remain
        assert self.rates(network, 6, alone=2) == (pytest.approx(half), pytest.approx(half))

    def test_layer_decay_holds_on_the_whole_curve(self, network) -> None:
        optimizer, scheduler = optimizer_and_schedule(network, layer_decay=0.5)
        for epoch in (0, 4, 9.5):
            scheduler.step(epoch)
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates[-1] == pytest.approx(rates[0] * 0.5**6)


def train_in_ddp(rank: int, folder: str) -> None:
    """One of two processes: frozen for an epoch, then not, as nnU-Net wraps it (no search for unused parameters)."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = HySparKUNet(**ARGUMENTS, num_classes=2, deep_supervision=True)
    optimizer, scheduler = optimizer_and_schedule(network, epochs=2, hold=1)
    wrapped = DistributedDataParallel(network)
    torch.manual_seed(rank + 1)
    stems = [network.encoder.stem.weight.detach().clone()]
    for epoch in (0, 0.5, 1, 1.5):
        scheduler.step(epoch)
        step(wrapped, optimizer, torch.randn(1, 1, 8, 8, 8))
        stems.append(network.encoder.stem.weight.detach().clone())
    torch.save({"stems": stems, "state": wrapped.state_dict()}, f"{folder}/rank{rank}.pth")
    dist.destroy_process_group()
    # with DDP's wrapper still there: freed here, it may wait for a thread of gloo that waits for the interpreter
    leave()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_a_frozen_encoder_under_ddp(tmp_path: Path) -> None:
    mp.spawn(train_in_ddp, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    stems = one["stems"]
    assert torch.equal(stems[0], stems[2]) and not torch.equal(stems[2], stems[3])
    assert all(torch.equal(tensor, other["state"][name]) for name, tensor in one["state"].items())
