"""A rehearsal of a run: everything is built and done once, nothing of it stays, and it says what the run will need."""

import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import distributed
from utils.engine.build import evaluation_contexts
from utils.engine.config import Config
from utils.engine.evaluate import build_evaluators, evaluate
from utils.engine.folder import RunFolder
from utils.engine.keeper import Keeper
from utils.engine.leaving import Departure
from utils.engine.manifest import LAST
from utils.engine.prepare import prepare
from utils.engine.run import Run
from utils.engine.schedules import SCHEDULES
from utils.engine.update import build_update, tensors_of
from utils.logging import duration, setup_logging
from utils.machine import in_words, peak_memory

logger = logging.getLogger(__name__)

UPDATES = 4             # the first one finds kernels and memory, and is not timed
LASTING = 3             # checkpoints that a run always keeps: last, the one before it, best


@dataclasses.dataclass
class Needs:
    """What a rehearsal has found. Seconds and bytes."""

    update: float           # of one update
    images: int             # of one update, all processes
    evaluation: float       # of one evaluation, from one batch of it
    saving: float
    checkpoint: int         # size of one
    memory: int | None
    updates: int            # of the run
    evaluations: int
    checkpoints: int        # that the run keeps
    free: int               # where it will write

    @property
    def total(self) -> float:
        """Seconds of the run, without the time that reading its data takes longer than computing."""
        return self.updates * self.update + self.evaluations * self.evaluation

    @property
    def disk(self) -> int:
        """With the one that is being written."""
        return (self.checkpoints + 1) * self.checkpoint


def dry_run(config: Config) -> Needs:
    """Rehearses `config` on this machine, under a launcher on all processes."""
    device = distributed.pick_device(config.device)
    with Departure() as departure, distributed.process_group(device), _scratch(Path(config.out_dir)) as scratch:
        rehearsed = dataclasses.replace(config, out_dir=str(scratch), version_name="rehearsal", tensorboard=False)
        with RunFolder(rehearsed) as folder:
            run = prepare(rehearsed, device, False, folder)
            try:
                needs = _rehearse(run, departure)
            finally:
                run.writer.close()
                setup_logging(distributed.is_main())        # lets go of the log in there
        needs.free = shutil.disk_usage(scratch).free
        distributed.barrier()                               # then no process needs the folder any more
    _report(config, needs)
    return needs


def _rehearse(run: Run, departure: Departure) -> Needs:
    config, times = run.config, []
    batches = run.batches()
    update, make_update = build_update(run)
    update.set_lr(SCHEDULES.load(config.scheduler)(config.scheduler_kwargs, config.optimizer_kwargs.lr,
                                                   config.max_iter)(0))
    run.model.train()
    for _ in range(UPDATES):
        of_update = [next(batches) for _ in range(run.accumulate)]
        start = time.perf_counter()
        outcome = make_update([tensors_of(batch, config) for batch in of_update])
        unsound = not outcome.sound and not run.scaler.is_enabled()         # reading it waits for the update
        times.append(time.perf_counter() - start)
        if unsound:
            raise FloatingPointError("the first updates already have losses or gradients that are not finite: try a "
                                     "lower optimizer_kwargs.lr or precision=fp32, and check the labels "
                                     "(scripts/check_data.py)")
        run.step += 1
    evaluation = _timed(lambda: _evaluate_one_batch(run)) * len(run.val_loader)
    keeper = Keeper(run, departure, dict, lambda: False)
    saving = _timed(lambda: keeper.save(wait=True))
    size = distributed.from_main(lambda: (config.run_dir / LAST).stat().st_size)
    kept = run.total_steps // config.checkpoint_interval if config.checkpoint_interval else 0
    return Needs(update=sorted(times[1:])[len(times[1:]) // 2], images=run.images_per_update, evaluation=evaluation,
                 saving=saving, checkpoint=size, memory=peak_memory(run.device), updates=run.total_steps,
                 evaluations=-(-run.total_steps // config.val_interval) + config.eval_at_start,
                 checkpoints=LASTING + kept, free=0)


def _evaluate_one_batch(run: Run) -> None:
    config = run.config
    contexts = evaluation_contexts(config, run.val_loader.dataset, config.boundary_eval)
    evaluate(run.evaluated, [next(iter(run.val_loader))], build_evaluators(contexts), config, run.device)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def _scratch(out_dir: Path) -> Iterator[Path]:
    """A folder on the disk that the run will write to, gone at the end, together with those made for it."""
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]

    def make() -> str:
        out_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".dry_run_", dir=out_dir)

    folder = Path(distributed.from_main(make))
    try:
        yield folder
    finally:
        if distributed.is_main():
            shutil.rmtree(folder)
            for parent in made:
                parent.rmdir()


def _report(config: Config, needs: Needs) -> None:
    logger.info("dry run of %s: everything works", config.version_name)
    logger.info("  update       %.3g s for %d images (the middle of %d; without the wait for data)", needs.update,
                needs.images, UPDATES - 1)
    logger.info("  evaluation   about %s (from one batch)", duration(needs.evaluation))
    logger.info("  checkpoint   %s, written in %.2g s", in_words(needs.checkpoint), needs.saving)
    logger.info("  memory       %s at most, so far", in_words(needs.memory))
    logger.info("  in all       about %s for %d updates and %d evaluations", duration(needs.total), needs.updates,
                needs.evaluations)
    logger.info("  disk         %s for %d checkpoints and one being written; %s are free below %s",
                in_words(needs.disk), needs.checkpoints, in_words(needs.free), config.out_dir)
    if needs.disk > needs.free:
        logger.warning("the disk is too small: free %s, choose another out_dir, or a larger checkpoint_interval",
                       in_words(needs.disk - needs.free))
