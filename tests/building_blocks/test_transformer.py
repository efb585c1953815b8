"""The transformer against timm's."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from hyspark_nnunet.building_blocks.transformer import TransformerBlock


@pytest.mark.parametrize("heads", [1, 3])
def test_a_block_computes_what_timms_does(heads: int) -> None:
    """Same names, same random weights for a seed, and features and gradients equal to the bit."""
    made = []
    for block in (partial(TransformerBlock), partial(Block, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-5))):
        torch.manual_seed(0)
        made.append(block(24, heads))
    tokens = torch.randn(2, 10, 24)
    results = []
    for block in made:
        given = tokens.clone().requires_grad_()
        restored = block(given)
        restored.square().sum().backward()
        results.append([restored, given.grad, *(p.grad for p in block.parameters())])
    assert [name for name, _ in made[0].named_parameters()] == [name for name, _ in made[1].named_parameters()]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
