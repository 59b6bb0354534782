"""No neck: the decoder works on the backbone's own maps."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from utils.options import Options


@dataclass(frozen=True)
class NoNeckConfig(Options):
    """Nothing to choose."""


class NoNeck(nn.Module):
    """Returns what it is given. It has no parameters, so it leaves no trace in a state dict."""

    Config = NoNeckConfig

    def __init__(self, channels: Sequence[int], strides: Sequence[int], config: NoNeckConfig):
        super().__init__()
        self.channels, self.strides = tuple(channels), tuple(strides)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return maps
