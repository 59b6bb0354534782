"""The state of a training run, built. `utils.engine.train` holds the loop that changes it."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from data.base import MultiTaskDataset
from data.batch_colours import with_colours
from data.loader import build_eval_loader, build_train_loader
from losses.multi_task import MultiTaskLoss
from utils import distributed
from utils.batches import batches_on
from utils.engine.averages import MovingAverage
from utils.engine.build import build_criterion, model_from_config, prepare_for_training
from utils.engine.config import Config
from utils.engine.first_weights import Base, begin
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.parameter_groups import parameter_groups
from utils.engine.spread import check_spread, in_parts, spread
from utils.logging import RunWriter

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that changes while training, and the constants that the loop reads."""

    config: Config
    device: torch.device
    model: nn.Module                      # the model itself; `wrapped` is the same under DDP
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
    base: Base | None = None              # of adapters: what checkpoints leave out
    step: int = 0                         # finished updates
    best: float = -math.inf
    metrics: dict | None = None
    scored: int = -1                   # the step of the last evaluation
    rng: list[dict] = field(default_factory=list)    # of every rank, from the checkpoint
    sums: list[dict] = field(default_factory=list)   # the same: what the log line to come had summed up

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated: the moving average where there is one and `test_time` does not say no."""
        return self.model if self.ema is None or not self.config.test_time.ema else self.ema.module

    def batches(self) -> Iterator[Mapping]:
        """What is trained on, on the device, without end."""
        return map(with_colours, batches_on(self.device, iter(self.train_loader)))

    @property
    def images_per_update(self) -> int:
        """Of all processes."""
        return self.config.trBatch * distributed.world_size() * self.accumulate

    @property
    def kept(self) -> bool:
        """Whether the checkpoint of this step stays for good."""
        every = self.config.checkpoint_interval
        return every > 0 and self.step % every == 0

    @property
    def finished(self) -> bool:
        """Whether all updates have been made."""
        return self.step >= self.total_steps

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and has not been."""
        if self.scored == self.step:
            return False
        return self.config.eval_at_start if self.step == 0 else (self.step % self.config.val_interval == 0
                                                                 or self.finished)


def build_run(config: Config, device: torch.device, train_set: MultiTaskDataset, val_set: MultiTaskDataset,
              checkpoint: Mapping[str, Any] | None) -> Run:
    """Model, optimizer, loaders ... with fresh weights, ready for `resume.restore` where there is a checkpoint."""
    world = distributed.world_size()
    accumulate = accumulation(config, world, checkpoint)
    train_loader = build_train_loader(train_set, config.trBatch, config.nworkers, distributed.rank(), world,
                                      config.seed, accumulate, start_update=checkpoint["step"] if checkpoint else 0,
                                      scope=config.loss_kwargs.loss_scope, **config.loading)
    val_loader = build_eval_loader(val_set, config.valBatch, config.nworkers, distributed.rank(), world,
                                   **config.loading)
    steps_per_epoch = train_loader.batch_sampler.updates_per_epoch
    torch.manual_seed(config.seed)                        # the same weights on every rank
    model = model_from_config(config)
    base = begin(model, config, resumed=checkpoint is not None)
    prepare_for_training(model if in_parts(config) else model.to(device), config)     # its parts are put there
    criterion = build_criterion(config, model).to(device)
    check_spread(config, criterion.balancing, len(val_set))
    wrapped, ema = spread(model, config, device)
    return Run(
        config, device, model, wrapped, ema, criterion, base=base, optimizer=build_optimizer(config, model, criterion),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"), writer=RunWriter(None, False),
        train_loader=train_loader, val_loader=val_loader, accumulate=accumulate,
        total_steps=min(config.max_iter, config.epochs * steps_per_epoch), steps_per_epoch=steps_per_epoch)


def build_optimizer(config: Config, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """The model's parameters in groups; what the loss balancing learns has no weight decay."""
    groups = parameter_groups(config, model)
    if learned := list(criterion.parameters()):
        groups.append({"params": learned, "weight_decay": 0.0})
    return OPTIMIZERS.load(config.optimizer).build(groups, config.optimizer_kwargs)


def accumulation(config: Config, world: int, checkpoint: Mapping[str, Any] | None = None) -> int:
    """Mini-batches per update, so that an update has the images of `global_batch`, or as many as in the checkpoint.

    A number of processes that does not fit is a ValueError.
    """
    per_pass = config.trBatch * world
    before = (checkpoint or {}).get("images_per_update", 0)
    wanted = config.global_batch or before
    if wanted % per_pass:
        name = f"global_batch {wanted}" if config.global_batch else f"the checkpoint's global batch {wanted}"
        raise ValueError(f"{name} is not a multiple of trBatch {config.trBatch} x {world} "
                         f"process(es) = {per_pass}; change trBatch, global_batch or the number of processes")
    if before and wanted != before:
        raise ValueError(f"the checkpoint was trained with {before} images per update, global_batch asks for {wanted}: "
                         "the order of the images depends on it; set it back, or begin another run")
    return max(1, wanted // per_pass)
