"""Predicts with an exported ONNX file; needs onnxruntime and NumPy, and nothing of this program.

    python scripts/run_onnx.py model.onnx photo.png --output predictions
    python scripts/run_onnx.py model.onnx photo.png --image_size 480 640        # of a file whose size is open

Reads .npy arrays (H, W, 3) uint8 and binary .ppm by itself, and whatever Pillow reads where that is installed. Writes
one <task>.npy per task at the picture's own size: classes as numbers, depth in its unit, unit vectors, probabilities.
The picture is scaled to fit the network's input, its aspect ratio kept; predictions are scaled back by taking the
nearest pixel. The input has the experiment's size, as in `--run_mode predict`, unless --image_size says another one.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as reasons

CANNOT_LOAD = tuple(kind for kind in vars(reasons).values() if isinstance(kind, type) and issubclass(kind, Exception))
GREY = 255 * np.array([0.485, 0.456, 0.406], dtype=np.float32)         # what networks see as nothing


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    try:
        image = decoded(path)
    except ImportError:
        sys.exit(f"{path}: without Pillow only .npy and .ppm can be read (pip install pillow)")
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{path} cannot be read as a picture: {error}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        sys.exit(f"{path} must hold (H, W, 3) uint8, got {image.shape} {image.dtype}")
    return image


def decoded(path: Path) -> np.ndarray:
    """What the file holds; ImportError, OSError, ValueError or EOFError where it cannot be told."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.read_bytes()[:2] == b"P6":
        return read_ppm(path.read_bytes())
    from PIL import Image
    return np.asarray(Image.open(path).convert("RGB"))


def read_ppm(data: bytes) -> np.ndarray:
    """A binary PPM of 8 bits, without comments."""
    fields, start = data.split(maxsplit=4)[:4], 0
    for field in fields:
        start = data.index(field, start) + len(field)
    width, height, largest = map(int, fields[1:])
    if largest != 255:
        raise ValueError(f"a .ppm must have 8 bits, this one counts to {largest}")
    return np.frombuffer(data, np.uint8, height * width * 3, start + 1).reshape(height, width, 3)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres aligned, each output pixel the mean of those it covers: (H, W, 3) -> float32."""
    for axis, size in ((0, height), (1, width)):
        image = np.moveaxis(np.tensordot(weights(image.shape[axis], size), image, axes=(1, axis)), 0, axis)
    return image


def weights(old: int, new: int) -> np.ndarray:
    """(new, old): a triangle over the old pixels around each new one, as wide as it is large."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    found = np.clip(1 - np.abs(centres[:, None] - np.arange(old)) / max(scale, 1), 0, None)
    return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)


def input_size(about: dict, asked: list[int] | None) -> tuple[int, int]:
    """(height, width) of the network's input: that of the experiment, or the one that is asked for where it is open."""
    known = about["input"]
    own = (known["height"], known["width"])
    if asked is None or tuple(asked) == own:
        return own
    if "multiple" not in known:
        sys.exit(f"--image_size: this file takes images of {own[0]} x {own[1]} only; export it with --dynamic size")
    if any(side % known["multiple"] or side < known["least"] for side in asked):
        sys.exit(f"--image_size {asked[0]} {asked[1]}: sides must be multiples of {known['multiple']}, from "
                 f"{known['least']} on")
    return tuple(asked)


def predict(session: onnxruntime.InferenceSession, about: dict, image: np.ndarray,
            frame: tuple[int, int]) -> dict[str, np.ndarray]:
    """task -> (H, W) or (H, W, C) at the picture's size. frame: (height, width) of the network's input."""
    scale = min(frame[0] / image.shape[0], frame[1] / image.shape[1])
    height = min(frame[0], max(1, round(image.shape[0] * scale)))
    width = min(frame[1], max(1, round(image.shape[1] * scale)))
    top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
    padded = np.broadcast_to(GREY, (*frame, 3)).copy()
    padded[top:top + height, left:left + width] = resized(image, height, width)
    tasks = list(about["tasks"])
    outputs = session.run(tasks, {about["input"]["name"]: padded.transpose(2, 0, 1)[None]})
    rows = np.minimum((np.arange(image.shape[0]) + 0.5) * height / image.shape[0], height - 1).astype(int)
    columns = np.minimum((np.arange(image.shape[1]) + 0.5) * width / image.shape[1], width - 1).astype(int)
    found = {}
    for task, output in zip(tasks, outputs, strict=True):
        whole = output[0].transpose(1, 2, 0)                            # (h, w, C), of labels of any size
        y = (top + rows) * whole.shape[0] // frame[0]
        x = (left + columns) * whole.shape[1] // frame[1]
        found[task] = whole[y][:, x].squeeze()
    return found


def main() -> None:
    """Writes the predictions and says what they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--output", type=Path, default=Path("predictions"))
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="of the network's input, where the file leaves it open; default: that of the experiment")
    args = parser.parse_args()
    for path in (args.model, args.picture):
        if not path.is_file():
            sys.exit(f"no file {path}")
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3              # errors: constants that it does not fold are none
        session = onnxruntime.InferenceSession(str(args.model), options, providers=["CPUExecutionProvider"])
    except CANNOT_LOAD as error:
        sys.exit(f"{args.model} cannot be loaded by onnxruntime {onnxruntime.__version__}; is the file whole, with its "
                 f".data beside it? It says: {str(error).splitlines()[0]}")
    stored = session.get_modelmeta().custom_metadata_map.get("mtdp")
    if stored is None:
        sys.exit(f"{args.model} was not written by --run_mode export --format onnx")
    about = json.loads(stored)
    args.output.mkdir(parents=True, exist_ok=True)
    frame = input_size(about, args.image_size)
    for task, prediction in predict(session, about, read_picture(args.picture), frame).items():
        np.save(args.output / f"{task}.npy", prediction)
        classes = about["tasks"][task]["classes"]
        if classes:
            numbers, counts = np.unique(prediction, return_counts=True)
            largest = sorted(zip(counts, numbers, strict=True), reverse=True)[:3]
            said = ", ".join(f"{classes[int(number)]} {100 * count / prediction.size:.0f} %"
                             for count, number in largest)
        else:
            said = f"{prediction.min():.3g} to {prediction.max():.3g} {about['tasks'][task]['unit']}"
        print(f"{args.output / task}.npy: {said}")


if __name__ == "__main__":
    main()
