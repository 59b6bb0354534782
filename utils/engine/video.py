"""Videos and cameras: frame by frame through a network, in constant memory, to one MP4 that shows all tasks."""

import itertools
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from utils.engine.prediction import Answer, TaskResult
from utils.engine.predictor import Framed, Predictor
from utils.engine.tasks import TASKS
from utils.files import MAX_PIXELS
from utils.progress import Progress

logger = logging.getLogger(__name__)

CAMERA = "camera:"
TILE_WIDTH = 640            # at most, of the picture and of each task
USUAL_RATE = 25.0           # frames a second, where a file or a camera does not say
FOLLOWS = 0.1               # share of a frame's own range of colours in the range that is shown


class Frames:
    """The frames of a video file or a camera, (H, W, 3) uint8 RGB, as they are asked for; upright.

    rate: frames a second. total: how many the file says to have, None where it does not. ValueError where nothing can
    be opened, or the frames are too large.
    """

    def __init__(self, source: str) -> None:
        self.source, self.is_camera, self.read = source, source.startswith(CAMERA), 0
        if not self.is_camera and not Path(source).is_file():
            raise FileNotFoundError(f"file not found: {source}")
        self._capture = cv2.VideoCapture(int(source.removeprefix(CAMERA)) if self.is_camera else _plain(source))
        if not self._capture.isOpened():
            raise ValueError(f"cannot open {source}: " + ("there is no such camera" if self.is_camera else
                             "the file is damaged, or no video that this OpenCV reads"))
        width, height, rate, total = (self._capture.get(key) for key in (
            cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        if width * height > MAX_PIXELS:
            raise ValueError(f"{source} has frames of {width:.0f} x {height:.0f} pixels; at most "
                             f"{MAX_PIXELS / 1e6:.0f} megapixels are read")
        self.rate = rate if 0 < rate < 1000 else USUAL_RATE
        self.total = int(total) if not self.is_camera and 0 < total < 1e9 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            while (got := self._capture.read())[0]:
                self.read += 1
                yield cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB)
        finally:
            self._capture.release()
        if not self.read:
            raise ValueError(f"{self.source}: no frame of the video can be read; the file is damaged")
        if self.total and self.read < 0.98 * self.total:
            logger.warning("%s ended after %d of %d frames; is the file damaged?", self.source, self.read, self.total)


def predict_video(predictor: Predictor, source: str, path: Path) -> None:
    """Writes an MP4 with the frames and all tasks side by side, at the source's frame rate, without sound.

    A camera (`camera:0`) is recorded until Ctrl-C, in its own time: what the network cannot keep up with is shown
    longer. The file has its name when it is whole.
    """
    frames = Frames(source)
    writer, began, written = None, time.monotonic(), 0
    part = path.with_name(f".{path.name}.part.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    steady = Steady(predictor)
    try:
        with (Progress(frames.total, Path(source).name, "frame", predictor.config.progress) as progress,
              _ended_by_ctrl_c(frames.is_camera) as asked):
            until = itertools.takewhile(lambda _: not asked.is_set(), frames)
            for _, mosaic, error in predictor.steps(until, predictor.read, show, compute=steady.forward):
                if error is not None:
                    raise error
                writer = writer or _writer(part, frames.rate, mosaic.shape)
                due = round((time.monotonic() - began) * frames.rate) - written if frames.is_camera else 1
                for _ in range(max(1, due)):
                    writer.write(mosaic[..., ::-1])                     # RGB -> BGR
                    written += 1
                progress.step()
        if writer is not None:
            writer.release()
            _check(part, written)
            os.replace(part, path)
    finally:
        if writer is not None:
            writer.release()
        part.unlink(missing_ok=True)


@contextmanager
def _ended_by_ctrl_c(wanted: bool) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, instead of interrupting; the next one interrupts as ever."""
    asked = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def heard(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        logger.info("the recording ends")

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Steady:
    """Ranges of colours that follow a video slowly: with every frame's own, the same depth would flicker."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.ranges: dict[str, np.ndarray] = {}

    def forward(self, framed: Sequence[Framed]) -> list[Answer]:
        """As `Predictor.forward`, with the range in each answer's contexts."""
        return [replace(answer, contexts=self._contexts(answer)) for answer in self.predictor.forward(framed)]

    def _contexts(self, answer: Answer) -> dict:
        contexts = dict(answer.contexts)
        for task, context in contexts.items():
            view = TASKS.load(task).view
            if view.shown_range is not None:
                own = np.array(view.shown_range(answer.at_network_size(task), context))
                self.ranges[task] = own if task not in self.ranges else (
                    (1 - FOLLOWS) * self.ranges[task] + FOLLOWS * own)
                contexts[task] = replace(context, shown=tuple(self.ranges[task].tolist()))
        return contexts


def show(_: np.ndarray, framed: Framed, answer: Answer) -> np.ndarray:
    """The frame and all tasks side by side, RGB uint8; both sides are even, as encoders want them."""
    height, width = framed.image.shape[:2]
    factor = min(1.0, TILE_WIDTH / width)
    size = max(2, round(height * factor) // 2 * 2), max(2, round(width * factor) // 2 * 2)
    tiles = [_tile(framed.image, "", size), *(_tile(result.colour(), _title(result), size)
                                              for result in answer.results(framed.image))]
    columns = math.ceil(math.sqrt(len(tiles)))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


def _title(result: TaskResult) -> str:
    words = [text for _, text in result.legend()] if result.context.shown else []
    return " ".join([result.task, *words])


def _tile(picture: np.ndarray, title: str, size: tuple[int, int]) -> np.ndarray:
    """The picture inside a tile of this size, with a title in its corner."""
    factor = min(size[0] / picture.shape[0], size[1] / picture.shape[1])
    h, w = (min(side, max(1, round(n * factor))) for side, n in zip(size, picture.shape[:2], strict=True))
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    tile = np.zeros((*size, 3), np.uint8)
    tile[top:top + h, left:left + w] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(tile, title, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, thickness, cv2.LINE_AA)
    return tile


def _writer(path: Path, rate: float, shape: tuple[int, ...]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(_plain(str(path)), cv2.VideoWriter_fourcc(*"mp4v"), rate, shape[1::-1])
    if not writer.isOpened():
        raise OSError(f"cannot write {path}: is the folder read-only, or this OpenCV without MPEG-4?")
    return writer


def _check(path: Path, frames: int) -> None:
    """OpenCV does not tell of a full disk; a file that was cut off has not all frames, or cannot be opened."""
    found = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
    if found != frames:
        raise OSError(f"cannot write {path}: of {frames} frames {found:.0f} are in the file; is the disk full?")


def _plain(path: str) -> str:
    """A path that OpenCV can take; one that is no UTF-8 would end the process there."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path!r}: OpenCV opens no video whose name is not UTF-8; rename it") from error
    return path
