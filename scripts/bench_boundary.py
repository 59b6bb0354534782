"""How fast the boundary score is, and against what: one core per image, all thresholds, everything included.

    python scripts/bench_boundary.py [--repeat 3] [--twin_limit 60]

The images are rendered: contours of a smooth field crossed with the borders of cells as ground truth; as prediction
the same lines, blurred, displaced and of varying strength, with false lines and noise. Three densities. Columns: the
compiled backend, the SciPy backend (maximum flow), and the plain twin (scikit-image's `thin` and SciPy's
`maximum_bipartite_matching`), which is stopped after --twin_limit seconds per image because its time varies by orders
of magnitude.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.morphology import thin as skimage_thin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.boundary.matching import candidates, pick_backend, thin
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


def plain_counts(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Matches and prediction pixels at each threshold, (K, 2), with the libraries alone."""
    levels, distance = PROTOCOL.levels(prediction), PROTOCOL.distance(prediction.shape)
    counts = []
    for k in range(len(PROTOCOL.thresholds)):
        lines = skimage_thin(levels > k)
        graph = candidates(lines, truth, distance)[2]
        counts.append([(maximum_bipartite_matching(graph, perm_type="column") >= 0).sum(), lines.sum()])
    return np.array(counts)


def score(prediction: np.ndarray, picture: np.ndarray, backend: str) -> np.ndarray:
    """Everything for one image, from the decoded pictures to the counts (K, 4)."""
    truth = truth_boundary(picture, "nyud")
    if backend != "plain":
        return image_counts(prediction, [truth], PROTOCOL, backend)
    return plain_counts(prediction, truth)


def timed(function: Callable, *arguments: object) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def timed_in_child(limit: float, *arguments: object) -> tuple[float, object] | None:
    """`timed(score, *arguments)` in a process of its own, or None if that takes longer than `limit` seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(pick_backend)                                       # imports are not part of the time
        try:
            return pool.apply_async(timed, (score, *arguments)).get(limit)
        except multiprocessing.TimeoutError:
            return None


def bench(repeat: int, twin_limit: float) -> None:
    """Prints the table."""
    print("| image | sumR | compiled s | SciPy s | plain twin s | SciPy / compiled |\n|" + " --- |" * 6)
    for density in DENSITIES:
        images = [render(seed, density) for seed in range(repeat)]
        score(*images[0], "compiled")                                  # the first call builds the code
        fast = [timed(score, *image, "compiled") for image in images]
        slow = [timed(score, *image, "scipy") for image in images]
        same = all(np.array_equal(a[1], b[1]) for a, b in zip(fast, slow, strict=True))
        plain = timed_in_child(twin_limit, *images[0], "plain") if twin_limit else None
        if plain is not None:
            same &= np.array_equal(plain[1], fast[0][1][:, 2:])
        seconds = [statistics.median(time for time, _ in times) for times in (fast, slow)]
        twin = f"{plain[0]:.1f}" if plain else f"> {twin_limit:g} (stopped)" if twin_limit else "-"
        print(f"| {density} | {fast[0][1][0, 1]} | {seconds[0]:.2f} | {seconds[1]:.1f} | {twin} "
              f"| {seconds[1] / seconds[0]:.0f} |{'' if same else '  COUNTS DIFFER'}", flush=True)


main = Command(__doc__, bench, {
    "--repeat": dict(type=int, default=3, metavar="N", help="images per density; the median is shown"),
    "--twin_limit": dict(type=float, default=60, metavar="S", help="seconds; 0: without the plain twin"),
})

if __name__ == "__main__":
    sys.exit(main())
