"""A 3 x 3 convolution of an enlarged map, computed on the small one.

Convolution and bilinear enlargement are linear, and mixing channels commutes with anything that acts on pixels alone.
So each of the nine kernel entries mixes the channels of the small map, and the sum over them moves into the
interpolation: with scale 4 the channel mixing costs a sixteenth. The result is the same but for rounding, at the
border too.

Axes: B batch, C in, O out, h w small grid, H W enlarged grid, u v kernel row and column.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class UpsampledConv(nn.Module):
    """Bilinear enlargement by `scale` (align_corners False), then a 3 x 3 convolution with padding 1 and bias.

    (B, C, h, w) -> (B, O, scale * h, scale * w)
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.weight, self.bias, self.scale = conv.weight, conv.bias, scale

    def forward(self, feat: Tensor) -> Tensor:
        kernel = rearrange(self.weight, "o c u v -> (o u v) c 1 1")
        mixed = F.conv2d(feat, kernel)  # (B, O u v, h, w)
        rows, columns = (self._interpolation(length, mixed) for length in feat.shape[-2:])  # (u h, H), (v w, W)
        mixed = rearrange(mixed, "b (o u v) h w -> b o (u h) (v w)", u=3, v=3)
        return rows.T @ (mixed @ columns) + self.bias[:, None, None]  # (B, O, H, W)

    def plain(self, feat: Tensor) -> Tensor:
        """The same as the definition reads. For tests and time measurements."""
        fine = F.interpolate(feat, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return F.conv2d(fine, self.weight, self.bias, padding=1)

    def _interpolation(self, length: int, like: Tensor) -> Tensor:
        """(3 * length, scale * length): at [(u, i), p] the weight of small pixel i in enlarged pixel p + u - 1."""
        unit = torch.eye(length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        weights = F.interpolate(unit[None], scale_factor=self.scale, mode="linear", align_corners=False)[0]
        size = self.scale * length
        padded = F.pad(weights, (1, 1))  # (length, size + 2): the convolution's zeros
        return torch.cat([padded[:, u:u + size] for u in range(3)]).to(like.dtype)
