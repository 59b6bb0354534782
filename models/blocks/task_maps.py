"""Maps of a backbone that gives every task maps of its own, and what to do with them where others give common ones."""

from collections.abc import Callable
from typing import Any


class TaskMaps(dict):
    """task -> what common maps would be: a list (B, C_i, h_i, w_i), finest first, or something made of it."""


def of_maps(function: Callable[[Any], Any], maps: Any) -> Any:
    """function(maps), or `TaskMaps` with its result for every task."""
    if isinstance(maps, TaskMaps):
        return TaskMaps({task: function(own) for task, own in maps.items()})
    return function(maps)


def for_task(maps: Any, task: str) -> Any:
    """The task's own maps, or the common ones."""
    return maps[task] if isinstance(maps, TaskMaps) else maps
