"""Patches of a latent image as tokens, with sine-cosine positions that the graph computes itself."""

import torch
from torch import nn


class DynamicPatchEmbed(nn.Module):
    """diffusers' PatchEmbed with the sine-cosine position embedding computed for the size at hand, in float32.

    The original caches it for one size and recomputes it in float64 for others, which neither stays dynamic in the
    graph nor parses in TensorRT. Arguments of the sines stay below base_size, so float32 loses nothing that matters.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.proj, self.base_size, self.scale = original.proj, original.base_size, original.interpolation_scale
        self.width = original.pos_embed.shape[-1]

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        patches = self.proj(latent)  # (batch, width, rows, columns)
        rows, columns = patches.shape[-2:]
        along_rows = self.axis_embedding(rows)[:, None].expand(-1, columns, -1)
        along_columns = self.axis_embedding(columns)[None].expand(rows, -1, -1)
        position = torch.cat([along_columns, along_rows], dim=-1).reshape(1, rows * columns, self.width)
        return patches.flatten(2).transpose(1, 2) + position.to(patches.dtype)

    def axis_embedding(self, size: int) -> torch.Tensor:
        """(size, width / 2): sines then cosines of the positions, rescaled to the size the model was trained at."""
        quarter = self.width // 4
        frequency = (1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)).float()
        position = torch.arange(size, dtype=torch.float32) / (size / self.base_size) / self.scale
        angle = position[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)
