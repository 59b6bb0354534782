"""Constant learning rates that fall at given updates, after an optional linear warm-up."""

from dataclasses import dataclass

from utils.engine.schedules import ScheduleOptions


@dataclass(frozen=True)
class StepConfig(ScheduleOptions):
    """milestones: updates from which on the rate is `gamma` times smaller. warmup_iters, counted in updates."""

    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_iters: int = 0

    def __post_init__(self):
        rising = list(self.milestones) == sorted(set(self.milestones)) and all(at >= 1 for at in self.milestones)
        self.require(rising, "milestones", "numbers of at least 1 that rise")
        self.require(0 < self.gamma <= 1, "gamma", "a factor in (0, 1]")
        self.require(self.warmup_iters >= 0, "warmup_iters", "at least 0")

    def check(self, total: int) -> None:
        self.require(self.milestones, "milestones", "one or more updates at which the learning rate falls")
        self.require(self.milestones[-1] < total, "milestones", f"below max_iter ({total})")
        self.require(self.warmup_iters < total, "warmup_iters", f"below max_iter ({total})")


class Step:
    """lr(k) = lr gamma^(milestones that k has reached), times min(1, (k + 1) / warmup_iters)."""

    Config = StepConfig

    def __init__(self, config: StepConfig, lr: float, total: int):
        self.config, self.lr = config, lr

    def __call__(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        c = self.config
        lr = self.lr * c.gamma ** sum(step >= at for at in c.milestones)
        return lr * min(1.0, (step + 1) / c.warmup_iters) if c.warmup_iters else lr
