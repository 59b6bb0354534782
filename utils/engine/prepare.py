"""A run, ready for its first update: built, set to its checkpoint where there is one, its files open."""

import difflib
import logging
from pathlib import Path

import torch

from utils import distributed
from utils.engine.build import build_split
from utils.engine.checkpoint import read_checkpoint
from utils.engine.config import Config, save_config
from utils.engine.data_check import require_sound
from utils.engine.folder import RunFolder
from utils.engine.manifest import BEST, has_run
from utils.engine.results import check_reference
from utils.engine.resume import restore
from utils.engine.run import Run, build_run
from utils.engine.test_time import check_test_time
from utils.logging import RunWriter, setup_logging
from utils.png import decoder_in_words

logger = logging.getLogger(__name__)


def prepare(config: Config, device: torch.device, resume: bool, folder: RunFolder) -> Run:
    """Builds data, model and optimizer, restores a checkpoint, and writes config.yaml. Nothing is written on error."""
    check_reference(config.single_task_scores)
    check_test_time(config)
    train_set, val_set = build_split(config, "train"), build_split(config, "selects")
    if not config.skip_data_check:
        require_sound({"train": train_set, val_set.split: val_set}, config.nworkers)
    path = folder.checkpoint(resume or config.resume == "auto")
    checkpoint = None if path is None else read_checkpoint(path)
    run = build_run(config, device, train_set, val_set, checkpoint)
    torch.manual_seed(config.seed + 1 + distributed.rank())   # different stochastic depth on every rank
    if checkpoint is not None:
        restore(run, checkpoint, path)
    distributed.barrier()                                 # no rank writes before all have checked
    has_best = folder.enter(path)
    _open(run)
    if path is not None:
        logger.info("resumed at step %d from %s%s", run.step, path,
                    ": all updates have been made, nothing is left to train" if run.finished else "")
    elif resume:
        logger.warning("nothing to resume in %s (is version_name right?%s): starting at step 0", config.run_dir,
                       _beside(config.run_dir))
    if run.best > float("-inf") and not has_best:
        logger.warning("%s is gone: the best is chosen anew", config.run_dir / BEST)
        run.best = float("-inf")
    distributed.barrier()
    return run


def _beside(run_dir: Path) -> str:
    """The runs whose names are like this one's, for who has mistyped it."""
    others = [path.name for path in run_dir.parent.iterdir() if path != run_dir and path.is_dir() and has_run(path)]
    near = difflib.get_close_matches(run_dir.name, others, n=3)
    return f" {run_dir.parent} holds {', '.join(near)}" if near else ""


def _open(run: Run) -> None:
    """Rank 0: starts log.txt and the writers, saves and prints the resolved configuration."""
    config, run_dir = run.config, run.config.run_dir
    if not distributed.is_main():
        return
    setup_logging(True, run_dir)
    save_config(config, run_dir / "config.yaml")
    run.writer = RunWriter(run_dir, config.tensorboard, run.step, run.scored == run.step)
    parameters = list(run.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    whole = sum(p.numel() for p in parameters)
    logger.info("run %s: model %s on %s, %s parameters, %s of them trained (%.3g %%), tasks %s", run_dir, config.model,
                config.backbone, f"{whole:,}", f"{trained:,}", 100 * trained / whole, ", ".join(config.tasks))
    logger.info("%d updates of %d images (trBatch %d x %d process(es) x %d accumulation) on %s, %s", run.total_steps,
                run.images_per_update, config.trBatch, distributed.world_size(), run.accumulate, run.device,
                config.precision)
    logger.info("PNG files of 8 bits are decoded by %s", decoder_in_words())
