"""What every export has in common: the model as it is deployed, what is said of it, and the check of what was written.

The deployed network takes an image as it is, RGB from 0 to 255, and gives for every task its raw output, `<task>_raw`,
and the prediction that `predict` decodes from it, `<task>`.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.transforms import MEAN, STD
from models.model import MultiTaskModel
from models.ops.scan_choice import scans_as
from models.ops.scan_standard import STANDARD
from utils.engine.build import loaded_model, task_contexts
from utils.engine.config import Config
from utils.engine.exports.open_size import LEAST_CELLS, TRACED_CELLS, sizes_said, sizes_to_check
from utils.engine.tasks import TASKS

TOLERANCE = 1e-4            # of raw outputs, in units of the largest one where that is more than 1
INPUT = "image"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One export. dynamic: what of the input is left open, one of `exports.DYNAMIC`; folder: where the files go."""

    config: Config
    checkpoint: Path
    dynamic: str
    folder: Path

    @property
    def open_batch(self) -> bool:
        """Whether the number of images stays open."""
        return self.dynamic in ("batch", "both")

    @property
    def open_size(self) -> bool:
        """Whether height and width stay open."""
        return self.dynamic in ("size", "both")

    def model(self) -> tuple[MultiTaskModel, str]:
        """The model with the checkpoint's weights and merged adapters, in eval mode, and how they were chosen."""
        model, chosen = loaded_model(self.config, self.checkpoint)
        return model.eval().requires_grad_(False), chosen

    def about(self, chosen: str, multiple: int = 0) -> dict[str, Any]:
        """What a program needs to know of the file, in plain values. multiple: what the sides of an open image are
        multiples of."""
        contexts = task_contexts(self.config)
        tasks = {task: {"classes": list(context.class_names), "unit": TASKS.load(task).view.unit_of(context)}
                 for task, context in contexts.items()}
        height, width = self.config.input_size
        return {"input": {"name": INPUT, "layout": "float32 (batch, 3, height, width), RGB, 0 to 255",
                          "height": height, "width": width, "open": self.dynamic,
                          **({"multiple": multiple, "least": LEAST_CELLS * multiple} if self.open_size else {})},
                "model": self.config.model, "backbone": self.config.backbone, "data": str(self.config.train_db_name),
                "weights": chosen, "tasks": tasks}


class Deployed(nn.Module):
    """Normalisation, network and decoding: (B, 3, H, W) RGB from 0 to 255 -> the outputs `names`, in this order."""

    def __init__(self, model: MultiTaskModel):
        super().__init__()
        self.model = model
        self.tasks = tuple(model.heads)
        self.names = [*self.tasks, *(f"{task}_raw" for task in self.tasks)]
        self.register_buffer("image_mean", 255 * torch.tensor(MEAN, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("image_factor", 1 / (255 * torch.tensor(STD, dtype=torch.float32).view(3, 1, 1)))

    @property
    def multiple(self) -> int:
        """What the sides of an image of open size are multiples of: no map is rounded up."""
        strides = (*self.model.encoder.strides, *self.model.neck.strides)
        return math.lcm(*strides, self.model.decoder.input_multiple or 1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        raw = self.model((image - self.image_mean) * self.image_factor).final
        decoded = [TASKS.load(task).decode(raw[task], ()) for task in self.tasks]
        return *decoded, *(raw[task] for task in self.tasks)


def deployed(job: Job) -> tuple[Deployed, str]:
    """The network that an export writes, checked by a first pass, and how its weights were chosen."""
    model, chosen = job.model()
    if not job.open_batch:          # what is folded may have a kernel for each image, as MLoRE's has
        model = model.prepare_for_inference().requires_grad_(False)
    network = Deployed(model)
    if job.config.test_time.averages:
        logger.warning("the graph looks at an image once; test_time, by which predict and infer average, is not in it")
    with torch.no_grad():
        raw = network.model(example(job, 1)).final          # and the network keeps what belongs to this size
    if others := [task for task, out in raw.items() if not (isinstance(out, Tensor) and out.ndim == 4)]:
        raise ValueError(f"export: {', '.join(others)} give(s) no map, and only maps can be exported")
    return network, chosen


def traced(job: Job, network: Deployed) -> torch.export.ExportedProgram:
    """The network as a graph of PyTorch's standard operators; a ValueError says why it cannot be one."""
    batch = 2 if job.open_batch else 1                      # one image would be taken for a constant
    image, shapes, sizes = example(job, batch), {}, nullcontext()
    if job.open_batch:
        shapes[0] = torch.export.Dim("batch")
    if job.open_size:
        multiple, sizes = network.multiple, sizes_said(network, network.model.encoder, network.multiple)
        _require_sizes(job, network)
        image = _noise(batch, *(cells * multiple for cells in TRACED_CELLS))
        for axis, name in ((2, "rows"), (3, "columns")):
            shapes[axis] = multiple * torch.export.Dim(name, min=LEAST_CELLS)
    try:
        with torch.no_grad(), scans_as(STANDARD), sizes:
            return torch.export.export(network, (image,), dynamic_shapes=(shapes,) if shapes else None, strict=False)
    except (torch._dynamo.exc.UserError, RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        advice = f"; try without --dynamic {job.dynamic}" if shapes else ""
        raise ValueError(f"export: model '{job.config.model}' on '{job.config.backbone}' cannot be traced: "
                         f"{type(error).__name__}: {first_line(error)}{advice}") from error


@torch.no_grad()
def _require_sizes(job: Job, network: Deployed) -> None:
    """ValueError where the network takes images of its experiment's size only, as such with position tables do."""
    for size in sizes_to_check(job.config.input_size, network.multiple):
        try:
            network(_noise(1, *size))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"export: model '{job.config.model}' on '{job.config.backbone}' does not take images of "
                             f"any size, so that their size cannot stay open (--dynamic {job.dynamic}): "
                             f"{first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Of what a library says at length."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def example(job: Job, batch: int) -> Tensor:
    """Images (batch, 3, H, W) of noise."""
    return _noise(batch, *job.config.input_size)


def _noise(batch: int, height: int, width: int) -> Tensor:
    return 255 * torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check(job: Job, network: Deployed, run: Callable[[Tensor], Mapping[str, Tensor]], wrote: Sequence[Path]) -> None:
    """Compares what was written with PyTorch on images of noise, logs the errors; beyond `TOLERANCE` the files go."""
    size, worst = job.config.input_size, 0.0
    sizes = sizes_to_check(size, network.multiple) if job.open_size else [size]
    for shape in [(1, *size) for size in sizes] + [(3, *size)] * job.open_batch:
        image = _noise(*shape)
        ours, theirs = dict(zip(network.names, network(image), strict=True)), run(image)
        for task in network.tasks:
            a, b = ours[f"{task}_raw"].double(), theirs[f"{task}_raw"].double()
            error = ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()
            same = (ours[task].double() - theirs[task].double()).abs() <= TOLERANCE
            worst = max(worst, error) if error == error else float("inf")
            logger.info("  %-12s %s: raw output differs by at most %.1e, %.4f %% of the predictions are the same", task,
                        " x ".join(map(str, image.shape)), error, 100 * same.double().mean().item())
    if worst > TOLERANCE:
        for path in wrote:
            path.unlink()
        raise ValueError(f"export: what was written differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}; "
                         "the file(s) are removed again")
    logger.info("%s: as PyTorch up to %.1e", ", ".join(map(str, wrote)), worst)


def as_json(about: Mapping[str, Any]) -> str:
    """For the inside of a file."""
    return json.dumps(about, indent=1)


@contextmanager
def library(name: str, extra: str) -> Iterator[None]:
    """ValueError that names the missing library and how to get it."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"export: {name} needs {extra}: pip install {extra} ({error})") from error
