"""Polynomial decay per update, after an optional linear warm-up."""

from dataclasses import dataclass

from utils.engine.schedules import WarmUpOptions


@dataclass(frozen=True)
class PolyConfig(WarmUpOptions):
    """power, min_lr, warmup_iters: see `Poly`."""

    power: float = 0.9
    min_lr: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.require(self.power >= 0, "power", "at least 0")
        self.require(self.min_lr >= 0, "min_lr", "at least 0")


class Poly:
    """lr(k) = min_lr + (lr - min_lr) (1 - k / total)^power, times min(1, (k + 1) / warmup_iters)."""

    Config = PolyConfig

    def __init__(self, config: PolyConfig, lr: float, total: int):
        self.config, self.lr, self.total = config, lr, total

    def __call__(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        c = self.config
        return (c.min_lr + (self.lr - c.min_lr) * (1 - step / self.total) ** c.power) * c.warm_up(step)
