"""The tasks by name; each is described once, in a file beside this one. A new task: such a file, and one entry here.

The order is part of the models: cross-task sequences and concatenations follow it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from utils.table import Table


@dataclass(frozen=True)
class TaskEntry:
    """A row of the table. labels: the kind (`data.label_kinds`) of its labels in a folder of one's own."""

    target: str
    labels: str


TASKS = Table("task", {
    "semseg": TaskEntry("utils.engine.tasks.segmentation:SEMSEG", "classes"),
    "depth": TaskEntry("utils.engine.tasks.depth:DEPTH", "depth"),
    "human_parts": TaskEntry("utils.engine.tasks.segmentation:HUMAN_PARTS", "classes"),
    "sal": TaskEntry("utils.engine.tasks.saliency:SALIENCY", "saliency"),
    "normals": TaskEntry("utils.engine.tasks.normals:NORMALS", "normals"),
    "edge": TaskEntry("utils.engine.tasks.edge:EDGE", "boundaries"),
})


def label_kinds() -> dict[str, str]:
    """The kind of each task's labels in a folder of one's own, empty where the folder has to say it."""
    return {name: getattr(entry, "labels", "") for name, entry in TASKS.items()}


def tasks_named(names: Iterable[str]) -> dict[str, Any]:
    """The rows (`task.Task`) of these tasks, in the table's order; an unknown name is a ValueError."""
    wanted = {TASKS.find(name) for name in names}
    return {name: TASKS.load(name) for name in TASKS if name in wanted}


def label_rules(names: Iterable[str]) -> Mapping[str, Any]:
    """Of these tasks what a data set must know: the rules of their labels, in the table's order."""
    return {name: task.label for name, task in tasks_named(names).items()}
