"""The tasks by name; each is described once, in a file beside this one. A new task: such a file, and one entry here.

The order is part of the models: cross-task sequences and concatenations follow it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from utils.table import Table

TASKS = Table("task", {
    "semseg": "utils.engine.tasks.segmentation:SEMSEG",
    "depth": "utils.engine.tasks.depth:DEPTH",
    "human_parts": "utils.engine.tasks.segmentation:HUMAN_PARTS",
    "sal": "utils.engine.tasks.saliency:SALIENCY",
    "normals": "utils.engine.tasks.normals:NORMALS",
    "edge": "utils.engine.tasks.edge:EDGE",
})


def tasks_named(names: Iterable[str]) -> dict[str, Any]:
    """The rows (`task.Task`) of these tasks, in the table's order; an unknown name is a ValueError."""
    wanted = {TASKS.find(name) for name in names}
    return {name: TASKS.load(name) for name in TASKS if name in wanted}


def label_rules(names: Iterable[str]) -> Mapping[str, Any]:
    """Of these tasks what a data set must know: the rules of their labels, in the table's order."""
    return {name: task.label for name, task in tasks_named(names).items()}
