"""Tables that rename the keys of a state dict: what a key begins with, and what that becomes."""

import re
from collections.abc import Sequence

Rows = tuple[tuple[re.Pattern[str], str], ...]


def rename_table(*rows: tuple[str, str]) -> Rows:
    """Rows (pattern, target), of which the first that fits counts; `{name}` in a target is that group's text."""
    return tuple((re.compile(pattern), target) for pattern, target in rows)


def rename_key(key: str, rows: Rows, tasks: Sequence[str]) -> str:
    """Our name of a key; a key that the original does not have stays as it is.

    Some originals keep layers of tasks in lists: `{task}` is the name of the task with the number <index>.
    """
    for pattern, target in rows:
        if match := pattern.match(key):
            parts = match.groupdict()
            if "index" in parts:
                if int(parts["index"]) >= len(tasks):
                    return key
                parts["task"] = tasks[int(parts["index"])]
            return target.format(**parts) + key[match.end():]
    return key
