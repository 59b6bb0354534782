"""The tasks by name; each is described once, in a file beside this one. A new task: such a file, and one entry here.

The order is part of the models: cross-task sequences and concatenations follow it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from utils.table import Table

APART = "@"


class TaskTable(Table):
    """Tasks by name. `semseg@street` is a further task like semseg, with classes, a head and a score of its own."""

    def find(self, name: Any) -> str:
        base, mark, apart = name.partition(APART) if isinstance(name, str) else (name, "", "")
        if mark and not apart.isidentifier():
            raise ValueError(f"task {name!r}: behind {APART} stands a name of letters, digits and underscores")
        return f"{super().find(base)}{mark}{apart}"

    def __missing__(self, name: str) -> Any:
        base, mark, _ = name.partition(APART)
        if not mark:
            raise KeyError(name)
        return self[base]

    def is_name(self, name: str) -> bool:
        """Whether this is the name of a task, as it is written."""
        try:
            return self.find(name) == name
        except ValueError:
            return False

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names of tasks as the table has them, those named apart behind theirs, by name."""
        order = list(self)
        return sorted(names, key=lambda name: (order.index(name.partition(APART)[0]), name))


@dataclass(frozen=True)
class TaskEntry:
    """A row of the table. labels: the kind (`data.label_kinds`) of its labels in a folder of one's own."""

    target: str
    labels: str


TASKS = TaskTable("task", {
    "semseg": TaskEntry("utils.engine.tasks.segmentation:SEMSEG", "classes"),
    "depth": TaskEntry("utils.engine.tasks.depth:DEPTH", "depth"),
    "human_parts": TaskEntry("utils.engine.tasks.segmentation:HUMAN_PARTS", "classes"),
    "sal": TaskEntry("utils.engine.tasks.saliency:SALIENCY", "saliency"),
    "normals": TaskEntry("utils.engine.tasks.normals:NORMALS", "normals"),
    "edge": TaskEntry("utils.engine.tasks.edge:EDGE", "boundaries"),
    "det3d": TaskEntry("utils.engine.tasks.det3d:DET3D", "boxes"),
})


def label_kinds() -> dict[str, str]:
    """The kind of each task's labels in a folder of one's own, empty where the folder has to say it."""
    return {name: getattr(entry, "labels", "") for name, entry in TASKS.items()}


def tasks_named(names: Iterable[str]) -> dict[str, Any]:
    """The rows (`task.Task`) of these tasks, in the table's order; an unknown name is a ValueError."""
    return {name: TASKS.load(name) for name in TASKS.in_order({TASKS.find(name) for name in names})}


def label_rules(names: Iterable[str]) -> Mapping[str, Any]:
    """Of these tasks what a data set must know: the rules of their labels, in the table's order."""
    return {name: task.label for name, task in tasks_named(names).items()}
