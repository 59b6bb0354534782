"""The learning rate schedules by name; a new one: a file with a class like `poly.Poly`, and one entry here."""

from utils.options import Options
from utils.table import Table


class ScheduleOptions(Options):
    """Base of the options of a schedule."""

    def check(self, total: int) -> None:
        """OptionError for what does not fit a training of `total` updates."""


SCHEDULES = Table("scheduler", {
    "cosine": "utils.engine.schedules.cosine:Cosine",
    "poly": "utils.engine.schedules.poly:Poly",
    "step": "utils.engine.schedules.step:Step",
})
