"""The two folder layouts: which files an image has, and what each of them holds."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from scripts.example_data.labels import LABELS, PART_NAMES, VOC_NAMES
from scripts.example_data.render import Rendered

MAT_HEADER = b"MATLAB 5.0 MAT-file, example data set"  # scipy's own text holds the time of day


@dataclass(frozen=True)
class Layout:
    """The folder of one data set."""

    style: str                      # key of scene.PEOPLE
    lists: str                      # folder of train.txt and val.txt
    id_format: str                  # number 1, 2, ... -> id of an image
    contents: Mapping[str, Callable[[Rendered], object]]    # file, {} = id -> what is saved there

    def image_id(self, number: int) -> str:
        """Id of image `number` (1, 2, ...)."""
        return self.id_format.format(number)

    def files(self, number: int) -> list[str]:
        """Paths, relative to the layout's folder, of all files of image `number`."""
        return [file.format(self.image_id(number)) for file in self.contents]

    def save(self, folder: Path, number: int, rendered: Rendered) -> None:
        """Write all files of image `number`; their folders exist."""
        for file, content in zip(self.files(number), self.contents.values(), strict=True):
            _save(folder / file, content(rendered))


def _save(path: Path, content: object) -> None:
    """An array, a picture or, for .mat, a list of objects or a dict of variables, in the format of the suffix."""
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix != ".mat":
        picture = content if isinstance(content, Image.Image) else Image.fromarray(content)
        picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    elif isinstance(content, dict):
        _save_mat(path, content)
    else:
        save_parts(path, path.stem, content)


def _save_mat(path: Path, variables: dict) -> None:
    """savemat with a fixed header text, so that equal contents give equal bytes."""
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=True)
    path.write_bytes(MAT_HEADER.ljust(116) + buffer.getvalue()[116:])


def encode_normals(rendered: Rendered) -> np.ndarray:
    """Unit normals (H, W, 3) to 8 bit, component = 2 * v / 255 - 1."""
    return np.rint((rendered.normals + 1) * 127.5).astype(np.uint8)


def indexed_semseg(rendered: Rendered) -> Image.Image:
    """The VOC classes as a picture with a palette, as the originals are."""
    indexed = Image.fromarray(rendered.pascal_semseg, mode="P")
    indexed.putpalette(np.random.default_rng(0).integers(60, 256, 21 * 3, np.uint8).tobytes())
    return indexed


def pascal_objects(rendered: Rendered) -> list[dict]:
    """Visible things of the 20 PASCAL classes, as save_parts takes them."""
    objects = []
    for instance in np.unique(rendered.instances):
        class_id = LABELS[rendered.names[instance]].pascal
        if class_id:
            mask = rendered.instances == instance
            visible = np.unique(rendered.part_names[mask])
            parts = {PART_NAMES[part - 1]: mask & (rendered.part_names == part) for part in visible if part}
            objects.append({"class_id": class_id, "mask": mask, "parts": parts})
    return objects


def save_parts(path: Path, image_id: str, objects: list[dict]) -> None:
    """A PASCAL-Part file: struct `anno` with imname and objects, each with class, class_ind, mask and parts.

    objects: dicts with class_id (1..20), mask (H, W) bool, parts: dict part name -> mask (H, W) bool, may be empty.
    """
    rows = []
    for item in objects:
        parts = [(part, mask.astype(np.uint8)) for part, mask in item["parts"].items()]
        rows.append((VOC_NAMES[item["class_id"]], np.uint8(item["class_id"]), item["mask"].astype(np.uint8),
                     _struct(("part_name", "mask"), parts) if parts else np.zeros((0, 0))))
    stored = _struct(("class", "class_ind", "mask", "parts"), rows)
    _save_mat(path, {"anno": _struct(("imname", "objects"), [(image_id, stored)])})


def _struct(fields: tuple[str, ...], rows: list[tuple]) -> np.ndarray:
    """A MATLAB struct array (1, number of rows)."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


LAYOUTS = {
    "NYUDv2": Layout("nyud", "gt_sets", "{:04d}", {
        "images/{}.png": lambda rendered: rendered.image,
        "segmentation/{}.png": lambda rendered: rendered.nyud_semseg,
        "depth/{}.npy": lambda rendered: rendered.depth_m,
        "normals/{}.png": encode_normals,
        "edge/{}.png": lambda rendered: rendered.edge.astype(np.uint8) * 255,
    }),
    "PASCALContext": Layout("pascal", "ImageSets/Context", "2008_{:06d}", {
        "JPEGImages/{}.jpg": lambda rendered: rendered.image,
        "semseg/VOC12/{}.png": indexed_semseg,
        "human_parts/{}.mat": pascal_objects,
        "pascal-context/trainval/{}.mat": lambda rendered: {"LabelMap": rendered.label_map},
        "normals_distill/{}.png": encode_normals,
        "sal_distill/{}.png": lambda rendered: rendered.saliency,
    }),
}
