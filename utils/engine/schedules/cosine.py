"""Half a cosine per training, after an optional linear warm-up (Loshchilov and Hutter, "SGDR", ICLR 2017)."""

import math
from dataclasses import dataclass

from utils.engine.schedules import WarmUpOptions


@dataclass(frozen=True)
class CosineConfig(WarmUpOptions):
    """min_lr, warmup_iters: see `Cosine`."""

    min_lr: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.require(self.min_lr >= 0, "min_lr", "at least 0")


class Cosine:
    """lr (k + 1) / w in the w updates of the warm-up, then down to min_lr at update K:
    min_lr + (lr - min_lr) (1 + cos(pi (k - w) / (K - w))) / 2."""

    Config = CosineConfig

    def __init__(self, config: CosineConfig, lr: float, total: int):
        self.config, self.lr, self.total = config, lr, total

    def __call__(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        c = self.config
        if step < c.warmup_iters:
            return self.lr * (step + 1) / c.warmup_iters
        progress = (step - c.warmup_iters) / (self.total - c.warmup_iters)
        return c.min_lr + (self.lr - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
