"""The three folder layouts: which files an image has, and what each of them holds."""

import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.io import savemat

from scripts.example_data.labels import LABELS, PART_NAMES, VOC_NAMES
from scripts.example_data.render import Rendered, render_scene, render_street

MAT_HEADER = b"MATLAB 5.0 MAT-file, example data set"  # scipy's own text holds the time of day


class Layout(NamedTuple):
    """The folder of one data set."""

    render: Callable[..., Any]      # (seed, size) -> the maps of one image
    lists: str                      # folder of train.txt and val.txt; empty: the ids name the split
    id_format: str                  # number 1, 2, ... and split -> id of an image
    contents: Mapping[str, Callable[[Any, str], object]]    # file, {} = id -> what is saved there

    def image_id(self, number: int, split: str) -> str:
        """Id of image `number` (1, 2, ...)."""
        return self.id_format.format(number, split=split)

    def files(self, number: int, split: str) -> list[str]:
        """Paths, relative to the layout's folder, of all files of image `number`."""
        return [file.format(self.image_id(number, split)) for file in self.contents]

    def split_lists(self) -> list[str]:
        """Paths of the split lists, those of train and val, or none."""
        return [f"{self.lists}/{split}.txt" for split in ("train", "val")] if self.lists else []

    def save(self, folder: Path, number: int, split: str, rendered: Any) -> None:
        """Write all files of image `number`, in the formats of their suffixes; their folders exist."""
        for file, content in zip(self.files(number, split), self.contents.values(), strict=True):
            path, found = folder / file, content(rendered, self.image_id(number, split))
            if path.suffix == ".mat":
                buffer = io.BytesIO()
                savemat(buffer, found, do_compression=True)
                path.write_bytes(MAT_HEADER.ljust(116) + buffer.getvalue()[116:])    # equal contents, equal bytes
            elif path.suffix == ".json":
                path.write_text(json.dumps(found), encoding="ascii")
            elif path.suffix == ".npy":
                np.save(path, found)
            else:
                picture = found if isinstance(found, Image.Image) else Image.fromarray(found)
                picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def encode_normals(rendered: Rendered, image_id: str) -> np.ndarray:
    """Unit normals (H, W, 3) to 8 bit, component = 2 * v / 255 - 1."""
    return np.rint((rendered.normals + 1) * 127.5).astype(np.uint8)


def indexed_semseg(rendered: Rendered, image_id: str) -> Image.Image:
    """The VOC classes as a picture with a palette, as the originals are."""
    indexed = Image.fromarray(rendered.pascal_semseg, mode="P")
    indexed.putpalette(np.random.default_rng(0).integers(60, 256, 21 * 3, np.uint8).tobytes())
    return indexed


def annotation(rendered: Rendered, image_id: str) -> dict[str, np.ndarray]:
    """A PASCAL-Part file: struct `anno` with imname and objects, each with class, class_ind, mask and parts.

    The objects are the visible things of the 20 PASCAL classes; parts may be empty, else part_name and mask.
    """
    objects = []
    for instance in np.unique(rendered.instances):
        class_id = LABELS[rendered.names[instance]].pascal
        if class_id:
            mask = rendered.instances == instance
            parts = [(PART_NAMES[part - 1], (mask & (rendered.part_names == part)).astype(np.uint8))
                     for part in np.unique(rendered.part_names[mask]) if part]
            objects.append((VOC_NAMES[class_id], np.uint8(class_id), mask.astype(np.uint8),
                            _struct(("part_name", "mask"), parts) if parts else np.zeros((0, 0))))
    stored = _struct(("class", "class_ind", "mask", "parts"), objects)
    return {"anno": _struct(("imname", "objects"), [(image_id, stored)])}


def _struct(fields: tuple[str, ...], rows: list[tuple]) -> np.ndarray:
    """A MATLAB struct array (1, number of rows)."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


LAYOUTS = {
    "NYUDv2": Layout(partial(render_scene, style="nyud"), "gt_sets", "{:04d}", {
        "images/{}.png": lambda rendered, _: rendered.image,
        "segmentation/{}.png": lambda rendered, _: rendered.nyud_semseg,
        "depth/{}.npy": lambda rendered, _: rendered.depth_m,
        "normals/{}.png": encode_normals,
        "edge/{}.png": lambda rendered, _: rendered.edge.astype(np.uint8) * 255,
    }),
    "PASCALContext": Layout(partial(render_scene, style="pascal"), "ImageSets/Context", "2008_{:06d}", {
        "JPEGImages/{}.jpg": lambda rendered, _: rendered.image,
        "semseg/VOC12/{}.png": indexed_semseg,
        "human_parts/{}.mat": annotation,
        "pascal-context/trainval/{}.mat": lambda rendered, _: {"LabelMap": rendered.label_map},
        "normals_distill/{}.png": encode_normals,
        "sal_distill/{}.png": lambda rendered, _: rendered.saliency,
    }),
    "cityscapes": Layout(render_street, "", "{split}/exampletown/exampletown_{0:06d}_000019", {
        "leftImg8bit/{}_leftImg8bit.png": lambda street, _: street.image,
        "gtFine/{}_gtFine_labelIds.png": lambda street, _: street.label_ids,
        "disparity/{}_disparity.png": lambda street, _: street.disparity,
        "gtBbox3d/{}_gtBbox3d.json": lambda street, _: street.boxes,
    }),
}
