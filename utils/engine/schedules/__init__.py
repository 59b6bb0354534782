"""The learning rate schedules by name; a new one: a file with a class like `poly.Poly`, and one entry here."""

from dataclasses import dataclass

from utils.options import Options
from utils.table import Table


class ScheduleOptions(Options):
    """Base of the options of a schedule."""

    def check(self, total: int) -> None:
        """OptionError for what does not fit a training of `total` updates."""


@dataclass(frozen=True)
class WarmUpOptions(ScheduleOptions):
    """Base of the options of a schedule that begins with a linear warm-up."""

    warmup_iters: int = 0               # counted in updates

    def __post_init__(self):
        self.require(self.warmup_iters >= 0, "warmup_iters", "at least 0")

    def check(self, total: int) -> None:
        self.require(self.warmup_iters < total, "warmup_iters", f"below max_iter ({total})")

    def warm_up(self, step: int) -> float:
        """min(1, (step + 1) / warmup_iters), a factor of the learning rate."""
        return min(1.0, (step + 1) / self.warmup_iters) if self.warmup_iters else 1.0


SCHEDULES = Table("scheduler", {
    "cosine": "utils.engine.schedules.cosine:Cosine",
    "poly": "utils.engine.schedules.poly:Poly",
    "step": "utils.engine.schedules.step:Step",
})
