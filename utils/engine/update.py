"""One update of the weights, from batches to the moving average. Nothing in it waits for the device.

So it can also be recorded once and replayed (`cuda_graph: true`); the loop is the same.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from losses.multi_task import MultiTaskLoss
from utils import distributed
from utils.engine.averages import MovingAverage
from utils.engine.config import Config
from utils.engine.tasks import tasks_named
from utils.precision import autocast
from utils.recording import CudaRecorder, Recorded, Recorder, reason_against
from utils.sharded import norms_of

logger = logging.getLogger(__name__)

WARM_UPS = 3
WARM_UPS_DDP = 11       # DDP measures itself with events in its first ten iterations, which cannot be recorded


class Outcome(NamedTuple):
    """What an update leaves to read, on the device."""

    losses: Tensor       # (passes, names), float32
    grad_norm: Tensor    # 0-dim, before clipping
    grad_norms: Tensor   # (parameters that have a gradient,), of each, before clipping
    sound: Tensor        # 0-dim, whether all of it is finite on every process: only then the weights have changed


class Trained(Protocol):
    """What an update works on, and what it changes: a `Run`, say."""

    config: Config
    device: torch.device
    model: nn.Module
    wrapped: nn.Module                  # the same under DDP
    ema: MovingAverage | None
    criterion: MultiTaskLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    accumulate: int                     # batches of an update


class Update:
    """Forward and backward passes of `run.accumulate` batches, clipping, the optimizer's step, the moving average.

    Gradients stay where they are until the next update. An update whose losses or gradient norm are not finite
    changes no weight, which is decided on the device; a scaled loss (fp16) asks for the gradients alone.
    """

    def __init__(self, run: Trained) -> None:
        self.run, self.optimizer = run, run.optimizer
        self.parameters = list(run.model.parameters())
        backbone = {id(parameter) for parameter in run.model.encoder.parameters()}
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.shared = [parameter for parameter in trained if id(parameter) in backbone]
        self.others = [parameter for parameter in trained if id(parameter) not in backbone]
        self.loss_names: list[str] = []
        self.grad_names: list[str] = []             # of the model's parameters that have a gradient
        self.lr: Tensor | None = None               # where updates are recorded, its place on the device

    def set_lr(self, lr: float) -> None:
        """Of the updates to come, in all groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.lr is not None:
            self.lr.fill_(lr)

    def __call__(self, batches: Sequence[Mapping[str, Any]]) -> Outcome:
        """batches: image (B, 3, H, W), the label of each task, and its "shares" (`MultiTaskLoss`), for every pass."""
        run = self.run
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.stack([self._backward(batch, last=batch is batches[-1]) for batch in batches])
        distributed.average_gradients(run.criterion.parameters())         # the model's are averaged by DDP
        run.scaler.unscale_(self.optimizer)
        grad_norm, grad_norms = self._clip()
        sound = distributed.true_everywhere(torch.isfinite(losses).all() & torch.isfinite(grad_norm))
        self._step(sound)
        if run.ema is not None:
            run.ema.update_parameters(run.model)
        return Outcome(losses, grad_norm, grad_norms, sound)

    def _backward(self, batch: Mapping[str, Any], last: bool) -> Tensor:
        """Adds the gradients of one batch; returns its losses (names,)."""
        run = self.run

        def scaled(loss: Tensor) -> Tensor:
            return run.scaler.scale(loss / run.accumulate)

        with _synchronised(run.wrapped, last):
            with autocast(run.device, run.config.precision):
                out = run.wrapped(batch["image"], batch)
            losses = run.criterion(out.final, batch, out.intermediate, out.extra, batch.get("shares"))
            run.criterion.balancing.backward(losses, scaled, self.shared, self.others)
        self.loss_names = list(losses)
        return torch.stack([loss.detach().float() for loss in losses.values()])

    def _clip(self) -> tuple[Tensor, Tensor]:
        """Norm of the model's gradients, which are scaled down to the largest one allowed, and of each of them."""
        limit = self.run.config.grad_clip_param
        named = {name: p.grad for name, p in self.run.model.named_parameters() if p.grad is not None}
        self.grad_names = list(named)
        if not named:                                   # every trained parameter is outside the model
            return torch.zeros((), device=self.run.device), torch.zeros(0, device=self.run.device)
        norms = norms_of(list(named.values()), limit.norm_type)
        norm = torch.linalg.vector_norm(norms, limit.norm_type)
        if limit.max_norm != float("inf"):
            clip_grads_with_norm_(self.parameters, limit.max_norm, norm)
        return norm, norms

    def _step(self, sound: Tensor) -> None:
        scaler, optimizer = self.run.scaler, self.optimizer
        with self._lr_on_device():
            if scaler.is_enabled():
                scaler.step(optimizer)
                scaler.update()
                return
            if can_skip(optimizer):
                optimizer.found_inf = (~sound).float()
                optimizer.step()
            elif sound:                                  # the host waits for the value
                optimizer.step()

    @contextmanager
    def _lr_on_device(self) -> Iterator[None]:
        """Where updates are recorded: optimizers read it there. Behind it, checkpoints are the same as without."""
        if self.lr is None:
            yield
            return
        capturable = self.lr.is_cuda and torch.cuda.is_current_stream_capturing()
        before = [{key: group[key] for key in ("lr", "capturable") if key in group}
                  for group in self.optimizer.param_groups]
        for group, plain in zip(self.optimizer.param_groups, before, strict=True):
            scale = group.get("lr_scale", 1.0)
            wanted = {"lr": self.lr if scale == 1 else self.lr * scale, "capturable": capturable}
            group |= {key: wanted[key] for key in plain}
        try:
            yield
        finally:
            for group, plain in zip(self.optimizer.param_groups, before, strict=True):
                group |= plain


def build_update(run: Trained) -> tuple[Update, Callable[[Sequence[Mapping[str, Any]]], Outcome]]:
    """The update, and what the loop calls: itself or, with `cuda_graph: true`, a recording of it."""
    update = Update(run)
    if not run.config.cuda_graph:
        return update, update
    if reason := unrecordable(run):
        logger.warning("cuda_graph: updates run as without it: %s", reason)
        return update, update
    return update, recorded(update, CudaRecorder(run.device))


def tensors_of(batch: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What an update takes of a batch: the images, the labels of the active tasks, and how much each counts."""
    return {name: batch[name] for name in ("image", "shares", *config.tasks)}


def recorded(update: Update, recorder: Recorder) -> Recorded:
    """Updates as graphs."""
    run = update.run
    update.lr = torch.zeros((), device=run.device)

    def recover(error: RuntimeError) -> None:
        if distributed.world_size() > 1:
            raise ValueError("an update cannot be recorded, and the processes cannot agree to go on; set "
                             f"cuda_graph=false ({error})") from error
        scaler = torch.amp.GradScaler(run.device.type, enabled=run.scaler.is_enabled())
        scaler.load_state_dict(run.scaler.state_dict())         # the old one has seen half an update
        run.scaler = scaler

    warm_ups = WARM_UPS_DDP if isinstance(run.wrapped, DistributedDataParallel) else WARM_UPS
    return Recorded(update, recorder, "an update", warm_ups, recover)


def unrecordable(run: Trained) -> str | None:
    """Why the updates of a run cannot be recorded, or None."""
    config = run.config
    lists = [task for task, row in tasks_named(config.tasks).items() if not row.label.is_map]
    reasons = {
        f"it needs CUDA, this run is on {run.device.type}": run.device.type != "cuda",
        f"loss_scheme {config.loss_kwargs.loss_scheme} reads losses or gradients on the host":
            run.criterion.balancing.reads_values,
        f"activation_checkpointing {config.activation_checkpointing} stores random states, which a graph cannot":
            config.activation_checkpointing != "none",
        f"optimizer {config.optimizer} reads on the host whether to step": not can_skip(run.optimizer),
        f"labels of {', '.join(lists)} have another size in every batch": bool(lists),
        "find_unused_parameters reads on the host what is used":
            config.find_unused_parameters and distributed.world_size() > 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), None) or reason_against(run.model)


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it reads on the device if a step is to be made, as PyTorch's fused ones do and say in this attribute."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _synchronised(model: nn.Module, last: bool) -> AbstractContextManager:
    """DDP sums gradients over ranks only in the last batch of an update; FSDP keeps no whole gradient, and always."""
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
