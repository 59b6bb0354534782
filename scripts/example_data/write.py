"""The folder layouts of the example data set, rendered in parallel, all or nothing.

A marker with the parameters stands in the folder: MARKER once everything is written, PARTIAL while a run is under way
or after one that was interrupted. Only files named by a marker are ever removed, so a folder with real data in it is
safe. Every image has its own random stream (seed, layout, number): the bytes do not depend on the number of workers.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from scripts.example_data.layouts import LAYOUTS

MARKER, PARTIAL = "example.json", "example.partial.json"
RENDERER = 2  # raise it when the same parameters give other bytes
RANGES = {"num_train": (1, 5000), "num_val": (1, 4999), "height": (32, 4096), "width": (32, 4096),
          "seed": (0, 2**31 - 1), "workers": (1, 256)}


def write_example(root: str | Path, num_train: int = 160, num_val: int = 40, size: tuple[int, int] = (128, 160),
                  seed: int = 0, workers: int = 2, overwrite: bool = False, progress: bool = True,
                  layouts: Sequence[str] = tuple(LAYOUTS)) -> bool:
    """Render num_train + num_val images of size (H, W) into root/NYUDv2, PASCALContext, cityscapes, or some of these.

    Returns True when it rendered, False when an equal data set was there already. Raises ValueError for parameters out
    of range, FileExistsError for a folder that holds other parameters, an interrupted run (both are rendered again
    with overwrite=True) or data that this function did not write (never touched).
    """
    root = Path(root)
    wanted = {"renderer": RENDERER, "num_train": num_train, "num_val": num_val, "size": list(size), "seed": seed,
              "layouts": list(layouts)}
    _check(wanted, workers)
    if _ready(root, wanted, overwrite):
        return False
    (root / PARTIAL).write_text(json.dumps(wanted) + "\n")
    for path in _all_files(wanted):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    jobs = _images(wanted)
    done = _spread(partial(_write_image, root, tuple(size), seed), jobs, workers)
    for _ in tqdm(done, total=len(jobs), unit="image", disable=None if progress else True):
        pass
    for name in layouts:
        layout = LAYOUTS[name]
        for split, file in zip(("train", "val"), layout.split_lists(), strict=False):
            ids = [layout.image_id(number, split) for other, number, part in jobs if (other, part) == (name, split)]
            (root / name / file).write_text("".join(f"{image_id}\n" for image_id in ids))
    os.replace(root / PARTIAL, root / MARKER)
    return True


def _check(wanted: dict, workers: int) -> None:
    if unknown := set(wanted["layouts"]) - set(LAYOUTS):
        raise ValueError(f"unknown layout(s) {', '.join(sorted(unknown))}; known: {', '.join(LAYOUTS)}")
    if len(wanted["size"]) != 2:
        raise ValueError(f"size is {wanted['size']}; give two numbers, height and width")
    values = wanted | {"height": wanted["size"][0], "width": wanted["size"][1], "workers": workers}
    for key, (low, high) in RANGES.items():
        if not isinstance(values[key], int) or not low <= values[key] <= high:
            raise ValueError(f"{key} is {values[key]!r}; the example data takes a whole number from {low} to {high}")


def _ready(root: Path, wanted: dict, overwrite: bool) -> bool:
    """Whether the data set is there already; otherwise clears the way or says what stands in it."""
    old = next((root / name for name in (PARTIAL, MARKER) if (root / name).is_file()), None)
    if old is None:
        if foreign := [str(root / layout) for layout in wanted["layouts"] if (root / layout).exists()]:
            raise FileExistsError(f"{' and '.join(foreign)} was not written by this command and is left alone; "
                                  "choose another folder for the example data set")
        root.mkdir(parents=True, exist_ok=True)
        return False
    found = _read_json(old)
    if old.name == MARKER and found == wanted:
        return True
    if not overwrite:
        state = "an unfinished run" if old.name == PARTIAL else "an example data set"
        shown = ", ".join(f"{key} {value}" for key, value in found.items())
        raise FileExistsError(f"{root} holds {state} with other or incomplete contents ({shown}); "
                              "render it again with --overwrite or choose another folder")
    os.replace(old, root / PARTIAL)  # from here on an interruption is visible
    _remove(root, found)
    return False


def _remove(root: Path, found: dict) -> None:
    """Delete the files that a data set with parameters `found` consists of, and the folders that become empty."""
    folders = set()
    for path in _all_files(found):
        (root / path).unlink(missing_ok=True)
        folders.update(Path(path).parents[:-1])
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        if (root / folder).is_dir() and not any((root / folder).iterdir()):
            (root / folder).rmdir()


def _images(parameters: dict) -> list[tuple[str, int, str]]:
    """Layout, number and split of every image."""
    train, val = parameters["num_train"], parameters["num_val"]
    return [(name, i + 1, "train" if i < train else "val") for name in parameters["layouts"]
            for i in range(train + val)]


def _all_files(parameters: dict) -> list[str]:
    lists = [f"{name}/{file}" for name in parameters["layouts"] for file in LAYOUTS[name].split_lists()]
    return lists + [f"{name}/{file}" for name, number, split in _images(parameters)
                    for file in LAYOUTS[name].files(number, split)]


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        found.setdefault("layouts", ["NYUDv2", "PASCALContext"])       # of a marker that names none
        return {key: found[key] for key in ("renderer", "num_train", "num_val", "size", "seed", "layouts")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a marker of the example data set; move it away or choose another "
                         "folder") from error


def _spread(function: Callable, jobs: list, workers: int) -> Iterable[None]:
    """function(job) for every job, in this process or in `workers` fresh ones."""
    if workers == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, jobs, chunksize=4)


def _write_image(root: Path, size: tuple[int, int], seed: int, job: tuple[str, int, str]) -> None:
    name, number, split = job
    layout = LAYOUTS[name]
    layout.save(root / name, number, split, layout.render([seed, list(LAYOUTS).index(name), number], size))
