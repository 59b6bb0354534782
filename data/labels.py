"""Label rules: what reading, transforms and collation must know of a task's label, and nothing else of the task.

Most labels are maps (`MapLabel`). A label of another kind, such as a list of boxes, is a class of its own with the
same methods: transforms and loaders call these and never look into a label.
Maps are H x W x C float32 arrays; void is 255 in every channel.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import cv2
import numpy as np

VOID = 255.0
NEAREST = {"corner": cv2.INTER_NEAREST, "centre": cv2.INTER_NEAREST_EXACT}
INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "cubic": cv2.INTER_CUBIC}


class LabelRules(ABC):
    """What happens to a label while its image is prepared. Sizes are (height, width)."""

    guides_crop: bool = False       # whether its classes tell a varied crop from a dull one (`transforms.RandomCrop`)
    is_map: ClassVar[bool] = False  # whether it is an array H x W x C, of which a data set may want another size
    mirror_signs: tuple[int, ...] = ()      # of the channels once the image is mirrored left to right; (): all 1

    @abstractmethod
    def fit(self, label: Any, size: tuple[int, int]) -> Any:
        """The label of a file, brought to the size of its image."""

    def size_of(self, label: Any) -> tuple[int, int] | None:
        """Of the picture that the label of a file describes; None where it does not say."""
        return None

    def same_view(self, label: tuple[int, int], image: tuple[int, int]) -> bool:
        """Whether a label of this size can show what an image of that size shows."""
        return True

    def doubts(self, label: Any) -> str:
        """Why the label of a file may not be what it should be, in words; empty where nothing is strange."""
        return ""

    @abstractmethod
    def resize(self, label: Any, size: tuple[int, int]) -> Any:
        """At another size, values as they are."""

    def regrid(self, label: Any, size: tuple[int, int]) -> Any:
        """At the size that a data set wants its labels to have, whatever the image's; of maps only."""
        return self.resize(label, size)

    def nearer(self, values: Any, factor: float) -> Any:
        """Values, of an array or a tensor, as they are once the camera has come nearer by `factor`."""
        return values

    def scale(self, label: Any, size: tuple[int, int], factor: float) -> Any:
        """The image was enlarged by `factor` to `size`, as if the camera had come nearer."""
        return self.nearer(self.resize(label, size), factor)

    @abstractmethod
    def crop(self, label: Any, top: int, left: int, size: tuple[int, int]) -> Any:
        """Of at most `size`, cut out at this corner."""

    @abstractmethod
    def flip(self, label: Any) -> Any:
        """Mirrored left to right."""

    @abstractmethod
    def pad(self, label: Any, frame: tuple[int, int]) -> Any:
        """Centred in a larger frame (rounded down)."""

    def mark_void(self, label: Any) -> Any:
        """With what carries no supervision marked."""
        return label

    def is_void(self, label: Any) -> bool:
        """Whether the label of a file supervises nothing."""
        return False

    def known(self, label: Any) -> dict[str, Any]:
        """What a label tells of its image besides what is to be predicted, such as a camera; for "meta"."""
        return {}

    def of_photograph(self, size: tuple[int, int], camera: str = "") -> Any:
        """The label of a photograph of which nothing is known but a file with its camera, if that; else None.

        Only what is `known` of it is used. A label of this kind is prepared with its image, too.
        """
        return None

    def onto(self, prediction: Any, known: Mapping[str, Any]) -> Any:
        """A prediction for the frame that the network saw, for the picture of which this is `known`; no maps."""
        return prediction

    @abstractmethod
    def to_tensor(self, label: Any) -> Any:
        """As the loss takes it, of one image."""

    def absent(self, size: tuple[int, int]) -> Any:
        """What stands for the label of an image that has none, as `to_tensor` gives it: nothing is supervised."""
        raise ValueError(f"labels of kind {type(self).__name__} cannot be missing")

    def collate(self, labels: Sequence[Any]) -> Any:
        """The labels of a batch's images together."""
        return list(labels)


@dataclass(frozen=True)
class MapLabel(LabelRules):
    """A label map.

    channels: C. interp: how a file of another size is brought to the image's. pad_value: what padding holds.
    guides_crop: for maps of class ids. grid: which pixels a smaller grid of labels takes, "corner" 0, 2, 4 ... or
    "centre" 1, 3, 5 ... of twice as many.
    """

    channels: int = 1
    interp: str = "nearest"
    pad_value: float = VOID
    guides_crop: bool = False
    grid: Literal["corner", "centre"] = "corner"

    is_map: ClassVar[bool] = True

    def size_of(self, label: np.ndarray) -> tuple[int, int]:
        return label.shape[:2]

    def same_view(self, label: tuple[int, int], image: tuple[int, int]) -> bool:
        return same_aspect(label, image)

    def is_void(self, label: np.ndarray) -> bool:
        return bool(np.all(self.mark_void(label) == VOID))

    def fit(self, label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return label if label.shape[:2] == size else resize_map(label, size, INTERPOLATION[self.interp])

    def resize(self, label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize_map(label, size, cv2.INTER_NEAREST)

    def regrid(self, label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize_map(label, size, NEAREST[self.grid])

    def crop(self, label: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
        return crop_map(label, top, left, size)

    def flip(self, label: np.ndarray) -> np.ndarray:
        mirrored = flip_map(label)
        for channel, sign in enumerate(self.mirror_signs):
            if sign < 0:
                np.negative(mirrored[..., channel], out=mirrored[..., channel])
        return mirrored

    def pad(self, label: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
        return pad_map(label, frame, self.pad_value)

    def to_tensor(self, label: np.ndarray) -> Any:
        return map_to_tensor(label)

    def absent(self, size: tuple[int, int]) -> Any:
        return map_to_tensor(np.full((*size, self.channels), VOID, np.float32))

    def collate(self, labels: Sequence[Any]) -> Any:
        return stack(labels)


@dataclass(frozen=True)
class DepthLabel(MapLabel):
    """Depth in metres: a nearer camera divides it; 0 means "not measured"."""

    pad_value: float = 0.0

    def nearer(self, values: Any, factor: float) -> Any:
        return values / factor

    def mark_void(self, label: np.ndarray) -> np.ndarray:
        return _with_void(label, label[..., 0] == 0)


@dataclass(frozen=True)
class DisparityLabel(DepthLabel):
    """Disparity in pixels: a nearer camera multiplies it; 0 means "not measured"."""

    def nearer(self, values: Any, factor: float) -> Any:
        return values * factor


@dataclass(frozen=True)
class NormalsLabel(MapLabel):
    """Unit vectors (x to the right): mirroring negates x; a zero vector has no direction."""

    channels: int = 3
    interp: str = "cubic"
    pad_value: float = 0.0
    mirror_signs: tuple[int, ...] = (-1, 1, 1)

    def doubts(self, label: np.ndarray) -> str:
        length = np.linalg.norm(label, axis=-1)
        directed = length[~(length < 0.1)]                 # near zero: no direction
        off = ~(np.abs(directed - 1) < 0.1)
        if directed.size == 0 or off.mean() <= 0.5:
            return ""
        return (f"{off.mean():.0%} of its vectors are not of unit length (mean length {directed.mean():.2f}): stored "
                "in another encoding, or no normals?")

    def mark_void(self, label: np.ndarray) -> np.ndarray:
        return _with_void(label, (label[..., 0] == 0) & (label[..., 1] == 0) & (label[..., 2] == 0))


@dataclass(frozen=True)
class EdgeLabel(MapLabel):
    """Boundaries: 1 on them, 0 elsewhere."""

    def doubts(self, label: np.ndarray) -> str:
        share = float((label[label != VOID] >= 0.5).mean()) if (label != VOID).any() else 0.0
        return f"{share:.0%} of its pixels are boundaries: is it inverted?" if share > 0.5 else ""


@dataclass(frozen=True)
class PartsLabel(MapLabel):
    """Body parts: a map (also a crop) without any person supervises nothing, not even its background."""

    def mark_void(self, label: np.ndarray) -> np.ndarray:
        return label if np.any((label != 0) & (label != VOID)) else np.full_like(label, VOID)


def same_aspect(label: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, up to the rounding of the smaller one's sides."""
    small, large = sorted((label, image))
    return abs(small[0] * large[1] - small[1] * large[0]) <= max(large)


def _with_void(label: np.ndarray, void: np.ndarray) -> np.ndarray:
    """The label with 255 in every channel of the pixels `void` (H, W); a copy of the same memory order, if any."""
    if not void.any():
        return label
    marked = label.copy(order="K")
    for channel in range(label.shape[2]):
        np.copyto(marked[..., channel], np.float32(VOID), where=void)
    return marked


def flip_map(array: np.ndarray) -> np.ndarray:
    """Mirrored left to right: a copy by OpenCV, since whatever reads a mirrored view of NumPy's takes far longer."""
    return cv2.flip(array, 1).reshape(array.shape)


def resize_map(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """H x W x C -> size[0] x size[1] x C; OpenCV drops a single channel."""
    return cv2.resize(array, size[::-1], interpolation=interpolation).reshape(*size, array.shape[2])


def crop_map(array: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """A view, no copy."""
    return array[top:top + size[0], left:left + size[1]]


def pad_map(array: np.ndarray, frame: tuple[int, int], value: float) -> np.ndarray:
    """H x W x C -> frame[0] x frame[1] x C, centred; the memory is channel-first, as tensors want it."""
    height, width, channels = array.shape
    top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
    memory = np.empty((channels, *frame), array.dtype)
    canvas = memory.transpose(1, 2, 0)                             # (C, H, W) memory seen as (H, W, C)
    canvas[:top] = canvas[top + height:] = value
    canvas[top:top + height, :left] = canvas[top:top + height, left + width:] = value
    canvas[top:top + height, left:left + width] = array
    return canvas


def map_to_tensor(array: np.ndarray, dtype: np.typing.DTypeLike = np.float32) -> Any:
    """H x W x C array -> C x H x W tensor; no copy where type and memory order are right already."""
    import torch  # here, so that label rules and data sets can be read without it
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype))


def stack(tensors: Sequence[Any]) -> Any:
    """B tensors of one shape -> (B, ...); in a worker process in the memory that the batch travels in."""
    import torch

    from data.lending import room
    return torch.stack(list(tensors), out=room((len(tensors), *tensors[0].shape), tensors[0].dtype))
