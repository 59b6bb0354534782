"""Training: one readable loop.

Losses stay on the device between log lines. Checkpoints (`keeper`) are written as `save_interval` says, before and
after every evaluation and at the end, `best.pt` whenever the evaluation is the best so far; each holds everything that
`--resume` needs, so that a resumed run equals an uninterrupted one (bit for bit on CPU).
"""

import logging
import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.engine import selection
from utils.engine.ahead import BatchesAhead
from utils.engine.build import evaluation_contexts
from utils.engine.config import Config
from utils.engine.evaluate import build_evaluators, evaluate, log_reports
from utils.engine.folder import RunFolder
from utils.engine.guard import Guard
from utils.engine.keeper import Keeper
from utils.engine.leaving import Departure
from utils.engine.manifest import LAST
from utils.engine.panel import batch_panel
from utils.engine.prepare import prepare
from utils.engine.report.review import Review
from utils.engine.report.write import report_on
from utils.engine.results import format_table, save_results, selection_score, unscored
from utils.engine.resume import restore_rng
from utils.engine.rollback import roll_back
from utils.engine.run import Run
from utils.engine.schedules import SCHEDULES
from utils.engine.update import build_update, tensors_of
from utils.engine.watchdog import Watchdog
from utils.logging import duration
from utils.machine import in_words, peak_memory

logger = logging.getLogger(__name__)


def train(config: Config, resume: bool) -> dict:
    """Trains `config` and returns the last evaluation's results. Writes only into `config.run_dir`.

    A run that is asked to leave, by a signal, saves and raises `utils.exits.ToBeContinued`.
    """
    device = distributed.pick_device(config.device)
    with Departure() as departure, distributed.process_group(device), RunFolder(config) as folder:
        run = prepare(config, device, resume, folder)
        try:
            results = _loop(run, departure)
            logger.info("best.pt: %s; last.pt: %s", selection.of_best(config.val_from_train), selection.LAST)
            run.train_loader.close()
            run.val_loader.close()
            return results
        finally:
            run.writer.close()


def _loop(run: Run, departure: Departure) -> dict:
    config = run.config
    schedule = SCHEDULES.load(config.scheduler)(config.scheduler_kwargs, config.optimizer_kwargs.lr, config.max_iter)
    batches = BatchesAhead(run.batches(), run.accumulate)
    restore_rng(run)                                        # after the loader, which draws from the generators
    interval = _Interval(run)
    update, make_update = build_update(run)
    keeper = Keeper(run, departure, interval.state, lambda: batches.failed)
    guard = Guard(run, update, rollback=lambda: roll_back(run, keeper, make_update))
    watchdog = Watchdog(config.run_dir / "stacks", config.watchdog)
    run.model.train()
    with keeper.watching(), watchdog, tqdm(total=run.total_steps, initial=run.step, unit="it", leave=False,
                                           disable=None if distributed.is_main() and config.progress else True) as bar:
        while run.evaluation_due or not run.finished:
            if run.evaluation_due:                          # also one that an interruption left open
                interval.restart()                          # before: of checkpoints; after: of the time
                with watchdog.resting():
                    run_evaluation(run, keeper)
                interval.restart()
                continue
            of_update = batches.take(last=run.step + 1 == run.total_steps)
            keeper.begin_update()
            lr = schedule(run.step)
            update.set_lr(lr)
            outcome = make_update([tensors_of(batch, config) for batch in of_update])
            interval.add(update.loss_names, outcome.losses)
            guard.check(outcome, of_update)
            watchdog.beat()
            run.step += 1
            bar.update()
            if run.step % config.log_interval == 0 or run.step == run.total_steps:
                interval.log(lr, outcome.grad_norm)
            keeper.end_update(settle=guard.flush)
        keeper.finish()
        guard.finish()
    return run.metrics or {}


def run_evaluation(run: Run, keeper: Keeper) -> None:
    """Evaluates, reports, and (after the first update) saves last.pt, and best.pt if this is the best so far."""
    config = run.config
    panels: list = []
    progress = distributed.is_main() and config.progress
    contexts = evaluation_contexts(config, run.val_loader.dataset, config.boundary_eval, progress)
    review = Review(contexts, config.run_dir) if config.report and run.finished else None

    def look(batch: dict, predictions: dict) -> None:
        if distributed.is_main() and not panels:
            panels.append(batch_panel(batch, predictions, contexts))
        if review is not None:
            review(batch, predictions)

    evaluators = build_evaluators(contexts)
    # Running statistics differ from process to process where batch norm is not synchronised; rank 0's are saved.
    distributed.copy_from_main(run.evaluated.buffers())
    with keeper.evaluating():
        run.metrics = results = evaluate(run.evaluated, run.val_loader, evaluators, config, run.device, on_batch=look,
                                         progress=progress)
    split = selection.evaluated_split(str(config.train_db_name), str(config.val_db_name), config.val_from_train)
    chosen = selection.of_update(run.step, run.total_steps)
    if distributed.is_main():
        table = format_table({f"step {run.step}": results}, config.single_task_scores, config.dataset.units)
        logger.info("evaluation at step %d on %s\n%s", run.step, split, table)
        log_reports(evaluators)
        if empty := unscored(results):
            logger.warning("no valid pixel in %s for %s: no score", split, ", ".join(empty))
        run.writer.scalars("eval", run.step, {f"{t}/{k}": v for t, s in results.items() for k, v in s.items()})
        run.writer.image("predictions", run.step, panels[0])
        save_results(config.run_dir / "results" / f"step_{run.step}.json", results, step=run.step, split=split,
                     selection=chosen, units=config.dataset.units)
    score, run.scored = selection_score(results), run.step
    if run.step == 0:
        return                                            # an untrained model is never the best one
    better = score > run.best                             # never where the score is not a number
    if better:
        run.best = score
    keeper.save(best=better, score=score if math.isfinite(score) else None)
    if review is not None:
        report_on(review, run.evaluated, run.device, config, results, evaluators, split, chosen, config.run_dir / LAST,
                  around=keeper.reporting())


class _Interval:
    """Losses of the updates since the last log line, summed on the device; one host synchronisation per line."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.restart()
        if run.sums:
            self._restore(run.sums)

    def restart(self) -> None:
        """Forgets everything (also the time, so that an evaluation does not count as training time)."""
        self.sums: Tensor | None = None         # of each loss, and the number of passes
        self.names: list[str] = []
        self.first_step, self.start = self.run.step, time.perf_counter()

    def add(self, names: list[str], losses: Tensor) -> None:
        """Adds the losses (passes, names) of one update, unless one of them is not finite."""
        values = torch.cat((losses.sum(dim=0), torch.full_like(losses[0, :1], len(losses))))
        values = torch.where(losses.isfinite().all(), values, 0.0)
        self.sums = values if self.sums is None else self.sums + values
        self.names = names

    def state(self) -> dict:
        """For a checkpoint: what the next log line has summed up so far on this process."""
        return {"sums": self.sums, "names": list(self.names)}

    def _restore(self, of_ranks: list[dict]) -> None:
        """What this process had; the mean of all where there were more or fewer of them."""
        if of_ranks[0]["sums"] is None:
            return
        same = len(of_ranks) == distributed.world_size()
        own = of_ranks[distributed.rank()] if same else of_ranks[0]
        self.names = own["names"]
        sums = own["sums"] if same else torch.stack([one["sums"] for one in of_ranks]).mean(dim=0)
        self.sums = sums.to(self.run.device)

    def log(self, lr: float, grad_norm: Tensor) -> None:
        """Prints and records the means since the last call."""
        run, config = self.run, self.run.config
        sums = distributed.mean_over_ranks(self.sums)
        means = dict(zip(self.names, (sums[:-1] / sums[-1]).tolist(), strict=True))
        rate = (run.step - self.first_step) / (time.perf_counter() - self.start)
        images = rate * config.trBatch * distributed.world_size() * run.accumulate
        parts = " ".join(f"{name} {value:.3g}" for name, value in means.items() if name != "total")
        logger.info("step %d/%d  loss %.4g (%s)  lr %.2e  grad %.3g  %.3g it/s  %.3g img/s  mem %s  eta %s", run.step,
                    run.total_steps, means["total"], parts, lr, grad_norm.item(), rate, images,
                    in_words(peak_memory(run.device)), duration((run.total_steps - run.step) / rate))
        run.writer.scalars("train", run.step, {**{f"loss/{k}": v for k, v in means.items()}, "lr": lr,
                                               "grad_norm": grad_norm.item(), "images_per_s": images})
        self.restart()
