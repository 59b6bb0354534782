"""A trained network as a Python object: pictures in, typed predictions out (`from models import load_model`).

The command line's `predict` is built on the same steps: `frame` makes the network's input of a picture, `forward` runs
the network on a batch, and an `Answer` is decoded task by task at the picture's own size.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.transforms import MEAN, STD
from models.blocks.resize import resize
from models.ops.scan_choice import set_scan_backend
from utils import distributed
from utils.engine.build import task_contexts, trained_model
from utils.engine.config import Config, load_config
from utils.engine.evaluate import forward_pass
from utils.engine.picture import Picture, as_rgb, pixels_of
from utils.engine.pipeline import Done, pipelined
from utils.engine.prediction import Answer, Prediction
from utils.engine.stored_model import find_checkpoint, own_config
from utils.engine.tasks import TASKS, tasks_named
from utils.precision import set_float32_arithmetic

MOST_WORKERS = 16           # threads that read and write
MOST_PIXELS = 32e6          # of the pictures that are under way together; one alone may have more

_one_at_a_time = threading.Lock()       # scan backend and arithmetic are settings of the process


@dataclass(frozen=True)
class Framed:
    """A picture (H, W, 3) uint8, the network's input (3, h, w), and where the picture lies in it: top, left, h, w.

    known: task -> what its rules know of the picture as it is and, under "frame", as the network sees it (a camera).
    """

    image: np.ndarray
    tensor: Tensor
    box: tuple[int, int, int, int]
    known: Mapping[str, dict[str, Any]]


class Predictor:
    """A checkpoint's network, ready to predict. Its methods may be called from several threads.

    tasks: what it predicts; config: its experiment; batch: pictures in one forward pass of `stream`.
    """

    def __init__(self, config: Config, checkpoint: Path, device: torch.device, batch: int | None = None) -> None:
        self.config, self.device, self.checkpoint = config, device, checkpoint
        self.tasks, self.contexts = config.tasks, task_contexts(config)
        together = device.type == "cuda" and not config.test_time.windows             # those have sizes of their own
        self.batch = batch or (config.valBatch if together else 1)
        self._rules = {task: config.dataset.labels[task].rules or row.label
                       for task, row in tasks_named(self.tasks).items()}
        for rules in self._rules.values():
            rules.of_photograph(config.input_size, config.camera_file)   # a file that is none is told at once
        model, self.selection = trained_model(config, checkpoint, device)
        self._forward = forward_pass(model, config, device)

    @classmethod
    def load(cls, source: str | Path, device: str = "auto", config: str | Path | None = None,
             overrides: Sequence[str] = (), batch: int | None = None) -> "Predictor":
        """See `models.load_model`."""
        path = find_checkpoint(source)
        asked = [f"device={device.partition(':')[0]}"] if device != "auto" else []
        settings = load_config(config, [*asked, *overrides]) if config else own_config(path, [*asked, *overrides])
        chosen = torch.device(device) if ":" in device else distributed.pick_device(settings.device)
        return cls(replace(settings, progress=False), path, chosen, batch)

    def __repr__(self) -> str:
        return (f"{self.config.model} on {self.config.backbone} ({self.checkpoint.name}, {self.device}): "
                f"{', '.join(self.tasks)}")

    def predict(self, pictures: Picture | Iterable[Picture]) -> Prediction | list[Prediction]:
        """One picture -> its `Prediction`; several (any iterable of pictures) -> a list, in their order.

        A picture is a path, an array (H, W, 3) or (H, W) uint8, colours as RGB, or a Pillow image. What is none, or
        cannot be read, is a ValueError or FileNotFoundError that names it.
        """
        if isinstance(pictures, (str, PathLike, np.ndarray, Image.Image)):
            [prediction] = self.stream([pictures])
            return prediction
        return list(self.stream(pictures))

    def stream(self, pictures: Iterable[Picture],
               on_error: Callable[[Picture, Exception], None] | None = None) -> Iterator[Prediction]:
        """The predictions of pictures one after the other, read ahead and decoded by threads, in constant memory.

        on_error(picture, error): is told of a picture that cannot be read, which is then left out; without it the error
        is raised.
        """
        steps = self.steps(pictures, self.read, lambda picture, framed, answer:
                           Prediction(framed.image, answer.results(framed.image)))
        for picture, prediction, error in steps:
            if error is None:
                yield prediction
            elif on_error is None:
                raise error
            else:
                on_error(picture, error)

    def steps(self, items: Iterable, read: Callable[[Any], Framed], finish: Callable[[Any, Framed, Answer], Any],
              cost: Callable[[Any], float] = pixels_of,
              compute: Callable[[Sequence[Framed]], list[Answer]] | None = None) -> Iterator[Done]:
        """`pipelined` with this network in the middle (`compute`: what to take for `forward`)."""
        workers = min(max(1, self.config.nworkers), MOST_WORKERS)
        return pipelined(items, read, compute or self.forward, finish, batch=self.batch, workers=workers, cost=cost,
                         most=MOST_PIXELS)

    def read(self, picture: Picture) -> Framed:
        """A picture as the network takes it."""
        return self.frame(as_rgb(picture))

    def frame(self, image: np.ndarray) -> Framed:
        """The network's input for (H, W, 3) uint8 RGB of any size.

        Scaled to fit the frame with its aspect ratio kept, normalised, and padded centrally with the mean colour, as
        images of the data set are. With `test_time.windows` the frame is at least as large as the picture.
        """
        size = self.config.input_size
        if self.config.test_time.windows:
            size = max(size[0], image.shape[0]), max(size[1], image.shape[1])
        scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
        h = min(size[0], max(1, round(image.shape[0] * scale)))
        w = min(size[1], max(1, round(image.shape[1] * scale)))
        inside = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        top, left = (size[0] - h) // 2, (size[1] - w) // 2
        frame = np.zeros((*size, 3), np.float32)
        frame[top:top + h, left:left + w] = (inside.astype(np.float32) / 255 - MEAN) / STD
        known = {}
        for task, rules in self._rules.items():
            known[task] = {"frame": {}}
            if (photograph := rules.of_photograph(image.shape[:2], self.config.camera_file)) is not None:
                framed = rules.pad(rules.resize(photograph, (h, w)), size)
                known[task] = rules.known(photograph) | {"frame": rules.known(framed)}
        tensor = torch.from_numpy(frame).permute(2, 0, 1)                                # (H, W, 3) -> (3, H, W)
        return Framed(image, tensor, (top, left, h, w), known)

    @torch.inference_mode()
    def forward(self, framed: Sequence[Framed]) -> list[Answer]:
        """One forward pass for a batch; the answers stay on the device."""
        images = torch.stack([one.tensor for one in framed]).to(self.device)             # (B, 3, h, w)
        with _one_at_a_time:
            set_scan_backend(self.config.scan_backend)
            set_float32_arithmetic(self.config.precision)
            final = self._forward(images)
        outputs: list[dict[str, Any]] = [{} for _ in framed]
        for task, output in final.items():
            is_map = isinstance(output, Tensor) and output.ndim == 4
            if not is_map:
                decoded = TASKS.load(task).decode(output, [one.known[task] for one in framed])
                for found, one, prediction in zip(outputs, framed, decoded, strict=True):
                    found[task] = self._rules[task].onto(prediction, one.known[task])
                continue
            whole = resize(output.float(), images.shape[-2:])                # data sets may ask for other label sizes
            for i, (top, left, h, w) in enumerate(one.box for one in framed):
                outputs[i][task] = whole[i:i + 1, :, top:top + h, left:left + w]
        return [Answer(one, self.contexts) for one in outputs]
