"""Stops a run whose numbers are no longer finite, naming the step and the task, without slowing CUDA down."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteGuard:
    """Looks at the losses and the gradient norm of every update, which has left the weights alone where one is bad.

    On CUDA reading a value would make the host wait for the device, so the values are copied to the host in the
    background and read one update later; `flush` reads the outstanding ones and is called before anything is evaluated
    or saved.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None

    def check(self, step: int, names: Sequence[str], losses: Tensor, grad_norm: Tensor | None) -> None:
        """Raises FloatingPointError if a value of this update (CPU) or of the one before (CUDA) is not finite.

        losses: (passes, names), of the update's mini-batches. grad_norm: 0-dim; None leaves the gradient out.
        """
        self.flush()
        words = [f"loss '{name}'" for name in names] * len(losses)
        values = losses.flatten()
        if grad_norm is not None:
            words, values = [*words, "gradient norm"], torch.cat((values, grad_norm.float().reshape(1)))
        event = None
        if self._cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, words, values, event)
        if not self._cuda:
            self.flush()

    def flush(self) -> None:
        """Raises FloatingPointError if an outstanding value is not finite."""
        if self._pending is None:
            return
        step, names, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        bad = [f"{name} is {v}" for name, v in zip(names, values.tolist(), strict=True) if not math.isfinite(v)]
        if bad:
            raise FloatingPointError(
                f"step {step}: {', '.join(bad)}; training stopped before this could be saved, earlier checkpoints are "
                "untouched (try a lower optimizer_kwargs.lr, a grad_clip_param.max_norm, or precision=fp32)")
