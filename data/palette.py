"""Colours for pictures of labels and predictions. Everything here takes and gives NumPy arrays."""

import cv2
import numpy as np


def voc_palette(num_colours: int = 256) -> np.ndarray:
    """The PASCAL VOC palette, (num_colours, 3) uint8 RGB: bit i of every colour spells the class index."""
    index = np.arange(num_colours)[:, None] >> (3 * np.arange(8))             # (N, 8) three bits a step
    bits = (index[..., None] >> np.arange(3)) & 1                             # (N, 8, 3): r, g, b
    return (bits << (7 - np.arange(8))[None, :, None]).sum(axis=1).astype(np.uint8)


VOC = voc_palette()
CITYSCAPES = (  # of the 19 classes, as the data set's authors draw them
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))


def colour_classes(class_id: np.ndarray, palette: np.ndarray = VOC) -> np.ndarray:
    """Class ids (H, W) -> RGB uint8 (H, W, 3); `palette` (n, 3) holds the colour of each class, void (255) is white."""
    ids = class_id.astype(np.int64)
    return np.where((ids == 255)[..., None], np.uint8(255), palette[ids % len(palette)])


def colour_depth(depth_m: np.ndarray) -> np.ndarray:
    """Metres (H, W) -> RGB uint8 (H, W, 3), near = red, far = blue, stretched between the 2nd and 98th percentile."""
    valid = (depth_m > 0) & (depth_m < 255)
    if not valid.any():
        return np.zeros((*depth_m.shape, 3), np.uint8)
    near, far = depth_range(depth_m)
    grey = 255 - np.clip((depth_m - near) / max(far - near, 1e-6), 0, 1) * 255
    rgb = cv2.cvtColor(cv2.applyColorMap(grey.astype(np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return np.where(valid[..., None], rgb, np.uint8(0))


def depth_range(depth_m: np.ndarray) -> tuple[float, float]:
    """The nearest and farthest depth that `colour_depth` tells apart, in metres."""
    valid = depth_m[(depth_m > 0) & (depth_m < 255)]
    return (float(np.percentile(valid, 2)), float(np.percentile(valid, 98))) if valid.size else (0.0, 0.0)


def colour_normals(normals: np.ndarray) -> np.ndarray:
    """Unit vectors (H, W, 3) -> RGB uint8, component c as (c + 1) / 2 * 255; zero and void vectors are black."""
    void = (np.abs(normals).sum(axis=-1) == 0) | (normals > 1.5).any(axis=-1)
    rgb = np.clip((normals + 1) * 127.5, 0, 255).astype(np.uint8)
    return np.where(void[..., None], np.uint8(0), rgb)


def colour_probability(probability: np.ndarray) -> np.ndarray:
    """Probabilities (H, W) in [0, 1] -> grey RGB uint8 (H, W, 3); void (255) is mid-grey."""
    grey = np.where(probability > 1.5, 127, np.clip(probability, 0, 1) * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
