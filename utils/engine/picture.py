"""A picture in any of the forms that `predict` takes, as an array."""

from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import declared_size, read_rgb

MIN_SIDE = 32               # one cell of the coarsest feature map
Picture = str | PathLike | np.ndarray | Image.Image


def as_rgb(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture in any of its forms; sizes are checked before anything is decoded."""
    if isinstance(picture, (str, PathLike)):
        declared_size(Path(picture))
        image, name = read_rgb(picture), str(picture)
    elif isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"a Pillow image of mode {picture.mode} has no defined white; give its path, or 8 bits")
        image, name = np.asarray(picture.convert("RGB")), "the picture"
    else:
        name, shape = "the array", np.shape(picture) if isinstance(picture, np.ndarray) else ()
        if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or picture.dtype != np.uint8:
            found = f"an array {shape} {picture.dtype}" if shape else f"a {type(picture).__name__}"
            raise ValueError(f"a picture is a path, an array (H, W, 3) or (H, W) of uint8, or a Pillow image, not "
                             f"{found}")
        image = np.ascontiguousarray(np.repeat(picture[..., None], 3, 2) if picture.ndim == 2 else picture)
    if min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(f"{name} has {image.shape[0]} x {image.shape[1]} pixels; every side must have at least "
                         f"{MIN_SIDE}")
    return image


def pixels_of(picture: Picture) -> int:
    """How many pixels a picture has, from its header; 0 where that cannot be told."""
    if isinstance(picture, np.ndarray):
        return picture.shape[0] * picture.shape[1]
    if isinstance(picture, Image.Image):
        return picture.width * picture.height
    if not isinstance(picture, (str, PathLike)):
        return 0
    try:
        height, width = declared_size(Path(picture))
    except (ValueError, OSError):
        return 0
    return height * width
