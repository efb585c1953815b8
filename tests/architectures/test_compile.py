"""torch.compile on the CPU, where nnU-Net itself does not compile: as ``nnUNet_compile`` does it on CUDA."""

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from tests.conftest import Geometry
from tests.small_networks import plan_network, small_arguments

ARGUMENTS = small_arguments(n_blocks_per_stage=(1, 1, 1), expansion_per_stage=(2, 2, 2), vit_n_blocks=1)


@pytest.mark.parametrize("kind", ["pretraining", "segmentation", "SparK's pretraining"])
def test_a_compiled_network_has_the_same_loss_and_gradients(kind: str) -> None:
    """Traced and differentiated by the compiler; C++ is not generated, which takes minutes."""
    torch.manual_seed(0)
    image, visible = torch.randn(2, 1, 16, 16, 16), sample_visible(2, (4, 4, 4), 0.75)
    if kind == "SparK's pretraining":
        size = Geometry("", (16,) * 3, kernel_sizes=((3,) * 3,) * 3, strides=((1,) * 3, (2,) * 3, (2,) * 3))
        network: torch.nn.Module = SparKMaskedAutoencoder(plan_network(size, "ResidualEncoderUNet"), 1)
    elif kind == "pretraining":
        network = HySparKMaskedAutoencoder(**ARGUMENTS, decoder_width=16)
    else:
        network = HySparKUNet(**ARGUMENTS, num_classes=2, deep_supervision=True)

    def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        network.zero_grad(set_to_none=True)
        if "pretraining" in kind:
            loss = reconstruction_loss(module(image, visible, 16), image, visible)
        else:
            loss = sum(logits.square().mean() for logits in module(image))
        loss.backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()} | {"loss": loss.detach()}

    expected = gradients(network)
    found = gradients(torch.compile(network, backend="aot_eager"))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
