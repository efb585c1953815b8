"""Weights of nnU-Net's own networks: their names, their sizes, and starting one network from another."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from hyspark_nnunet import load_network
from hyspark_nnunet.architectures import HySparKUNet
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.network_plan import NetworkPlan, by_configuration, plan_in
from hyspark_nnunet.checkpoints.nnssl import KEY, RESENC_L, adaptation_plan, network_of
from hyspark_nnunet.checkpoints.plan_sizes import is_resenc_l, plan_sizes, requiring_import, resenc_l_arguments
from hyspark_nnunet.checkpoints.state_dicts import stored_once
from hyspark_nnunet.checkpoints.storage import write_safetensors
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from tests.conftest import Geometry
from tests.nnunet_plans import plans_of
from tests.small_networks import PLAN_NETWORKS, cubic, plan_network, small_arguments

every_network = pytest.mark.parametrize("kind", PLAN_NETWORKS)


def geometry(n_stages: int, **changes) -> Geometry:
    sizes = {name: cubic(n_stages)[name] for name in ("kernel_sizes", "strides")}
    return Geometry("", (16,) * 3, **{**sizes, **changes})


def network_of_sizes(state: dict[str, Tensor], input_channels: int) -> nn.Module:
    sizes = plan_sizes(state)
    assert sizes is not None
    arguments = sizes.arguments()
    return get_network_from_plans(sizes.class_name, arguments, requiring_import(arguments), input_channels, 3)


@every_network
@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchNorm"])
def test_names_and_sizes(geometry, kind: str, norm: str) -> None:
    network = plan_network(geometry, kind, norm)
    state = stored_once(network.state_dict())
    names = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    assert set(state) == names
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    again = network_of_sizes(state, geometry.input_channels)
    assert type(again) is type(network)
    shapes = {name: tensor.shape for name, tensor in again.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert [tuple(stride) for stride in again.encoder.strides] == list(network.encoder.strides)


def test_the_sizes_that_nnssl_has_a_name_for() -> None:
    name, arguments = network_of({"architecture_plans": {"arch_class_name": RESENC_L, "arch_kwargs": None}})
    assert arguments == resenc_l_arguments()
    with torch.device("meta"):
        made = get_network_from_plans(name, arguments, requiring_import(arguments), 1, 1, allow_init=False)
    found = plan_sizes(stored_once(made.state_dict())).arguments()
    assert is_resenc_l(name, found) and not is_resenc_l(name, found | {"n_blocks_per_stage": [1, 3, 4, 6, 6, 5]})
    plan = partial(adaptation_plan, name, input_channels=1, configuration="c", spacing=[1.0] * 3, patch_size=[160] * 3)
    assert plan(found)["architecture_plans"]["arch_kwargs"] is None
    other = plan(found | {"n_conv_per_stage_decoder": [2] * 5})["architecture_plans"]
    assert other["arch_class_name"] == "ResidualEncoderUNet" and other["arch_kwargs"]["n_stages"] == 6


@every_network
@pytest.mark.parametrize("decoder", ["unet", "reconstruction"])
def test_pre_training_to_segmentation(kind: str, decoder: str) -> None:
    source = SparKMaskedAutoencoder(plan_network(geometry(3), kind), 1, decoder).state_dict()
    network = plan_network(geometry(3), kind)
    nn.init.zeros_(
        network.encoder.stages[0]
        .get_submodule("0.convs.0.conv" if kind == "PlainConvUNet" else "blocks.0.conv1.conv")
        .weight
    )
    before = copy.deepcopy(network.state_dict())
    report = transfer_weights(network, source, "file.pth")
    after = stored_once(network.state_dict())
    for name, tensor in after.items():
        assert torch.equal(tensor, source.get(name, before[name])), name
    assert report.encoder_share == 1
    fates = {entry.name: entry.fate for entry in report.entries}
    assert {fates[name] for name in after if name.startswith("encoder.")} == {"loaded"}
    rebuilds = "loaded" if decoder == "unet" else "random"
    assert {fates[n] for n in after if n.startswith(("decoder.stages", "decoder.transpconvs"))} == {rebuilds}
    assert {fates[n] for n in after if n.startswith("decoder.seg_layers")} == {"random"}
    unused = {name for name, fate in fates.items() if fate == "unused"}
    assert unused == set(source) - set(after)


@every_network
def test_channels_and_kernels_are_adapted(kind: str) -> None:
    source = plan_network(geometry(3), kind)
    flat = {"kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2))}
    network = plan_network(geometry(3, input_channels=2, **flat), kind)
    report = transfer_weights(network, stored_once(source.state_dict()), "file.pth")
    assert report.encoder_share == 1
    table = report.table()
    assert "input channels averaged: 1 -> 2" in table and "kernel 3x3x3 -> 1x3x3" in table
    assert "kernel 2x2x2 -> 1x2x2" in table
    # constant along the first axis, with equal channels: the same network
    image = torch.randn(1, 1, 1, 16, 16).expand(1, 1, 16, 16, 16)
    stem, first = (
        n.encoder.stages[0][0].convs[0].conv if kind == "PlainConvUNet" else n.encoder.stem.convs[0].conv
        for n in (source, network)
    )
    inner = (slice(None), slice(None), slice(4, 12))
    torch.testing.assert_close(first(image.repeat(1, 2, 1, 1, 1))[inner], stem(image)[inner], rtol=1e-4, atol=1e-5)


@every_network
@pytest.mark.parametrize(("theirs", "ours"), [(4, 3), (3, 4)])
def test_the_stages_in_common_are_loaded(kind: str, theirs: int, ours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SparKMaskedAutoencoder(plan_network(geometry(theirs), kind), 1).state_dict()
    network = plan_network(geometry(ours), kind)
    if ours > theirs:
        with pytest.raises(ValueError, match="would fill only .* of the encoder's parameters"):
            transfer_weights(network, source, "file.pth")
        monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
    report = transfer_weights(network, source, "file.pth")
    assert f"{theirs} stages in the file, {ours} here: the first 3 are loaded" in report.table()
    after = stored_once(network.state_dict())
    shift = theirs - ours
    for name, tensor in after.items():
        words = name.split(".")
        if words[0] == "encoder" and (words[1] == "stem" or int(words[2]) < 3):
            assert torch.equal(tensor, source[name]), name
        elif words[1] in ("stages", "transpconvs") and words[0] == "decoder" and int(words[2]) + shift >= 0:
            assert torch.equal(tensor, source[".".join([*words[:2], str(int(words[2]) + shift), *words[3:]])]), name
    assert (report.encoder_share == 1) == (theirs > ours)


def test_other_widths_are_refused() -> None:
    source = plan_network(geometry(3), "PlainConvUNet")
    network = plan_network(geometry(3), "PlainConvUNet", features_per_stage=(4, 8, 8))
    with pytest.raises(ValueError, match=r"Widths of the stages: \[4, 6, 8\] in the file, \[4, 8, 8\] here"):
        transfer_weights(network, stored_once(source.state_dict()), "file.pth")


def test_other_kinds_of_networks_are_refused() -> None:
    plain, residual = (plan_network(geometry(3), kind) for kind in PLAN_NETWORKS[:2])
    hybrid = HySparKUNet(**small_arguments(3), num_classes=3)
    states = {n: stored_once(network.state_dict()) for n, network in zip("prh", (plain, residual, hybrid), strict=True)}
    for network, state, words in (
        (hybrid, "r", "ResidualEncoderUNet.*-tr SparKFinetuneTrainer"),
        (hybrid, "p", "PlainConvUNet.*-tr SparKFinetuneTrainer"),
        (plain, "h", "HySparK.*-tr HySparKFinetuneTrainer"),
        (plain, "r", "ResidualEncoderUNet.*-tr SparKFinetuneTrainer"),
    ):
        with pytest.raises(ValueError, match=f"It holds a network of the kind {words}"):
            transfer_weights(network, states[state], "file.pth")


def test_networks_are_built_as_nnunet_builds_them() -> None:
    """The same class, arguments and initial weights, also where a plan names a module that was moved."""
    name, arguments = network_of({"architecture_plans": {"arch_class_name": RESENC_L, "arch_kwargs": None}})
    arguments |= {"features_per_stage": [2, 3, 4, 4, 4, 4], "n_blocks_per_stage": [1] * 6}
    plan = NetworkPlan(name, arguments, requiring_import(arguments), None, None)
    moved = plan._replace(class_name="dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet")
    torch.manual_seed(0)
    expected = get_network_from_plans(name, arguments, requiring_import(arguments), 2, 3, deep_supervision=True)
    for found in (plan, moved):
        torch.manual_seed(0)
        network = found.build(2, 3, True)
        assert repr(network) == repr(expected)
        assert all(torch.equal(t, expected.state_dict()[name]) for name, t in network.state_dict().items())
    with pytest.raises(ValueError, match="the plan names the network somewhere.Else, which is not installed"):
        plan._replace(class_name="somewhere.Else").build(2, 3, True)


def test_functions_in_a_plan_are_not_called(tmp_path: Path) -> None:
    """The file alone decides what a plan says."""
    network = plan_network(geometry(2), "PlainConvUNet")
    sizes = plan_sizes(stored_once(network.state_dict()))
    assert sizes is not None
    marker, file = tmp_path / "called", tmp_path / "weights.safetensors"
    bad = {"nonlin": "subprocess.getoutput", "nonlin_kwargs": {"cmd": f"touch {marker}"}}
    plan = adaptation_plan(sizes.class_name, sizes.arguments() | bad, 1, "3d_fullres", [1.0] * 3, [16] * 3)
    write_safetensors(stored_once(network.state_dict()), {KEY: plan}, file)
    with pytest.raises(ValueError, match="names subprocess.getoutput as nonlin of its network"):
        load_network(file, num_classes=2)
    assert not marker.exists()


def test_a_configuration_inherits_from_others() -> None:
    plans = plans_of("PlainConvUNet")
    plans["configurations"]["finer"] = {"inherits_from": "3d_fullres", "spacing": [0.5] * 3}
    found = plan_in({"init_args": {"plans": plans, "configuration": "finer"}})
    expected = by_configuration(PlansManager(copy.deepcopy(plans)).get_configuration("finer"))
    assert found == expected and found.spacing == [0.5] * 3


def test_plans_of_other_programs_may_say_less() -> None:
    plans = plans_of("PlainConvUNet")
    settings = plans["configurations"]["3d_fullres"]
    del settings["spacing"], settings["patch_size"]
    rest = {"init_args": {"plans": plans, "configuration": "3d_fullres"}}
    found = plan_in(rest)
    assert found is not None and (found.patch_size, found.spacing) == (None, None)
    settings["architecture"] = {"name": "another form"}
    assert plan_in(rest) is None
