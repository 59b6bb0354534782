"""Scores of a model on a split: every rank its share, no image twice and none lost."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.evaluator import Evaluator, TaskContext
from models.blocks.resize import resize
from utils import distributed
from utils.batches import to_device
from utils.engine.config import Config
from utils.engine.results import VALID_PIXELS, Results
from utils.engine.tasks import TASKS
from utils.engine.test_time import averaged
from utils.precision import autocast
from utils.recording import CudaRecorder, Recorded, reason_against
from utils.sharded import is_sharded

logger = logging.getLogger(__name__)

Evaluators = Mapping[str, list[Evaluator]]


def build_evaluators(contexts: Mapping[str, TaskContext]) -> Evaluators:
    """Fresh evaluators of each task, for one evaluation."""
    return {task: TASKS.load(task).build_evaluators(context) for task, context in contexts.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable[Mapping], evaluators: Evaluators, config: Config,
             device: torch.device, *, export_dir: Path | None = None, progress: bool = False,
             on_batch: Callable[[Mapping, Mapping[str, Any]], None] | None = None) -> Results:
    """{task: {score: value}} over the images of all ranks' loaders; the same on every rank.

    Scores are computed on the padded frame, where padding is void, hence at original resolution. `export_dir` receives
    the files of the tasks that export any (boundary maps as PNG); `on_batch(batch, predictions)` sees every batch.
    Where an evaluator counts its valid pixels, `valid_pixels` is among the scores: a task without any is not scored.
    """
    was_training = model.training
    model.eval()
    forward = forward_pass(model, config, device)
    more = _further_passes(model, loader)
    with ExitStack() as stack:
        for evaluator in (e for of_task in evaluators.values() for e in of_task):
            stack.callback(evaluator.close)
        for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True):
            outputs, predictions = forward(to_device(batch["image"], device)), {}
            for task, of_task in evaluators.items():
                label, output, row = to_device(batch[task], device), outputs[task], TASKS.load(task)
                if isinstance(output, Tensor) and isinstance(label, Tensor):      # maps (B, n, h, w), others stay
                    output = resize(output.float(), label.shape[-2:])
                predictions[task] = row.decode(output, batch["meta"])
                for evaluator in of_task:
                    evaluator.update(predictions[task], label, batch["meta"])
                if export_dir is not None and row.export is not None:
                    row.export(predictions[task], batch["meta"], export_dir / task)
            if on_batch is not None:
                on_batch(batch, predictions)
        for _ in range(more):
            forward(to_device(batch["image"], device))
        for evaluator in (e for of_task in evaluators.values() for e in of_task):
            evaluator.reduce()
    model.train(was_training)
    return {task: _scores(of_task) for task, of_task in evaluators.items()}


def _further_passes(model: nn.Module, loader: Sized) -> int:
    """How many forward passes this process makes for others that have more batches and need its part of the model."""
    return max(distributed.gather_objects(len(loader))) - len(loader) if is_sharded(model) else 0


def forward_pass(model: nn.Module, config: Config, device: torch.device) -> Callable[[Tensor], dict]:
    """Images on the device -> raw outputs per task, as `precision`, `cuda_graph` and `test_time` say.

    With `cuda_graph` one graph per image size, for as long as the result is held; to be called under
    `torch.inference_mode`. What `test_time` asks for and a task cannot do is a ValueError.
    """
    def forward(image: Tensor) -> dict[str, Any]:
        with autocast(device, config.precision):
            return model(image).final

    if config.cuda_graph:
        reason = reason_against(model) if device.type == "cuda" else f"it needs CUDA, this run is on {device.type}"
        if reason is None:
            forward = Recorded(forward, CudaRecorder(device), "a forward pass")
        else:
            _tell_unrecorded(reason)
    return averaged(forward, config)


@functools.cache
def _tell_unrecorded(reason: str) -> None:
    logger.warning("cuda_graph: forward passes run as without it: %s", reason)


def log_reports(evaluators: Evaluators) -> None:
    """One line in the log for every evaluator that has more to say than its scores."""
    for task, of_task in evaluators.items():
        for evaluator in of_task:
            if line := evaluator.report():
                logger.info("%s: %s", task, line)


def _scores(evaluators: list[Evaluator]) -> dict[str, float]:
    scores = {}
    for evaluator in evaluators:
        new = evaluator.compute()
        assert not scores.keys() & new.keys(), f"two evaluators of a task report {sorted(scores.keys() & new.keys())}"
        scores |= new
        if evaluator.valid_pixels is not None:
            scores[VALID_PIXELS] = evaluator.valid_pixels
    return scores
