"""How fast the boundary score is: one core per image, all thresholds, everything included.

    python scripts/bench_boundary.py [--repeat 3]

The images are rendered: contours of a smooth field crossed with the borders of cells as ground truth; as prediction
the same lines, blurred, displaced and of varying strength, with false lines and noise. Three densities. Columns: the
compiled backend and the SciPy backend (maximum flow).
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.boundary.matching import thin
from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.truth import region_outline, truth_boundary
from scripts.command_line import Command

SIZE = (425, 560)
PROTOCOL = Protocol(max_dist=0.011)
DENSITIES = {"sparse": (50, 1.0, 8), "medium": (24, 1.6, 18), "dense": (16, 2.0, 40)}   # smoothness, levels, cells


def render(seed: int, density: str, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and ground-truth edge picture (0 / 255), both H x W uint8."""
    rng = np.random.default_rng(seed)
    smoothness, levels, cells = DENSITIES[density]
    truth = _lines(rng, size, smoothness, levels, cells)
    false = _lines(rng, size, smoothness, levels / 2, cells // 2)
    y, x = np.mgrid[:size[0], :size[1]].astype(float)
    strength = np.clip(0.55 + 0.25 * _field(rng, size, 20), 0.05, 1)
    soft = gaussian_filter(truth * strength, 1.5) + 0.3 * gaussian_filter(false * 1.0, 1.8)
    soft = map_coordinates(soft, [y + _field(rng, size, 8), x + _field(rng, size, 8)], order=1, mode="nearest")
    soft = 2.6 * soft + 0.008 * np.abs(rng.standard_normal(size))
    return (255 * np.clip(soft, 0, 1)).astype(np.uint8), truth.astype(np.uint8) * 255


def _field(rng: np.random.Generator, size: tuple[int, int], smoothness: float) -> np.ndarray:
    """Smooth noise of unit variance."""
    field = gaussian_filter(rng.standard_normal(size), smoothness, mode="wrap")
    return field / field.std()


def _lines(rng: np.random.Generator, size: tuple[int, int], smoothness: float, levels: float, cells: int) -> np.ndarray:
    contour = np.floor(levels * _field(rng, size, smoothness)).astype(int)
    centres = rng.random((cells, 2)) * size
    y, x = np.mgrid[:size[0], :size[1]] + np.stack([3 * _field(rng, size, 12) for _ in range(2)])
    squared = (y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2        # (cells, H, W)
    return thin(region_outline(1000 * contour + squared.argmin(axis=0)))


def timed(prediction: np.ndarray, picture: np.ndarray, backend: str) -> tuple[float, np.ndarray]:
    """Seconds from the decoded pictures of one image to its counts, and these, (K, 4)."""
    start = time.perf_counter()
    counts = image_counts(prediction, [truth_boundary(picture, "nyud")], PROTOCOL, backend)
    return time.perf_counter() - start, counts


def bench(repeat: int) -> None:
    """Prints the table."""
    print("| image | sumR | compiled s | SciPy s | SciPy / compiled |\n|" + " --- |" * 5)
    for density in DENSITIES:
        images = [render(seed, density) for seed in range(repeat)]
        timed(*images[0], "compiled")                                  # the first call builds the code
        fast, slow = ([timed(*image, backend) for image in images] for backend in ("compiled", "scipy"))
        same = all(np.array_equal(a, b) for (_, a), (_, b) in zip(fast, slow, strict=True))
        seconds = [statistics.median(time for time, _ in times) for times in (fast, slow)]
        print(f"| {density} | {fast[0][1][0, 1]} | {seconds[0]:.2f} | {seconds[1]:.1f} "
              f"| {seconds[1] / seconds[0]:.0f} |{'' if same else '  COUNTS DIFFER'}", flush=True)


main = Command(__doc__, bench, {
    "--repeat": dict(type=int, default=3, metavar="N", help="images per density; the median is shown"),
})

if __name__ == "__main__":
    sys.exit(main())
