"""The convolutions of MLoRE (Yang et al., CVPR 2024), computed at less cost than their definitions read.

Axes: B batch, C channels in, O out, E experts, R all ranks together, h w grid, H W enlarged grid, u v row and column.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from models.blocks.stacked import TaskConv


class LowRankExperts(nn.Module):
    """sum_i g_i (M_i (W_i * feat + b_i) + m_i): feat (B, C, h, w), gates (B, E) -> (B, C, h, w).

    Expert i is a 3 x 3 convolution C -> r_i directly followed by a 1 x 1 convolution r_i -> C. Their gated sum needs no
    loop over experts: all first convolutions are one convolution to R = sum r_i channels, scaling those by the gates
    commutes with the second ones, and these sum up in one product. It also avoids holding E full maps.
    The experts lie one behind the other: W and b in `down`, M in the columns of `up`, m in the rows of `up_bias`.
    The biases start as zeros.
    """

    def __init__(self, channels: int, ranks: Sequence[int]):
        super().__init__()
        self.ranks = tuple(ranks)
        self.down = nn.Conv2d(channels, sum(ranks), kernel_size=3, padding=1)
        self.up = nn.Parameter(torch.empty(channels, sum(ranks)))
        self.up_bias = nn.Parameter(torch.empty(len(ranks), channels))
        owner = [index for index, rank in enumerate(ranks) for _ in range(rank)]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)  # (R,): the expert of each rank
        for up, rank in zip(self.up.split(self.ranks, dim=1), self.ranks, strict=True):
            nn.init.uniform_(up, -rank**-0.5, rank**-0.5)  # of an ordinary 1 x 1 convolution
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up_bias)

    def forward(self, feat: Tensor, gates: Tensor) -> Tensor:
        hidden = self.down(feat)  # (B, R, h, w)
        gates = gates.to(hidden.dtype)
        hidden = hidden * gates[:, self.owner, None, None]
        return F.conv2d(hidden, self.up[:, :, None, None]) + (gates @ self.up_bias)[..., None, None]

    def plain(self, feat: Tensor, gates: Tensor) -> Tensor:
        """The same as the definition reads: E full maps, then their weighted sum. For tests and time measurements."""
        parts = zip(self.down.weight.split(self.ranks), self.down.bias.split(self.ranks),
                    self.up.split(self.ranks, dim=1), self.up_bias, strict=True)
        maps = [F.conv2d(F.conv2d(feat, w, b, padding=1), m[:, :, None, None], c) for w, b, m, c in parts]
        return (torch.stack(maps, dim=1) * gates[..., None, None, None]).sum(dim=1)  # (B, E, C, h, w) -> (B, C, h, w)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Every expert as one 3 x 3 convolution with padding 1: kernels (E, C, C, 3, 3) and biases (E, C).

        Exact at the border too, since padding acts before W.
        """
        parts = list(zip(self.up.split(self.ranks, dim=1), self.down.weight.split(self.ranks),
                         self.down.bias.split(self.ranks), strict=True))
        kernels = torch.stack([einsum(up, down, "o r, r c u v -> o c u v") for up, down, _ in parts])
        return kernels, torch.stack([up @ bias for up, _, bias in parts]) + self.up_bias


class OwnExperts(nn.Module):
    """One expert per task, scaled by one factor: (B, T C, h, w), factors (B, T) -> (B, T C, h, w).

    An expert is as in `LowRankExperts`: 3 x 3 to its rank, then 1 x 1. It starts like two ordinary convolutions.
    """

    def __init__(self, num_tasks: int, channels: int, rank: int):
        super().__init__()
        self.num_tasks = num_tasks
        self.down = TaskConv(num_tasks, channels, rank, kernel_size=3)
        self.up = nn.Parameter(torch.empty(num_tasks * channels, rank))
        self.up_bias = nn.Parameter(torch.empty(num_tasks, channels))
        for values in (self.up, self.up_bias):
            nn.init.uniform_(values, -rank**-0.5, rank**-0.5)

    def forward(self, feat: Tensor, factor: Tensor) -> Tensor:
        hidden = self.down(feat).unflatten(1, (self.num_tasks, -1))  # (B, T, r, h, w)
        factor = factor.to(hidden.dtype)[..., None, None, None]
        out = F.conv2d((hidden * factor).flatten(1, 2), self.up[:, :, None, None], groups=self.num_tasks)
        bias = self.up_bias[..., None, None].to(out.dtype)
        return torch.addcmul(out.unflatten(1, (self.num_tasks, -1)), factor.to(out.dtype), bias).flatten(1, 2)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Every expert as one 3 x 3 convolution with padding 1: kernels (T, C, C, 3, 3) and biases (T, C)."""
        up, down, bias = (x.unflatten(0, (self.num_tasks, -1)) for x in (self.up, self.down.weight, self.down.bias))
        return einsum(up, down, "t o r, t r c u v -> t o c u v"), einsum(up, bias, "t o r, t r -> t o") + self.up_bias


class UpsampledConv(nn.Module):
    """Bilinear enlargement by `scale` (align_corners False), then a 3 x 3 convolution with padding 1 and bias.

    (B, C, h, w) -> (B, O, scale * h, scale * w). Convolution and enlargement are linear, and mixing channels commutes
    with anything that acts on pixels alone. So each of the nine kernel entries mixes the channels of the small map, and
    the sum over them moves into the interpolation: with scale 4 the channel mixing costs a sixteenth. The result is the
    same but for rounding, at the border too.
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
        return self.at_input_size(self.enlarged(feat))

    def enlarged(self, feat: Tensor) -> Tensor:
        """Only the enlargement."""
        return F.interpolate(feat, scale_factor=self.scale, mode="bilinear", align_corners=False)

    def at_input_size(self, feat: Tensor) -> Tensor:
        """Only the convolution."""
        return F.conv2d(feat, self.weight, self.bias, padding=1)

    def _interpolation(self, length: int, like: Tensor) -> Tensor:
        """(3 * length, scale * length): at [(u, i), p] the weight of small pixel i in enlarged pixel p + u - 1."""
        unit = torch.eye(length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        weights = F.interpolate(unit[None], scale_factor=self.scale, mode="linear", align_corners=False)[0]
        size = self.scale * length
        padded = F.pad(weights, (1, 1))  # (length, size + 2): the convolution's zeros
        return torch.cat([padded[:, u:u + size] for u in range(3)]).to(like.dtype)
