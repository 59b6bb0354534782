"""The moving average of a model's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.sharded import local


class MovingAverage(AveragedModel):
    """theta_ema <- decay theta_ema + (1 - decay) theta, running statistics included; the first update copies.

    Integers (indices, counts) are copied: an average rounds them down.

    PyTorch's class asks the device at every update whether it is the first one; here the host remembers.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.n_averaged = self.n_averaged.to(next(model.parameters()).device)
        self.decay = decay
        self._started: bool | None = None           # None: to be read from `n_averaged`

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """After every update of the model's weights."""
        if self._started is None:
            self._started = bool(self.n_averaged > 0)
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point() and self._started]
        copied = [pair for pair in pairs if not (pair[0].is_floating_point() and self._started)]
        if averaged:
            torch._foreach_lerp_(*map(list, zip(*averaged, strict=True)), 1 - self.decay)
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
        self._started = True
        self.n_averaged += 1

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._started = None


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """What of it lies on this process."""
    return [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
