"""The vision transformer at the bottleneck, and the fixed positions of its tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MLP_RATIO = 4


def sincos_positions(grid: Sequence[int], channels: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine-cosine positions of the voxels of a grid.

    With d axes: p = channels // (2 d) frequencies 10000^(-j / p); sine and cosine of every axis in turn; zeros where
    the channels are no multiple of 2 d. Computed in torch float32, as the release does: so they equal its stored ones
    to the bit.

    Args:
        grid: voxels per axis.
        channels: width of a token.

    Returns:
        float32 (prod(grid), channels), row-major.

    Raises:
        ValueError: fewer channels than 2 d.
    """
    per_axis = channels // (2 * len(grid))
    if per_axis == 0:
        raise ValueError(
            f"{channels} channels cannot hold positions on {len(grid)} axes: at least {2 * len(grid)} needed"
        )
    omega = 1.0 / 10000 ** (torch.arange(per_axis, dtype=torch.float32, device=device) / per_axis)
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    parts = []
    for coordinate in torch.meshgrid(*axes, indexing="ij"):
        angle = coordinate.flatten()[:, None] * omega
        parts += [angle.sin(), angle.cos()]
    positions = torch.cat(parts, dim=1)
    return nn.functional.pad(positions, (0, channels - positions.shape[1]))


class SelfAttention(nn.Module):
    """Multi-head attention; qkv is laid out (3, heads, head size).

    Args:
        channels: width of a token.
        num_heads: divides the channels.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, C); returns (B, T, C)."""
        by_head = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*by_head.unbind())
        return self.proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them.

    Args:
        channels: width of a token.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, C); returns (B, T, C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block.

    It computes what timm's ``Block`` does, with its parameter names. Importing timm takes seconds, because it imports
    torchvision and torch's compiler.

    Args:
        channels: width of a token.
        num_heads: divides the channels.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn = SelfAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.mlp = FeedForward(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, C); returns (B, T, C)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """Pre-norm transformer blocks on the bottleneck's voxels, and a final LayerNorm.

    Args:
        channels: width of a token.
        n_blocks: number of transformer blocks; with 0 the positions and the norm remain.
        num_heads: heads of each block.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, n_blocks: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {channels} channels of the last stage")
        self.blocks = nn.ModuleList(TransformerBlock(channels, num_heads) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.apply(self.initialize)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Linear layers Xavier uniform with zero bias, as the release has them."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T, C) with positions broadcastable to them; returns (B, T, C)."""
        tokens = tokens + positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)
