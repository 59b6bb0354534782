"""Constant learning rates that fall at given updates, after an optional linear warm-up."""

from dataclasses import dataclass

from utils.engine.schedules import WarmUpOptions


@dataclass(frozen=True)
class StepConfig(WarmUpOptions):
    """milestones: updates from which on the rate is multiplied by `gamma`. warmup_iters: see `Step`."""

    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        rising = list(self.milestones) == sorted(set(self.milestones)) and all(at >= 1 for at in self.milestones)
        self.require(rising, "milestones", "numbers of at least 1 that rise")
        self.require(0 < self.gamma <= 1, "gamma", "a factor in (0, 1]")

    def check(self, total: int) -> None:
        super().check(total)
        self.require(self.milestones, "milestones", "one or more updates at which the learning rate falls")
        self.require(self.milestones[-1] < total, "milestones", f"below max_iter ({total})")


class Step:
    """lr(k) = lr gamma^(milestones that k has reached), times min(1, (k + 1) / warmup_iters)."""

    Config = StepConfig

    def __init__(self, config: StepConfig, lr: float, total: int):
        self.config, self.lr = config, lr

    def __call__(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        c = self.config
        return self.lr * c.gamma ** sum(step >= at for at in c.milestones) * c.warm_up(step)
