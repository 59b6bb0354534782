"""Polynomial decay per update, after an optional linear warm-up."""

from dataclasses import dataclass

from utils.engine.schedules import ScheduleOptions


@dataclass(frozen=True)
class PolyConfig(ScheduleOptions):
    """power, min_lr, warmup_iters (counted in updates): see `Poly`."""

    power: float = 0.9
    min_lr: float = 0.0
    warmup_iters: int = 0

    def __post_init__(self):
        self.require(self.power >= 0, "power", "at least 0")
        self.require(self.min_lr >= 0, "min_lr", "at least 0")
        self.require(self.warmup_iters >= 0, "warmup_iters", "at least 0")

    def check(self, total: int) -> None:
        self.require(self.warmup_iters < total, "warmup_iters", f"below max_iter ({total})")


class Poly:
    """lr(k) = min_lr + (lr - min_lr) (1 - k / total)^power, times min(1, (k + 1) / warmup_iters)."""

    Config = PolyConfig

    def __init__(self, config: PolyConfig, lr: float, total: int):
        self.config, self.lr, self.total = config, lr, total

    def __call__(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        c = self.config
        decayed = c.min_lr + (self.lr - c.min_lr) * (1 - step / self.total) ** c.power
        return decayed * min(1.0, (step + 1) / c.warmup_iters) if c.warmup_iters else decayed
