"""Edge maps as PNG files, the input of the external and internal boundary benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch import Tensor


def crop_from_padding(padded: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of a padded map at the original size (H, W): offset floor((padded - size) / 2)."""
    (height, width), (full_h, full_w) = size, padded.shape[:2]
    if height > full_h or width > full_w:
        raise ValueError(f"image of {height} x {width} cannot be cut from a map of {full_h} x {full_w}")
    top, left = (full_h - height) // 2, (full_w - width) // 2
    return padded[top:top + height, left:left + width]


def edge_maps(prob: Tensor, meta: Sequence[Mapping]) -> list[np.ndarray]:
    """The boundary maps of a batch at their original sizes, each H x W uint8.

    prob (B, 1, H, W) edge probability in the padded frame; meta holds each image's "size" (H, W) in it, and its
    "original" one where it was resized into the frame: such a map is brought back (bilinear). Values are 255 * prob
    *truncated*, not rounded: as in the original programs' files, which the boundary scores depend on.
    """
    if len(prob) != len(meta):
        raise ValueError(f"{len(prob)} edge maps and {len(meta)} entries of meta must be equally many")
    scaled = (prob[:, 0].float() * 255).cpu().numpy()                  # (B, H, W)
    if bad := [image.get("name", "?") for padded, image in zip(scaled, meta, strict=True) if np.isnan(padded).any()]:
        raise ValueError(f"the predicted edge probability of {', '.join(map(str, bad))} is not a number (NaN)")
    return [_at_original_size(padded, image).astype(np.uint8)                         # truncates
            for padded, image in zip(scaled, meta, strict=True)]


def _at_original_size(padded: np.ndarray, image: Mapping) -> np.ndarray:
    cut = np.ascontiguousarray(crop_from_padding(padded, image["size"]))
    if "original" not in image:
        return cut
    return cv2.resize(cut, image["original"][::-1], interpolation=cv2.INTER_LINEAR)


def save_edge_maps(prob: Tensor, meta: Sequence[Mapping], folder: str | Path) -> list[Path]:
    """Write `<folder>/<name>.png`, 8 bit, one per image (see `edge_maps`); returns the paths."""
    maps = edge_maps(prob, meta)
    paths = [Path(folder) / f"{image['name']}.png" for image in meta]
    for path, picture in zip(paths, maps, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)     # a name may have a folder
        Image.fromarray(picture).save(path)
    return paths
