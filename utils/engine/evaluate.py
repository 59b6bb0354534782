"""Scores of a model on a split: streaming, every rank its share, no image twice and none lost."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.boundary import BoundaryBenchmark
from models.model import resize
from utils.engine.results import VALID_PIXELS, Results
from utils.engine.tasks import TASKS, TaskContext
from utils.precision import autocast


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable[Mapping], contexts: Mapping[str, TaskContext], device: torch.device, *,
             precision: str = "fp32", benchmarks: Mapping[str, BoundaryBenchmark] | None = None,
             export_dir: Path | None = None, progress: bool = False,
             on_batch: Callable[[Mapping, Mapping[str, Tensor]], None] | None = None) -> Results:
    """{task: {score: value}} over the images of all ranks' loaders; the same on every rank.

    Scores are computed on the padded frame, where padding is void, hence at original resolution. `precision` is
    the config key. `benchmarks` adds scores to those of its tasks. `export_dir` receives the files of the tasks
    that export any (boundary maps as PNG); `on_batch(batch, predictions)` sees every batch.
    `valid_pixels` is among the scores: a task without any is not scored.
    """
    benchmarks = benchmarks or {}
    was_training = model.training
    model.eval()
    meters = {task: TASKS[task].meter(context) for task, context in contexts.items()}
    with ExitStack() as stack:
        for benchmark in benchmarks.values():
            stack.enter_context(benchmark)
        for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True):
            image = batch["image"].to(device, non_blocking=True)
            with autocast(device, precision):
                logits = model(image).final
            predictions = {}
            for task, meter in meters.items():
                label = batch[task].to(device, non_blocking=True)
                predictions[task] = TASKS[task].decode(resize(logits[task].float(), label.shape[-2:]))
                meter.update(predictions[task], label)
                if export_dir is not None and TASKS[task].export is not None:
                    TASKS[task].export(predictions[task], batch["meta"], export_dir)
            for task, benchmark in benchmarks.items():
                benchmark.update(predictions[task], batch["meta"])
            if on_batch is not None:
                on_batch(batch, predictions)
        for meter in (*meters.values(), *benchmarks.values()):
            meter.reduce()
    model.train(was_training)
    results = {task: {**meter.compute(), VALID_PIXELS: meter.valid_pixels} for task, meter in meters.items()}
    for task, benchmark in benchmarks.items():
        results[task] |= benchmark.compute()
    return results
