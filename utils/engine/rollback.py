"""Back to the last checkpoint in the middle of a run."""

from collections.abc import Callable
from typing import Any

from utils import distributed
from utils.engine.checkpoint import read_checkpoint
from utils.engine.keeper import Keeper
from utils.engine.manifest import newest_whole
from utils.engine.resume import restore
from utils.engine.run import Run
from utils.recording import Recorded


def roll_back(run: Run, keeper: Keeper, make_update: Callable[..., Any]) -> str | None:
    """Weights, averages, optimizer and loss balancing as in the newest whole checkpoint; says which, None without one.

    The number of updates goes on, and so do the order of the images and the learning rate, which depend on it alone:
    other images follow, and nothing is logged twice. All processes take part.
    """
    if keeper.saver is not None:
        keeper.saver.wait()
    path = distributed.from_main(lambda: newest_whole(run.config.run_dir))
    if path is None:
        return None
    going_on = {name: getattr(run, name) for name in ("step", "best", "metrics", "rng", "scored", "sums")}
    checkpoint = read_checkpoint(path)
    restore(run, checkpoint, path)
    for name, value in going_on.items():
        setattr(run, name, value)
    if isinstance(make_update, Recorded):
        make_update.forget()                    # the optimizer's state lies elsewhere now
    return f"{path} (step {checkpoint['step']})"
