"""Small layers of which decoders, necks and backbones are made, their initial weights, their precision."""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from models.ops.norms import has_kernels, layer_norm
from utils.precision import product_dtype

INIT_STD = 0.02  # of initial weights, as usual for the transformers in this field


def init_linear(module: nn.Module) -> None:
    """Truncated normal, std 0.02, zero bias, for every linear layer inside."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def conv_bn_relu(in_channels: int, out_channels: int, *, dilation: int = 1, bias: bool = False) -> nn.Sequential:
    """3 x 3 convolution that keeps the size, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def lite_head(in_channels: int, hidden_channels: int, num_outputs: int, activation: type[nn.Module] = nn.ReLU,
              ) -> nn.Sequential:
    """Head of MTMamba++ (and, with GELU, of TaskPrompter): 3 x 3 convolution, batch norm, ReLU, linear per pixel.

    (B, C, H, W) -> (B, num_outputs, H, W), without activation; the model resizes. Under several CUDA
    processes the batch statistics are synchronised.
    """
    conv = nn.Conv2d(in_channels, hidden_channels, kernel_size=3, padding=1)
    nn.init.trunc_normal_(conv.weight, std=INIT_STD)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(hidden_channels), activation=activation(),
                                     proj=nn.Conv2d(hidden_channels, num_outputs, kernel_size=1)))


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Mixed precision off on the tensor's device. The meta device, which has only shapes, knows no autocast."""
    on = not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
    return torch.autocast(tensor.device.type, enabled=False) if on else nullcontext()


class ProductLayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis whose result goes into products: under autocast it has their type, which spares a
    map in float32 and whatever would be moved around in it. The norm itself is computed in float32."""

    def forward(self, feat: Tensor) -> Tensor:
        dtype = product_dtype(feat, feat.dtype)
        if has_kernels(feat):
            rows = feat.reshape(1, -1, feat.shape[-1])
            return layer_norm(rows, self.weight[None], self.bias[None], self.eps, dtype).view(feat.shape)
        return super().forward(feat).to(dtype)


class ProductLinear(nn.Linear):
    """A linear layer whose gradients of weight and bias are products on a GPU under autocast, and end in float32.

    PyTorch's would sum the bias's row by row, which takes longer than the layer, and round the weight's to half
    precision before they are float32.
    """

    @classmethod
    def take_over(cls, module: nn.Module) -> None:
        """Makes the plain linear layers inside such ones; parameters, their names and initial values stay."""
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = cls

    def forward(self, feat: Tensor) -> Tensor:
        dtype = product_dtype(feat, self.weight.dtype)
        if not feat.is_cuda or dtype == self.weight.dtype or self.bias is None or torch.compiler.is_compiling():
            return super().forward(feat)
        rows = feat.to(dtype).flatten(0, -2)
        return HalfLinear.apply(rows, self.weight, self.bias).unflatten(0, feat.shape[:-1])


class HalfLinear(torch.autograd.Function):
    """Rows (R, in) in half precision, weight (out, in) and bias (out,) in float32 -> (R, out) in half precision."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        weight = weight.to(rows.dtype)
        ctx.save_for_backward(rows, weight)
        return torch.addmm(bias.to(rows.dtype), rows, weight.T)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (grad @ weight if wanted[0] else None,
                float32_product(grad.T, rows) if wanted[1] else None,
                float32_product(grad.new_ones(1, len(grad)), grad)[0] if wanted[2] else None)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices in half precision; only CUDA can give it before it is rounded to theirs."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel, eps 1e-5 unless given: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, feat: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(feat, "b c h w -> b h w c")), "b h w c -> b c h w")


class ChannelMlp(Mlp):
    """Two linear layers with GELU between, pixel by pixel: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, feat: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(feat, "b c h w -> b h w c")), "b h w c -> b c h w")
