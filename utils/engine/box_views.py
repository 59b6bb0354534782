"""Vehicles in space for people: boxes in the picture, the street from above with distances, and the official JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from data.boxes_file import VEHICLES, prediction_json
from data.boxes_label import Boxes3DLabel
from evaluation.evaluator import TaskContext
from utils.boxes3d import EDGES, NEAREST_M, Boxes3D
from utils.engine.views import Colour, Legend, View, with_ending

SHOWN = 0.3                  # predictions below this score are not drawn; the files have them
WIDTH = 1024                 # smaller pictures are enlarged, so that distances can be read
PALETTE: tuple[Colour, ...] = ((60, 220, 60), (255, 170, 30), (240, 80, 220), (90, 160, 255), (255, 80, 80),
                               (250, 240, 70))                               # of the six classes
FRONT = ((2, 6), (3, 7))     # pairs of corners: the front of a box is crossed out
FAR_M, SIDE_M, RING_M = 60.0, 20.0, 10.0         # what is seen from above: ahead, to either side, and a line every
DARK, GREY, WHITE = (24, 26, 30), (90, 95, 100), (255, 255, 255)


def shown(boxes: Boxes3D) -> Boxes3D:
    """The vehicles that are drawn, the farthest first."""
    kept = boxes if boxes.scores is None else boxes.select(boxes.scores >= SHOWN)
    return kept.select(kept.centers[:, 2].argsort(descending=True))


def distances_m(boxes: Boxes3D) -> np.ndarray:
    """On the ground, from the camera (n,)."""
    return boxes.centers[:, [0, 2]].norm(dim=1).cpu().numpy()


def _picture(boxes: Boxes3D, context: TaskContext, rgb: np.ndarray) -> np.ndarray:
    """The image with boxes, and in its corner the street from above; enlarged to at least `WIDTH` pixels."""
    boxes, scale = shown(boxes), max(1, -(-WIDTH // rgb.shape[1]))
    canvas = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else rgb.copy()
    per_pixel = np.array(canvas.shape[1::-1]) / boxes.image_size.flip(0).cpu().numpy()
    for number, (line, far) in enumerate(zip(_outlines(boxes), distances_m(boxes), strict=True)):
        colour = PALETTE[int(boxes.labels[number])]
        for start, end in line:
            ends = [tuple(np.rint((point + 0.5) * per_pixel - 0.5).astype(int).tolist()) for point in (start, end)]
            cv2.line(canvas, *ends, colour, max(2, canvas.shape[1] // 600), cv2.LINE_AA)
        at = np.nanmin(np.where(np.isfinite(line), line, np.nan).reshape(-1, 2), axis=0) if len(line) else np.zeros(2)
        name = VEHICLES[int(boxes.labels[number])]
        _write(canvas, f"{name} {far:.0f} m", np.clip(at * per_pixel, 0, None) - (0, 4), colour)
    inset = _from_above(boxes, int(0.46 * canvas.shape[0]))
    place = canvas[:inset.shape[0], canvas.shape[1] - inset.shape[1]:]
    place[:] = cv2.addWeighted(place, 0.15, inset, 0.85, 0)
    return canvas


def _outlines(boxes: Boxes3D) -> Iterator[np.ndarray]:
    """Of each vehicle the edges before the camera, (edges, 2, 2): u and v of both ends."""
    intrinsics = boxes.intrinsics.cpu().numpy()
    for corners in boxes.corners().cpu().numpy():
        lines = corners[np.array([*EDGES, *_crossed()])]                     # (edges, 2, 3)
        depth = lines[..., 2]
        lines = lines[(depth > NEAREST_M).any(axis=1)]
        for line in lines:                                                   # cut what reaches behind the camera
            for behind in np.flatnonzero(line[:, 2] <= NEAREST_M):
                other = line[1 - behind]
                share = (NEAREST_M - line[behind, 2]) / (other[2] - line[behind, 2])
                line[behind] += share * (other - line[behind])
        pixels = lines @ intrinsics.T
        yield np.clip(pixels[..., :2] / pixels[..., 2:], -1e4, 1e4)


def _crossed() -> tuple[tuple[int, int], ...]:
    """The diagonals of the front."""
    (a, b), (c, d) = FRONT
    return (a, d), (c, b)


def _from_above(boxes: Boxes3D, height: int) -> np.ndarray:
    """The street seen from above, the camera at the bottom; a line every `RING_M` metres."""
    per_metre = height / (FAR_M + 4)
    width = int(2 * SIDE_M * per_metre)
    canvas = np.full((height, width, 3), DARK, np.uint8)

    def place(x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.stack([width / 2 + x * per_metre, height - (z + 2) * per_metre], axis=-1).round().astype(np.int32)

    for metres in np.arange(RING_M, FAR_M + 1, RING_M):
        start, end = place(np.array([-SIDE_M, SIDE_M]), np.array([metres, metres]))
        cv2.line(canvas, start.tolist(), end.tolist(), GREY, 1)
        _write(canvas, f"{metres:.0f} m", start + (2, -2), GREY)
    cv2.fillPoly(canvas, [place(np.array([-0.8, 0.8, 0.0]), np.array([-1.5, -1.5, 1.5]))], WHITE)
    for label, corners in zip(boxes.labels.tolist(), boxes.corners().cpu().numpy(), strict=True):
        ground = place(corners[:4, 0], corners[:4, 2])                       # back left, back right, front right, left
        cv2.polylines(canvas, [ground], True, PALETTE[label], max(1, height // 250), cv2.LINE_AA)
        cv2.line(canvas, ground[:2].mean(axis=0).astype(int).tolist(), ground[2:].mean(axis=0).astype(int).tolist(),
                 PALETTE[label], 1, cv2.LINE_AA)
    return canvas


def _write(canvas: np.ndarray, text: str, place: np.ndarray, colour: Colour) -> None:
    """At `place` (x, y), the lower left corner."""
    x, y = int(min(place[0], canvas.shape[1] - 30)), int(min(max(place[1], 12), canvas.shape[0] - 2))
    size = max(0.35, canvas.shape[1] / 2800)
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def _legend(boxes: Boxes3D, context: TaskContext) -> Legend:
    """Each class that is drawn, with the number of vehicles and the nearest one's distance."""
    boxes = shown(boxes)
    far, labels = distances_m(boxes), boxes.labels.cpu().numpy()
    counts = {number: (labels == number).sum() for number in np.unique(labels).tolist()}
    return [(PALETTE[number], f"{VEHICLES[number]}: {count}, from {far[labels == number].min():.1f} m")
            for number, count in counts.items()]


def _key(context: TaskContext) -> Legend:
    return list(zip(PALETTE, VEHICLES, strict=True))


# Files ------------------------------------------------------------------------------------------------------------


def _write_json(path: Path, boxes: Boxes3D, context: TaskContext) -> Path:
    path = with_ending(path, ".json")
    path.write_text(json.dumps(prediction_json(boxes, VEHICLES), indent=1) + "\n", encoding="ascii")
    return path


def _format(context: TaskContext) -> str:
    return ("JSON of the Cityscapes 3D evaluation: center and dimensions in metres and rotation as a quaternion (w "
            "first), in the vehicle's coordinates; 2d: xmin, ymin, width, height in pixels of the image")


def save_boxes(predictions: Sequence[Boxes3D], meta: Sequence[Mapping], folder: Path) -> None:
    """One file per image, also for those without vehicles; none for images of whose camera nothing is known."""
    for boxes, image in zip(predictions, meta, strict=True):
        if "camera" in image:
            path = with_ending(folder / image["name"], ".json")
            path.write_text(json.dumps(prediction_json(Boxes3DLabel().onto(boxes, image), VEHICLES)), encoding="ascii")


BOXES = View(_picture, _legend, _key, _write_json, _format, unit="m")
