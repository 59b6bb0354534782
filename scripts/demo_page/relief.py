"""A predicted depth as a coloured surface in space: one GLB file (glTF 2.0), which browsers and 3-D programs open."""

import json
import math
import struct
from pathlib import Path

import cv2
import numpy as np

from utils.engine.prediction import Prediction, TaskResult

MOST_POINTS = 90_000
FLOAT, UNSIGNED_BYTE, UNSIGNED_INT, VERTICES, ELEMENTS = 5126, 5121, 5125, 34962, 34963       # glTF's codes
JUMP = 0.08             # of the depth, between neighbours: there the surface is cut


def find_relief(prediction: Prediction) -> tuple[TaskResult, TaskResult | None] | None:
    """The metric depth and the normals among the results; None where there is no depth in metres."""
    results = list(prediction.values())
    depth = next((result for result in results if result.unit == "m"), None)
    normals = next((result for result in results if result.unit == "unit vector"), None)
    return None if depth is None else (depth, normals)


def surface(depth: np.ndarray, view_degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Points (H * W, 3) of depths (H, W) in metres, and triangles (n, 3) between neighbours without a jump.

    Axes as in glTF: x right, y up, z towards the viewer. view_degrees: the camera's field of view along the longer
    side; a photograph does not say it, and depths alone do not tell.
    """
    height, width = depth.shape
    focal = max(height, width) / (2 * math.tan(math.radians(view_degrees) / 2))
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    points = np.stack(((columns - width / 2) * depth / focal, (height / 2 - rows) * depth / focal, -depth), axis=-1)
    index = np.arange(height * width).reshape(height, width)
    corners = np.stack((index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]), axis=-1).reshape(-1, 4)
    at = depth.ravel()[corners]
    whole = (at.max(axis=1) - at.min(axis=1) < JUMP * at.min(axis=1)) & (at.min(axis=1) > 0)
    corners = corners[whole]
    triangles = np.concatenate((corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]))
    return points.reshape(-1, 3).astype(np.float32), triangles.astype(np.uint32)


def write_relief(prediction: Prediction, view_degrees: float, path: Path) -> Path | None:
    """The picture painted onto its predicted depth, lit by its predicted normals; None where no depth is in metres."""
    if (found := find_relief(prediction)) is None:
        return None
    depth, normals = found
    scale = min(1.0, math.sqrt(MOST_POINTS / depth.array.size))
    size = max(2, round(depth.array.shape[1] * scale)), max(2, round(depth.array.shape[0] * scale))
    points, triangles = surface(cv2.resize(depth.array, size, interpolation=cv2.INTER_NEAREST), view_degrees)
    colours = cv2.resize(prediction.image, size, interpolation=cv2.INTER_AREA).reshape(-1, 3)
    vectors = None
    if normals is not None:
        vectors = cv2.resize(normals.array, size, interpolation=cv2.INTER_NEAREST).reshape(-1, 3)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    path.write_bytes(glb(points, triangles, colours, vectors))
    return path


def glb(points: np.ndarray, triangles: np.ndarray, colours: np.ndarray, normals: np.ndarray | None = None) -> bytes:
    """A GLB file of one mesh: points (n, 3), triangles (m, 3), colours (n, 3) uint8 sRGB, unit normals (n, 3)."""
    linear = np.where(colours <= 10, colours / 3294.6, ((colours / 255 + 0.055) / 1.055) ** 2.4)    # as glTF wants them
    rgba = np.concatenate((np.round(linear * 255), np.full((len(colours), 1), 255)), axis=1).astype(np.uint8)
    parts = {"POSITION": (points.astype("<f4"), FLOAT, "VEC3"), "COLOR_0": (rgba, UNSIGNED_BYTE, "VEC4")}
    if normals is not None:
        parts["NORMAL"] = (normals.astype("<f4"), FLOAT, "VEC3")
    blocks = [*parts.values(), (triangles.astype("<u4").reshape(-1), UNSIGNED_INT, "SCALAR")]
    accessors, views, start = [], [], 0
    for number, (values, kind, shape) in enumerate(blocks):
        views.append({"buffer": 0, "byteOffset": start, "byteLength": values.nbytes,
                      "target": ELEMENTS if shape == "SCALAR" else VERTICES})
        accessors.append({"bufferView": number, "componentType": kind, "count": len(values), "type": shape,
                          **({"normalized": True} if kind == UNSIGNED_BYTE else {})})
        start += values.nbytes
    accessors[0] |= {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
    primitive = {"attributes": {name: i for i, name in enumerate(parts)}, "indices": len(parts), "material": 0}
    scene = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}], "accessors": accessors, "bufferViews": views,
        "buffers": [{"byteLength": start}],
        "materials": [{"doubleSided": True, "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]}
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    body = b"".join(values.tobytes() for values, *_ in blocks)
    total = 12 + 8 + len(text) + 8 + len(body)
    return b"".join((struct.pack("<4sII", b"glTF", 2, total), struct.pack("<I4s", len(text), b"JSON"), text,
                     struct.pack("<I4s", len(body), b"BIN\0"), body))
