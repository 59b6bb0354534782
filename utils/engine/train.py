"""Training: one readable loop.

Losses stay on the device between log lines. `last.pt` is written after every evaluation and at the end, `best.pt`
whenever the evaluation is the best so far; both hold everything that `--resume` needs, so that a resumed run equals
an uninterrupted one (bit for bit on CPU).
"""

import logging
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from utils import distributed
from utils.batches import batches_on
from utils.engine.build import evaluation_contexts
from utils.engine.config import Config
from utils.engine.evaluate import build_evaluators, evaluate, log_reports
from utils.engine.panel import batch_panel
from utils.engine.results import format_table, save_results, selection_score, unscored
from utils.engine.run import Run, prepare, restore_rng, save
from utils.engine.schedules import SCHEDULES
from utils.finite import FiniteGuard
from utils.logging import duration
from utils.precision import autocast

logger = logging.getLogger(__name__)


def train(config: Config, resume: bool) -> dict:
    """Trains `config` and returns the last evaluation's results. Writes only into `config.run_dir`."""
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        run = prepare(config, device, resume)
        try:
            return _loop(run)
        finally:
            run.writer.close()


def _loop(run: Run) -> dict:
    config, device = run.config, run.device
    schedule = SCHEDULES.load(config.scheduler)(config.scheduler_kwargs, config.optimizer_kwargs.lr, config.max_iter)
    batches = batches_on(device, iter(run.train_loader))
    restore_rng(run)                                        # after the loader, which draws from the generators
    if run.step == 0 and config.eval_at_start:
        run_evaluation(run)
    guard, interval, parameters = FiniteGuard(device), _Interval(run), list(run.model.parameters())

    def scaled_backward(loss: Tensor, **options: object) -> None:
        run.scaler.scale(loss / run.accumulate).backward(**options)

    run.model.train()
    with _stop_request() as stop, tqdm(total=run.total_steps, initial=run.step, unit="it", leave=False,
                                       disable=None if distributed.is_main() and config.progress else True) as bar:
        while run.step < run.total_steps:
            lr = schedule(run.step)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            passes = []
            for micro in range(run.accumulate):
                batch = next(batches)
                with _no_sync(run.wrapped, micro < run.accumulate - 1):
                    with autocast(device, config.precision):
                        out = run.wrapped(batch["image"])
                    losses = run.criterion(out.final, batch, out.intermediate, out.extra)
                    run.criterion.balancing.backward(losses, scaled_backward, parameters)
                passes.append({name: loss.detach() for name, loss in losses.items()})
            distributed.average_gradients(run.criterion.parameters())     # the model's are averaged by DDP
            interval.add(passes)
            run.scaler.unscale_(run.optimizer)
            grad_norm = clip_grad_norm_(run.model.parameters(), config.grad_clip_param.max_norm,
                                        config.grad_clip_param.norm_type)
            # Stops before bad weights are saved.
            guard.check(run.step + 1, passes, None if run.scaler.is_enabled() else grad_norm)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            if run.ema is not None:
                run.ema.update_parameters(run.model)
            run.step += 1
            bar.update()
            if run.step % config.log_interval == 0 or run.step == run.total_steps:
                interval.log(lr, grad_norm)
            finished = run.step == run.total_steps
            if (run.step % config.val_interval == 0 and not stop.is_set) or finished:
                guard.flush()
                run_evaluation(run)
                interval.restart()
            if config.checkpoint_interval and run.step % config.checkpoint_interval == 0:
                guard.flush()
                save(run, "last.pt", f"step_{run.step}.pt")
            if stop.is_set and not finished:
                guard.flush()
                save(run, "last.pt")
                logger.info("interrupted: %s holds step %d; continue with --resume", config.run_dir / "last.pt",
                            run.step)
                raise KeyboardInterrupt
    return run.metrics or {}


def run_evaluation(run: Run) -> None:
    """Evaluates, reports, and (after the first update) saves last.pt, and best.pt if this is the best so far."""
    config = run.config
    panels: list = []
    progress = distributed.is_main() and config.progress
    contexts = evaluation_contexts(config, run.val_loader.dataset, config.boundary_eval, progress)

    def keep_first(batch: dict, predictions: dict) -> None:
        if distributed.is_main() and not panels:
            panels.append(batch_panel(batch, predictions, contexts))

    evaluators = build_evaluators(contexts)
    run.metrics = results = evaluate(run.evaluated, run.val_loader, evaluators, run.device, precision=config.precision,
                                     on_batch=keep_first, progress=progress)
    if distributed.is_main():
        table = format_table({f"step {run.step}": results}, config.single_task_scores)
        logger.info("evaluation at step %d\n%s", run.step, table)
        log_reports(evaluators)
        if empty := unscored(results):
            logger.warning("no valid pixel in the %s test split for %s: no score", config.val_db_name,
                           ", ".join(empty))
        run.writer.scalars("eval", run.step, {f"{t}/{k}": v for t, s in results.items() for k, v in s.items()})
        run.writer.image("predictions", run.step, panels[0])
        save_results(config.run_dir / "results" / f"step_{run.step}.json", results, step=run.step)
    score = selection_score(results)
    if run.step == 0:
        return                                            # an untrained model is never the best one
    better = score > run.best                             # never where the score is not a number
    if better:
        run.best = score
    save(run, *(["last.pt", "best.pt"] if better else ["last.pt"]))


class _Interval:
    """Losses of the updates since the last log line, summed on the device; one host synchronisation per line."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.restart()

    def restart(self) -> None:
        """Forgets everything (also the time, so that an evaluation does not count as training time)."""
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.passes, self.first_step, self.start = 0, self.run.step, time.perf_counter()

    def add(self, passes: list[dict[str, Tensor]]) -> None:
        """Adds the losses of one update's mini-batches."""
        values = torch.stack([torch.stack([loss.float() for loss in p.values()]) for p in passes]).sum(dim=0)
        self.sums = values if self.sums is None else self.sums + values
        self.names = list(passes[0])
        self.passes += len(passes)

    def log(self, lr: float, grad_norm: Tensor) -> None:
        """Prints and records the means since the last call."""
        run, config = self.run, self.run.config
        means = dict(zip(self.names, distributed.mean_over_ranks(self.sums / self.passes).tolist(), strict=True))
        rate = (run.step - self.first_step) / (time.perf_counter() - self.start)
        images = rate * config.trBatch * distributed.world_size() * run.accumulate
        parts = " ".join(f"{name} {value:.3g}" for name, value in means.items() if name != "total")
        logger.info("step %d/%d  loss %.4g (%s)  lr %.2e  grad %.3g  %.3g it/s  %.3g img/s  mem %s  eta %s", run.step,
                 run.total_steps, means["total"], parts, lr, grad_norm.item(), rate, images, _memory(run.device),
                 duration((run.total_steps - run.step) / rate))
        run.writer.scalars("train", run.step, {**{f"loss/{k}": v for k, v in means.items()}, "lr": lr,
                                               "grad_norm": grad_norm.item(), "images_per_s": images})
        self.restart()


class _Stop:
    """Set by the first Ctrl-C (or SIGTERM): finish this update, save, leave. The second one leaves at once."""

    is_set = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def _stop_request() -> Iterator[_Stop]:
    """Catches the first interrupt. Under a launcher the ranks cannot agree on a step, so there it is left alone."""
    stop = _Stop()
    caught = (signal.SIGINT, signal.SIGTERM) if distributed.world_size() == 1 else ()
    previous = {signum: signal.signal(signum, stop.handle) for signum in caught}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _no_sync(model: nn.Module, accumulating: bool):
    """Gradients are summed over ranks only in the last mini-batch of an update."""
    return model.no_sync() if accumulating and hasattr(model, "no_sync") else nullcontext()


def _memory(device: torch.device) -> str:
    peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return f"{peak / 2**30:.1f}G"
