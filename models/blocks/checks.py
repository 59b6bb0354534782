"""Checks of what a decoder is given, options, tasks and maps: one form of message for all decoders."""

from collections.abc import Collection, Sequence
from typing import ClassVar


class Options:
    """Base of a decoder's config dataclass, `class InvPTConfig(Options, owner="InvPT")`: the name in messages."""

    owner: ClassVar[str] = "decoder"

    def __init_subclass__(cls, owner: str | None = None, **others):
        super().__init_subclass__(**others)
        if owner is not None:
            cls.owner = owner

    def require(self, condition: object, name: str, valid: str) -> None:
        """ValueError naming the option, its value and what would be valid, unless the condition holds."""
        if not condition:
            value = getattr(self, name)
            raise ValueError(f"{self.owner} option {name} = {value!r} is not valid, expected {valid}")

    def require_counts(self, *names: str) -> None:
        """Each of these options is 1 or more."""
        for name in names:
            self.require(getattr(self, name) >= 1, name, "a whole number of at least 1")


def check_tasks(decoder: str, tasks: Collection[str]) -> None:
    """Refuses a decoder without tasks."""
    if not tasks:
        raise ValueError(f"decoder '{decoder}' needs one or more tasks, got none")


def check_maps(decoder: str, in_channels: Sequence[int]) -> None:
    """Refuses a decoder without maps."""
    if not in_channels:
        raise ValueError(f"decoder '{decoder}' needs one or more maps of the backbone, got none")
