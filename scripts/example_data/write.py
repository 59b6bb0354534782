"""Both folder layouts of the example data set, rendered in parallel, all or nothing.

A marker with the parameters stands in the folder: MARKER once everything is written, PARTIAL while a run is
under way or after one that was interrupted. Only files named by a marker are ever removed, so a folder with
real data in it is safe. Every image has its own random stream (seed, layout, number): the bytes do not depend
on the number of workers."""

import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

from scripts.example_data.labels import LABELS, PART_NAMES
from scripts.example_data.render import Rendered, render_scene

MARKER, PARTIAL = "example.json", "example.partial.json"
RENDERER = 1  # raise it when the same parameters give other bytes
NYUD, PASCAL = "NYUDv2", "PASCALContext"
VOC_NAMES = {
    5: "bottle",
    8: "cat",
    9: "chair",
    11: "diningtable",
    12: "dog",
    15: "person",
    16: "pottedplant",
    18: "sofa",
    20: "tvmonitor",
}
PERSON = 15
LISTS = ((NYUD, "gt_sets"), (PASCAL, "ImageSets/Context"))
MAT_HEADER = b"MATLAB 5.0 MAT-file, example data set"  # scipy's own text holds the time of day


def image_files(layout: str, name: str) -> list[str]:
    """Paths, relative to the root, of all files of image `name` in `layout` (NYUD or PASCAL)."""
    if layout == NYUD:
        places = ("images/{}.png", "segmentation/{}.png", "depth/{}.npy", "normals/{}.png", "edge/{}.png")
    else:
        places = (
            "JPEGImages/{}.jpg",
            "semseg/VOC12/{}.png",
            "human_parts/{}.mat",
            "pascal-context/trainval/{}.mat",
            "normals_distill/{}.png",
            "sal_distill/{}.png",
        )
    return [f"{layout}/{place.format(name)}" for place in places]


def image_name(layout: str, number: int) -> str:
    """Id of image `number` (1, 2, ...): 0001 for NYUD, 2008_000001 for PASCAL."""
    return f"{number:04d}" if layout == NYUD else f"2008_{number:06d}"


def write_example(
    root: str | Path,
    num_train: int = 160,
    num_val: int = 40,
    size: tuple[int, int] = (160, 224),
    seed: int = 0,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> bool:
    """Render num_train + num_val images of size (H, W) for each layout into root/NYUDv2 and
    root/PASCALContext.

    Returns True when it rendered, False when an equal data set was there already. Raises ValueError for
    parameters out of range, FileExistsError for a folder that holds other parameters, an interrupted run
    (both are rendered again with overwrite=True) or data that this function did not write (never touched).
    """
    root = Path(root)
    wanted = {
        "renderer": RENDERER,
        "num_train": num_train,
        "num_val": num_val,
        "size": list(size),
        "seed": seed,
    }
    _check(wanted, workers)
    if _ready(root, wanted, overwrite):
        return False
    _write_json(root / PARTIAL, wanted)
    for path in _all_files(wanted):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    jobs = [(layout, number) for layout, _ in LISTS for number in range(1, num_train + num_val + 1)]
    write_one = partial(_write_image, root, tuple(size), seed)
    for _ in tqdm(_spread(write_one, jobs, workers), total=len(jobs), unit="image", disable=None if progress else True):
        pass
    _write_lists(root, num_train, num_val)
    _write_json(root / MARKER, wanted)
    (root / PARTIAL).unlink()
    return True


def _check(wanted: dict, workers: int) -> None:
    ranges = {"num_train": (1, 5000), "num_val": (1, 4999), "seed": (0, 2**31 - 1)}
    values = {key: (wanted[key], *ranges[key]) for key in ranges} | {"workers": (workers, 1, 256)}
    values |= {f"size[{i}]": (length, 32, 4096) for i, length in enumerate(wanted["size"])}
    for key, (value, low, high) in values.items():
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(
                f"{key} is {value!r}; the example data set takes a whole number from {low} to {high}"
            )
    if len(wanted["size"]) != 2:
        raise ValueError(f"size is {wanted['size']}; give two numbers, height and width")


def _ready(root: Path, wanted: dict, overwrite: bool) -> bool:
    """Whether the data set is there already; otherwise clears the way or says what stands in it."""
    old = next((root / name for name in (PARTIAL, MARKER) if (root / name).is_file()), None)
    if old is None:
        foreign = [str(root / layout) for layout, _ in LISTS if (root / layout).exists()]
        if foreign:
            raise FileExistsError(
                f"{' and '.join(foreign)} was not written by this command and is left alone; "
                "choose another folder for the example data set"
            )
        root.mkdir(parents=True, exist_ok=True)
        return False
    found = _read_json(old)
    if old.name == MARKER and found == wanted:
        return True
    if not overwrite:
        state = "an unfinished run" if old.name == PARTIAL else "an example data set"
        shown = ", ".join(f"{key} {value}" for key, value in found.items())
        raise FileExistsError(
            f"{root} holds {state} with other or incomplete contents ({shown}); "
            "render it again with --overwrite or choose another folder"
        )
    if old.name == MARKER:
        os.replace(old, root / PARTIAL)  # from here on an interruption is visible
    _remove(root, found)
    return False


def _remove(root: Path, found: dict) -> None:
    """Delete the files that a data set with parameters `found` consists of, and the folders that become
    empty."""
    (root / MARKER).unlink(missing_ok=True)
    folders = set()
    for path in _all_files(found):
        (root / path).unlink(missing_ok=True)
        folders.update(Path(path).parents[:-1])
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        if (root / folder).is_dir() and not any((root / folder).iterdir()):
            (root / folder).rmdir()


def _all_files(parameters: dict) -> list[str]:
    numbers = range(1, parameters["num_train"] + parameters["num_val"] + 1)
    files = [f"{layout}/{folder}/{split}.txt" for layout, folder in LISTS for split in ("train", "val")]
    for layout, _ in LISTS:
        files += [path for number in numbers for path in image_files(layout, image_name(layout, number))]
    return files


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        return {key: found[key] for key in ("renderer", "num_train", "num_val", "size", "seed")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a marker of the example data set; move it away or choose another folder"
        ) from error


def _write_json(path: Path, content: dict) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content) + "\n")
    os.replace(draft, path)


def _write_lists(root: Path, num_train: int, num_val: int) -> None:
    for layout, folder in LISTS:
        names = [image_name(layout, number) for number in range(1, num_train + num_val + 1)]
        for split, part in (("train", names[:num_train]), ("val", names[num_train:])):
            (root / layout / folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in part))


def _spread(function, jobs: list, workers: int) -> Iterable[None]:
    """function(job) for every job, in this process or in `workers` fresh ones."""
    if workers == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, jobs, chunksize=4)


def _write_image(root: Path, size: tuple[int, int], seed: int, job: tuple[str, int]) -> None:
    layout, number = job
    stream = [seed, (NYUD, PASCAL).index(layout), number]
    rendered = render_scene(stream, size, "nyud" if layout == NYUD else "pascal")
    paths = [root / path for path in image_files(layout, image_name(layout, number))]
    (_write_nyud if layout == NYUD else _write_pascal)(rendered, paths)


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit normals (H, W, 3) to 8 bit, component = 2 * v / 255 - 1."""
    return np.rint((normals + 1) * 127.5).astype(np.uint8)


def _write_nyud(rendered: Rendered, paths: list[Path]) -> None:
    image, semseg, depth, normals, edge = paths
    Image.fromarray(rendered.image).save(image)
    Image.fromarray(rendered.nyud_semseg).save(semseg)
    np.save(depth, rendered.depth_m)
    Image.fromarray(encode_normals(rendered.normals)).save(normals)
    Image.fromarray(rendered.edge.astype(np.uint8) * 255).save(edge)


def _write_pascal(rendered: Rendered, paths: list[Path]) -> None:
    image, semseg, parts, context, normals, saliency = paths
    Image.fromarray(rendered.image).save(image, quality=95)
    indexed = Image.fromarray(rendered.pascal_semseg, mode="P")
    indexed.putpalette(np.random.default_rng(0).integers(60, 256, 21 * 3, np.uint8).tobytes())
    indexed.save(semseg)
    write_pascal_parts_mat(parts, parts.stem, pascal_objects(rendered))
    _write_mat(context, {"LabelMap": rendered.label_map})
    Image.fromarray(encode_normals(rendered.normals)).save(normals)
    Image.fromarray(rendered.saliency).save(saliency)


def pascal_objects(rendered: Rendered) -> list[dict]:
    """Visible things of the 20 PASCAL classes, as write_pascal_parts_mat takes them."""
    objects = []
    for instance in np.unique(rendered.instances):
        class_id = LABELS[rendered.names[instance]].pascal
        if not class_id:
            continue
        mask = rendered.instances == instance
        visible = np.unique(rendered.part_names[mask])
        parts = {PART_NAMES[part - 1]: mask & (rendered.part_names == part) for part in visible if part}
        objects.append({"class_id": class_id, "mask": mask, "parts": parts})
    return objects


def write_pascal_parts_mat(path: Path, name: str, objects: list[dict]) -> None:
    """A PASCAL-Part file: struct `anno` with imname and objects, each with class, class_ind, mask and parts.

    objects: dicts with class_id (1..20), mask (H, W) bool, parts: dict part name -> mask (H, W) bool, may be
    empty.
    """
    stored = np.empty((1, len(objects)), [(key, object) for key in ("class", "class_ind", "mask", "parts")])
    for i, item in enumerate(objects):
        parts = np.empty((1, len(item["parts"])), [("part_name", object), ("mask", object)])
        for j, (part, mask) in enumerate(item["parts"].items()):
            parts[0, j] = (part, mask.astype(np.uint8))
        class_id = item["class_id"]
        stored[0, i] = (
            VOC_NAMES[class_id],
            np.uint8(class_id),
            item["mask"].astype(np.uint8),
            parts if item["parts"] else np.zeros((0, 0)),
        )
    anno = np.empty((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = (name, stored)
    _write_mat(path, {"anno": anno})


def _write_mat(path: Path, variables: dict) -> None:
    """savemat with a fixed header text, so that equal contents give equal bytes."""
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=True)
    path.write_bytes(MAT_HEADER.ljust(116) + buffer.getvalue()[116:])
