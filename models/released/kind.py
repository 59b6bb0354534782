"""What the kinds of released checkpoints have in common: a table that renames keys, and how a file is recognised."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from models.backbones.swin import to_timm_layout


class Released:
    """One kind: its keys, and ours. State dicts come without `module.` prefix.

    marks: beginnings of keys, any of which tells the kind.
    rows: (old, new), what a key begins with and what that becomes; the first row that fits counts. `{name}` is one part
        of a key, without dots, and `<a|b>` stands in both columns for a and for b; apart from that `old` is a regular
        expression whose dots are dots. Some originals number their tasks: `{task}` is that with the number `{index}`.
    tails: what may follow such a beginning, as a whole -> ours. tasks: names of tasks that differ -> ours.
    dead: beginnings of layers that no output of the original depends on; ours has none of them.
    A key that is neither known nor dead keeps its name, and the strict load reports it.
    """

    def __init__(self, marks: Sequence[str], rows: Iterable[tuple[str, str]], dead: str = "(?!)",
                 tails: Mapping[str, str] | None = None, tasks: Mapping[str, str] | None = None):
        self.marks, self.tails, self.dead, self.tasks = tuple(marks), tails or {}, _pattern(dead), tasks or {}
        self.rows = [(_pattern(old), new) for row in rows for old, new in _alternatives(*row)]

    def recognises(self, keys: Iterable[str]) -> bool:
        return any(key.startswith(self.marks) for key in keys)

    def is_dead(self, key: str) -> bool:
        """Whether the layer has no influence on any output, as far as one key alone tells."""
        return self.dead.match(key) is not None

    def dead_keys(self, keys: Collection[str]) -> set[str]:
        """All keys of such layers."""
        return {key for key in keys if self.is_dead(key)}

    def find(self, key: str, tasks: Sequence[str] = ()) -> tuple[str, dict[str, str]]:
        """Our name of a key and the texts that its row names. `tasks` in the order of the task table."""
        for pattern, new in self.rows:
            if match := pattern.match(key):
                parts, rest = match.groupdict(), key[match.end():]
                if "index" in parts:
                    if int(parts["index"]) >= len(tasks):
                        break
                    parts["task"] = tasks[int(parts["index"])]
                if "task" in parts:
                    parts["task"] = self.tasks.get(parts["task"], parts["task"])
                return new.format(**parts) + self.tails.get(rest, rest), parts
        return key, {}

    def rename(self, key: str, tasks: Sequence[str] = ()) -> str:
        """Our name of a key."""
        return self.find(key, tasks)[0]

    def reshaped(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the original in the shape that it has under our `name`."""
        return value

    def convert(self, state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        """Released weights, or any part of them, under our keys, without the dead layers; gradients go the same way."""
        dead = self.dead_keys(state)
        names = {key: self.rename(key, tasks) for key in state if key not in dead}
        return {name: self.reshaped(name, state[key]) for key, name in names.items()}


class ReleasedOnSwin(Released):
    """A kind whose file holds a Swin of any published layout, or a backbone with our keys."""

    def convert(self, state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        rest = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        encoder = {f"encoder.{key}": value for key, value in to_timm_layout(backbone).items()}
        return encoder | super().convert(rest, tasks)


def _alternatives(old: str, new: str) -> Iterator[tuple[str, str]]:
    """The rows that a row with `<a|b>` stands for."""
    choice = re.compile("<(.*?)>")
    if not choice.search(old):
        yield old, new
        return
    for pair in zip(*(choice.search(text)[1].split("|") for text in (old, new)), strict=True):
        yield from _alternatives(*(choice.sub(lambda _, word=word: word, text, count=1)
                                   for text, word in zip((old, new), pair, strict=True)))


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^.]+)", text.replace(".", r"\.")))
