"""How the weights behind a number were chosen, in words that stand beside the number.

Scores of the best of many evaluations on the test split itself are too good: the test split has chosen. Two protocols
are sound: the weights after the last update, and the best on a part of the training split that is held out
(`val_from_train`). Which one it was is said by every result file and table.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAST, BY_TEST, UNKNOWN = "last update", "best on the test split", "not known"
BEST = "best"                   # the stem of the checkpoint that an evaluation has chosen


def of_best(val_from_train: float) -> str:
    """Of the weights that the evaluations of a training choose."""
    return f"best on {val_from_train:.0%} of the training split, held out" if val_from_train else BY_TEST


def of_update(step: int, total_steps: int) -> str:
    """Of weights that were taken by their number of updates."""
    return LAST if step >= total_steps else f"update {step} of {total_steps}"


def of_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> str:
    """Of a checkpoint of this program, by its name and its configuration; of any other it is not known."""
    if "selection" in checkpoint:               # of an exported file
        return checkpoint["selection"]
    if "averaged" in checkpoint:
        return f"mean of {len(checkpoint['averaged'])} checkpoints"
    config = checkpoint.get("config")
    if config is None or "step" not in checkpoint:
        return UNKNOWN
    if path.stem == BEST:
        return of_best(config.get("val_from_train", 0.0))
    return of_update(checkpoint["step"], checkpoint.get("total_steps", config["max_iter"]))


def evaluated_split(train_set: str, test_set: str, val_from_train: float) -> str:
    """The images that the evaluations of a training score."""
    return f"{train_set} train, {val_from_train:.0%} held out" if val_from_train else f"{test_set} test"
