"""The memory format of depth-wise convolutions: chosen by time, without an effect on values."""

from functools import partial

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.building_blocks import depthwise
from hyspark_nnunet.building_blocks.depthwise import choose_memory_formats, depthwise_convolutions
from hyspark_nnunet.masking import sample_visible
from tests.small_networks import small_arguments


@pytest.mark.parametrize("masked", [True, False])
def test_the_faster_format_is_taken_and_changes_no_value(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    if masked:
        network = HySparKMaskedAutoencoder(**small_arguments(), decoder_width=16).double()
        visible = sample_visible(2, (4, 4, 4), 0.75)
        run = partial(network.encoder.features, image, visible, 16)
    else:
        network = HySparKUNet(**small_arguments(), num_classes=2).double()
        run = partial(network, image)
    convolutions = depthwise_convolutions(network)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        result = run()
        loss = sum(f.field.square().sum() for f in result) if masked else result.square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    expected = gradients()
    assert len(convolutions) >= 4 and not any(convolution.channels_first for convolution in convolutions)

    # times as a GPU might have them: the channels-first kernel wins for fields of 4 channels
    def seconds(convolution, layout, field, channels_first):
        assert depthwise_seconds(convolution, layout, field, channels_first) > 0
        return 1.0 if channels_first == (field.shape[-1] == 4) else 2.0

    depthwise_seconds = depthwise.seconds_of
    monkeypatch.setattr(depthwise, "seconds_of", seconds)
    network.zero_grad()
    lines = choose_memory_formats(network, run)
    chosen = {len(convolution.weight): convolution.channels_first for convolution in convolutions}
    assert chosen == {width: width == 4 for width in chosen} and {4, 6} <= set(chosen)
    assert len(set(lines)) == len(lines) >= len(chosen)
    assert "1000.00 ms channels-first" in next(line for line in lines if " x 4: " in line)
    # timing leaves no gradient, and no hook behind
    assert all(parameter.grad is None for parameter in network.parameters())
    monkeypatch.setattr(depthwise, "seconds_of", None)
    for found, value in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
