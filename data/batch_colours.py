"""The colours of a batch, changed where the network runs (`augmentation.photometric_on_device`).

The workers draw as ever and hand the images over in 8 bits, a quarter of the bytes; here the changes of
`data.photometric` are applied to all images of a batch at once, in the same 8-bit steps: sums and products of whole
numbers, which float32 holds exactly. Only back from HSV one value in 20 000 is a level away from OpenCV's, and more at
the ends of rows that do not fill the processor's registers, where OpenCV rounds what it truncates elsewhere.

B batch, H W pixels. Channels are RGB 0..255; hue is 0..179 as OpenCV has it in 8 bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from data.transforms import MEAN, STD

STEP = 4096.0                # OpenCV's fixed point


def with_colours(batch: Mapping) -> Mapping:
    """The batch as it would be had its workers changed the colours; one without "colours" as it is."""
    if "colours" not in batch:
        return batch
    rest = {key: value for key, value in batch.items() if key != "colours"}
    changes, size = batch["colours"].split((5, 2), dim=1)
    image = _normalised(changed(batch["image"], changes))
    return rest | {"image": torch.where(_inside(size, image), image, 0.0)}


def changed(image: Tensor, changes: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 after `changes` (B, 5), a value for each of `photometric.CHANGES`, NaN: none.

    Whole numbers 0..255 in float32.
    """
    light, first, colourful, turn, last = changes[..., None, None].split(1, dim=1)           # each (B, 1, 1, 1)
    rgb = _linear(image.float(), 1.0, light.nan_to_num(0.0))
    rgb = _linear(rgb, first.nan_to_num(1.0))
    hue, saturation, value = _hsv(rgb)
    rgb = torch.where(colourful.isnan(), rgb, _rgb(hue, _linear(saturation, colourful), value))
    hue, saturation, value = _hsv(rgb)
    rgb = torch.where(turn.isnan(), rgb, _rgb((hue + turn).remainder(180.0), saturation, value))
    return _linear(rgb, last.nan_to_num(1.0))


def _linear(levels: Tensor, alpha: Tensor | float, beta: Tensor | float = 0.0) -> Tensor:
    return (levels * alpha + beta).clamp(0.0, 255.0).floor()


def _hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) -> hue, saturation and value, (B, 1, H, W) each: OpenCV's 8-bit conversion."""
    red, green, blue = rgb.split(1, dim=1)
    value = rgb.amax(dim=1, keepdim=True)
    spread = value - rgb.amin(dim=1, keepdim=True)
    per_value = (255.0 * STEP / value.clamp(min=1.0)).round()
    per_spread = (180.0 * STEP / (6.0 * spread.clamp(min=1.0))).round()
    sixths = torch.where(value == red, green - blue, torch.where(
        value == green, blue - red + 2.0 * spread, red - green + 4.0 * spread))
    hue = ((sixths * per_spread + STEP / 2) / STEP).floor()
    return torch.where(hue < 0, hue + 180.0, hue), ((spread * per_value + STEP / 2) / STEP).floor(), value


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The way back, (B, 3, H, W), truncated: around the circle each channel rises, stays, and falls again."""
    sixths = hue * (6.0 / 180.0)
    part = sixths - sixths.floor()
    sector = (sixths.floor() + hue.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder(6.0)
    lacking = torch.where(sector == 0, part, torch.where(sector < 3, 1.0, torch.where(sector == 3, 1.0 - part, 0.0)))
    return (value * (1 / 255) * (1.0 - saturation * (1 / 255) * lacking) * 255.0).floor()


def _normalised(rgb: Tensor) -> Tensor:
    mean, std = (rgb.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (rgb / 255.0 - mean) / std


def _inside(size: Tensor, image: Tensor) -> Tensor:
    """Which pixels of the frame (H, W) show the image of `size` (B, 2) in its middle: (B, 1, H, W)."""
    def along(axis: int) -> Tensor:
        frame, length = image.shape[2 + axis], size[:, axis, None]
        place = torch.arange(frame, device=image.device) - ((frame - length) / 2).floor()
        return (place >= 0) & (place < length)

    return (along(0)[:, :, None] & along(1)[:, None, :])[:, None]
