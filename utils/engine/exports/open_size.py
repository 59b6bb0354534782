"""Images of open size in a graph: height and width are symbols, multiples of one number.

While PyTorch traces, a side is a symbol of which it knows no divisor. Maps behind strides then have sizes like
((h - 1) // 2 + 1 - 1) // 2 + 1, which it can neither simplify nor tell from each other; with them tracing took minutes,
and now and then took a side for a constant. So sizes are said: image, maps of the backbone and what its convolutions of
stride 2 and more give are padded by no pixels to sides that are whole numbers times one symbol, and everything behind
them is counted in that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.task_maps import of_maps

LEAST_CELLS = 2             # of a side: one would be taken for a constant
TRACED_CELLS = (11, 13)     # of an image, in multiples: no side is another's, or one of small windows


@contextmanager
def sizes_said(network: nn.Module, encoder: nn.Module, multiple: int) -> Iterator[None]:
    """Inside, the network's image and the maps that its encoder gives have such sizes."""
    def of_image(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        [image] = inputs
        return _padded(image, *(side // multiple * multiple for side in image.shape[-2:]))

    def of_encoder(_: nn.Module, inputs: tuple[Tensor], maps: Any) -> Any:
        height, width = inputs[0].shape[-2:]
        return of_maps(lambda own: [_padded(feat, height // stride, width // stride)
                                    for feat, stride in zip(own, encoder.strides, strict=True)], maps)

    def of_stride(layer: nn.Conv2d, inputs: tuple[Tensor], feat: Tensor) -> Tensor:
        height, width = inputs[0].shape[-2:]
        return _padded(feat, height // layer.stride[0], width // layer.stride[1])

    strided = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1]
    hooks = [network.register_forward_pre_hook(of_image), encoder.register_forward_hook(of_encoder),
             *(layer.register_forward_hook(of_stride) for layer in strided)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _padded(feat: Tensor, height: int, width: int) -> Tensor:
    return F.pad(feat, (0, width - feat.shape[-1], 0, height - feat.shape[-2]))


def sizes_to_check(size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """The experiment's size, the same turned, a small one and one in between, none of them traced."""
    (height, width), few = size, (LEAST_CELLS * multiple, 3 * multiple)
    return list(dict.fromkeys([(height, width), (width, height), few, (7 * multiple, 4 * multiple)]))
