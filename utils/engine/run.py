"""The state of a training run: built, restored, saved. `utils.engine.train` holds the loop that changes it."""

import logging
import math
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data.loader import build_eval_loader, build_train_loader
from losses.multi_task import MultiTaskLoss
from utils import distributed
from utils.engine.averages import MovingAverage
from utils.engine.build import build_criterion, build_split, model_from_config, prepare_for_training
from utils.engine.checkpoint import load_model, load_pretrained, read_checkpoint, save_checkpoint
from utils.engine.config import Config, config_from_dict, save_config
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.results import check_reference
from utils.logging import RunWriter, setup_logging

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that changes while training, and the constants that the loop reads."""

    config: Config
    device: torch.device
    model: nn.Module                      # the plain model; `wrapped` is the same under DDP
    wrapped: nn.Module
    ema: MovingAverage | None
    criterion: MultiTaskLoss              # with the state of the loss balancing
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    writer: RunWriter
    train_loader: DataLoader              # endless
    val_loader: DataLoader                # this rank's share
    accumulate: int
    total_steps: int
    steps_per_epoch: int
    step: int = 0                         # finished updates
    best: float = -math.inf
    metrics: dict | None = None
    rng: list[dict] = field(default_factory=list)   # of every rank, from the checkpoint

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module


def prepare(config: Config, device: torch.device, resume: bool) -> Run:
    """Builds data, model and optimiser, restores a checkpoint, and writes config.yaml. Nothing is written on error."""
    check_reference(config.single_task_scores)
    run_dir, world = config.run_dir, distributed.world_size()
    last = run_dir / "last.pt"
    checkpoint = read_checkpoint(last) if resume and last.exists() else None
    if last.exists() and not resume:
        raise ValueError(f"{run_dir} already holds a run (last.pt); continue it with --resume, "
                         "or choose another version_name or out_dir")
    train_set, val_set = build_split(config, "train"), build_split(config, "selects")
    accumulate = accumulation(config, world)
    train_loader = build_train_loader(train_set, config.trBatch, config.nworkers, distributed.rank(), world,
                                      config.seed, accumulate, start_update=checkpoint["step"] if checkpoint else 0)
    val_loader = build_eval_loader(val_set, config.valBatch, config.nworkers, distributed.rank(), world)
    steps_per_epoch = len(train_set) // (config.trBatch * world * accumulate)
    torch.manual_seed(config.seed)                        # the same weights on every rank
    model = model_from_config(config)
    if config.pretrained and checkpoint is None:
        with distributed.main_first():                     # one download, which the others then find
            load_pretrained(model.encoder, config.pretrained, allow_missing=config.pretrained_allow_missing)
    elif checkpoint is None and distributed.is_main():
        logger.warning("pretrained is false: the backbone starts from random weights")
    prepare_for_training(model.to(device), config)
    criterion = build_criterion(config, model).to(device)
    wrapped = _wrap(model, config, device)
    ema = MovingAverage(model, config.ema_decay) if config.ema_decay else None
    run = Run(
        config, device, model, wrapped, ema, criterion, optimizer=build_optimizer(config, model, criterion),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"), writer=RunWriter(None, False),
        train_loader=train_loader, val_loader=val_loader, accumulate=accumulate,
        total_steps=min(config.max_iter, config.epochs * steps_per_epoch), steps_per_epoch=steps_per_epoch)
    torch.manual_seed(config.seed + 1 + distributed.rank())   # different stochastic depth on every rank
    if checkpoint is not None:
        _restore(run, checkpoint, last)
    distributed.barrier()                                 # no rank writes before all have checked
    _open_run_dir(run, resume, checkpoint is not None)
    return run


def build_optimizer(config: Config, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """One group of the model's parameters, as published; what the loss balancing learns has no weight decay."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if learned := list(criterion.parameters()):
        groups.append({"params": learned, "weight_decay": 0.0})
    return OPTIMIZERS.load(config.optimizer).build(groups, config.optimizer_kwargs)


def accumulation(config: Config, world: int) -> int:
    """Mini-batches per update, from `global_batch`; a world size that does not fit is a ValueError."""
    per_pass = config.trBatch * world
    if config.global_batch and config.global_batch % per_pass:
        raise ValueError(f"global_batch {config.global_batch} is not a multiple of trBatch {config.trBatch} x {world} "
                         f"process(es) = {per_pass}; change trBatch, global_batch or the number of processes")
    return max(1, config.global_batch // per_pass)


def save(run: Run, *names: str) -> None:
    """Writes the complete state under each of these names. All ranks take part; rank 0 writes."""
    state = {"torch": torch.get_rng_state()}
    if run.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(run.device)
    rng = distributed.gather_objects(state)
    if distributed.is_main():
        checkpoint = {
            "model": run.model.state_dict(), "ema": None if run.ema is None else run.ema.state_dict(),
            "criterion": run.criterion.state_dict(), "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(), "rng": rng, "step": run.step,
            "epoch": run.step // run.steps_per_epoch, "best": run.best, "metrics": run.metrics,
            "config": run.config.to_dict(), "git": _git_hash(),
        }
        for name in names:
            save_checkpoint(run.config.run_dir / name, checkpoint)
    distributed.barrier()


def _restore(run: Run, checkpoint: dict, path: Path) -> None:
    load_model(run.model, checkpoint["model"], path, file_config=checkpoint.get("config"),
               yaml_config=run.config.to_dict())
    if (run.ema is None) != (checkpoint["ema"] is None):
        raise ValueError(f"{path} was trained {'without' if checkpoint['ema'] is None else 'with'} a moving average; "
                         f"ema_decay is {run.config.ema_decay}")
    if run.ema is not None:
        run.ema.load_state_dict(checkpoint["ema"])
    balancing, asked = checkpoint.get("criterion", {}), run.criterion.state_dict()
    if balancing.keys() != asked.keys():
        raise ValueError(f"{path} holds the state of another loss balancing ({', '.join(balancing) or 'none'}) than "
                         f"loss_kwargs asks for ({', '.join(asked) or 'none'}); resume with the loss_scheme it was "
                         "trained with")
    run.criterion.load_state_dict(balancing)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.step, run.best, run.metrics, run.rng = (checkpoint[key] for key in ("step", "best", "metrics", "rng"))
    now, stored = run.config.to_dict(), config_from_dict(checkpoint["config"], "the checkpoint").to_dict()
    changed = [f"{key}: {stored.get(key)!r} -> {value!r}" for key, value in now.items() if stored.get(key) != value]
    if changed:
        logger.warning("resumed with another configuration: %s", "; ".join(changed))


def restore_rng(run: Run) -> None:
    """Sets this rank's generators as they were when the checkpoint was written; does nothing in a fresh run.

    A run resumed on another number of processes keeps its fresh generators: there is no state for the new ranks.
    """
    if len(run.rng) != distributed.world_size():
        if run.rng:
            logger.warning("the checkpoint holds the random state of %d process(es), this run has %d: stochastic depth "
                           "is drawn afresh", len(run.rng), distributed.world_size())
        return
    state = run.rng[distributed.rank()]
    torch.set_rng_state(state["torch"])
    if run.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], run.device)


def _wrap(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model under DDP, with synchronised batch norm where it has batch norm and CUDA; alone, the model itself."""
    if distributed.world_size() == 1:
        return model
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            logger.warning("batch norm is synchronised on CUDA only: every CPU process uses its own batch statistics")
    on_cuda = device.type == "cuda"
    # What DDP keeps must not belong to the default stream where updates are recorded on another.
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_cuda and config.cuda_graph else nullcontext():
        return DistributedDataParallel(model, device_ids=[device.index] if on_cuda else None,
                                       find_unused_parameters=config.find_unused_parameters)


def _open_run_dir(run: Run, resume: bool, found: bool) -> None:
    """Rank 0: creates the folder, starts log.txt and the writers, saves and prints the resolved configuration."""
    config, run_dir = run.config, run.config.run_dir
    if distributed.is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        setup_logging(True, run_dir)
        save_config(config, run_dir / "config.yaml")
        run.writer = RunWriter(run_dir, config.tensorboard)
        parameters = sum(p.numel() for p in run.model.parameters())
        logger.info("run %s: model %s on %s, %s parameters, tasks %s", run_dir, config.model, config.backbone,
                 f"{parameters:,}", ", ".join(config.tasks))
        logger.info("%d updates of %d images (trBatch %d x %d process(es) x %d accumulation) on %s, %s",
                    run.total_steps, config.trBatch * distributed.world_size() * run.accumulate, config.trBatch,
                    distributed.world_size(), run.accumulate, run.device, config.precision)
    if resume:
        logger.info("resumed at step %d" if found else "nothing to resume in %s: starting at step 0",
                 run.step if found else run_dir)
    distributed.barrier()


def _git_hash() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
