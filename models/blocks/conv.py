"""Convolution blocks of InvPT's decoder (Ye and Xu, ECCV 2022) and its successors; the first one of many others."""

from torch import nn


def conv_bn_relu(in_channels: int, out_channels: int, *, dilation: int = 1,
                 bias: bool = False) -> nn.Sequential:
    """3 x 3 convolution that keeps the size, batch norm, ReLU: (B, in, H, W) -> (B, out, H, W)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def up_embedding(in_channels: int, out_channels: int) -> nn.Sequential:
    """To the next finer stage, (B, in, H, W) -> (B, out, 2 H, 2 W): bilinear, then two dilated blocks."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        conv_bn_relu(in_channels, out_channels, dilation=2),
        conv_bn_relu(out_channels, out_channels, dilation=2))


def query_reduction(channels: int) -> nn.Sequential:
    """Queries at half the side, (B, C, H, W) -> (B, C, H / 2, W / 2): depthwise convolution, batch norm."""
    conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))
