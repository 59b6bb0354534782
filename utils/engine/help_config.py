"""The keys of an experiment file in words: `python main.py --help_config [KEY]`.

Everything is read from the options classes: types, defaults and ranges from their fields, the rest from their
docstrings and from the comments behind their fields in the source.
"""

import ast
import dataclasses
import importlib.util
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from utils.engine.config import Config
from utils.options import PLAIN, nearest

WIDTH = 120


def describe(key: str = "") -> str:
    """What one key may hold; without a key, all of them by section. ValueError: an unknown key, with the nearest.

    A dot leads into a group (`test_time.flip`), and behind `..._kwargs` into the options of an entry
    (`model_kwargs.bim.d_state`).
    """
    if not key:
        return "\n".join(_overview())
    cls, parts = Config, key.split(".")
    while True:
        field = _field(cls, parts.pop(0), key)
        table = _owner(cls, field)
        if not parts:
            return "\n".join(_about(cls, field, key))
        if table is not None:
            entry = table.find(parts.pop(0))
            cls = table.options(entry)
            if not parts:
                return "\n".join([f"{key}: options of {table.kind} '{entry}'", *_listing(cls, table.defaults(entry))])
        elif dataclasses.is_dataclass(cls := typing.get_type_hints(cls)[field.name]) is False:
            raise ValueError(f"unknown key '{key}': {field.name} holds no keys")


def keys() -> dict[str, tuple[str, ...]]:
    """All keys of an experiment file, those of groups with dots, and the values of those that have few."""
    return dict(_keys(Config, ""))


class Option(typing.NamedTuple):
    """A key of an options class in words."""

    name: str
    values: str         # what it may hold
    default: str
    comment: str


def options(table: Mapping, entry: str) -> list[Option]:
    """The options of a table's entry."""
    cls, own = table.options(entry), table.defaults(entry)
    hints, comments = typing.get_type_hints(cls), _notes(cls).comments
    return [Option(field.name, _words(hints[field.name], field),
                   _yaml(own[field.name]) if field.name in own else _default(field).removeprefix("default: "),
                   comments.get(field.name, "")) for field in dataclasses.fields(cls)]


def _keys(cls: type, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint) and not hasattr(hint, "from_yaml"):
            yield from _keys(hint, f"{prefix}{field.name}.")
            continue
        values = ("true", "false") if hint is bool else tuple(field.metadata.get("table", ()))
        yield f"{prefix}{field.name}", tuple(map(str, typing.get_args(hint))) if _is_literal(hint) else values


def _overview() -> Iterator[str]:
    yield "Keys of an experiment file with their defaults; each is an argument key=value, too."
    yield "python main.py --help_config KEY says more of one."
    notes = _notes(Config)
    for field in dataclasses.fields(Config):
        if title := notes.sections.get(field.name):
            yield f"\n{title}"
        yield from _line(Config, field, {})


def _about(cls: type, field: dataclasses.Field, key: str) -> Iterator[str]:
    hint, table, owner = typing.get_type_hints(cls)[field.name], field.metadata.get("table"), _owner(cls, field)
    yield f"{key}: {_words(hint, field)}; {_default(field)}"
    yield from _wrapped(_notes(cls).comments.get(field.name, ""))
    if table is not None:
        yield from _wrapped(f"names: {', '.join([*table, *(f'{family}:NAME' for family in table.families)])}")
    if owner is not None:
        yield from _wrapped(f"options of the {owner.kind} that {field.metadata['options_of']} names; --help_config "
                            f"{key}.NAME lists those of one: {', '.join(owner)}")
    if hasattr(hint, "from_yaml") or dataclasses.is_dataclass(hint):
        yield from _wrapped(" ".join((hint.__doc__ or "").split()))
    if dataclasses.is_dataclass(hint) and not hasattr(hint, "from_yaml"):
        yield from _listing(hint)


def _listing(cls: type, defaults: Mapping[str, Any] | None = None) -> list[str]:
    """All fields; `defaults` stand above those of the class."""
    lines = [line for field in dataclasses.fields(cls) for line in _line(cls, field, defaults or {})]
    return lines or ["  there are none"]


def _line(cls: type, field: dataclasses.Field, defaults: Mapping[str, Any]) -> Iterator[str]:
    """`name = default   comment`, the comment wrapped."""
    known = _yaml(defaults[field.name]) if field.name in defaults else _default(field).removeprefix("default: ")
    start = f"  {field.name} = {known}"
    comment = _notes(cls).comments.get(field.name, "")
    if len(start) > 40:
        yield start
        start = ""
    yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{start:<42}", subsequent_indent=" " * 42) or [start]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _field(cls: type, name: str, key: str) -> dataclasses.Field:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if name not in fields:
        raise ValueError(f"unknown key '{key}'; {nearest(name, fields)}")
    return fields[name]


def _owner(cls: type, field: dataclasses.Field) -> Mapping | None:
    """The table whose entries' options a `..._kwargs` field holds."""
    if "options_of" not in field.metadata:
        return None
    return _field(cls, field.metadata["options_of"], "").metadata["table"]


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _words(hint: Any, field: dataclasses.Field | None = None) -> str:
    """A type in plain English, with the field's range."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if field is not None and field.metadata.get("range"):
        return f"{_words(hint)}, " + " and ".join(f"{name.replace('_', ' ')} {bound}"
                                                  for name, bound in field.metadata["range"].items())
    if field is not None and "table" in field.metadata:
        return "a name"
    if _is_literal(hint):
        return f"one of {', '.join(map(str, args))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, args))
    if origin is tuple:
        return f"a list{'' if args[-1] is ... else f' of {len(args)}'}, each {_words(args[0])}"
    if origin is dict:
        return f"a group of names, each {_words(args[1])}"
    return PLAIN.get(hint, "a group of keys")


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "default: {...}" if dataclasses.is_dataclass(value) else f"default: {_yaml(value)}"


def _yaml(value: Any) -> str:
    if value is None or value == "":
        return "empty"
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


class _Notes(typing.NamedTuple):
    comments: dict[str, str]            # field -> the comment behind it
    sections: dict[str, str]            # field -> the title above it, where a new section begins


def _notes(cls: type) -> _Notes:
    """The comments in the source of an options class and its bases, which need not be imported."""
    found = _Notes({}, {})
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            notes = _notes_in(base.__module__, base.__name__)
            found.comments.update({name: words for name, words in notes.comments.items()
                                   if words or name not in found.comments})
            found.sections.update(notes.sections)
    return found


@cache
def _notes_in(module: str, name: str) -> _Notes:
    found, spec = _Notes({}, {}), importlib.util.find_spec(module)
    source = Path(str(spec.origin)).read_text(encoding="utf-8")
    lines = source.splitlines()
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            behind = lines[statement.end_lineno - 1].encode()[statement.end_col_offset:].decode()
            found.comments[statement.target.id] = behind.strip().lstrip("# ")
            above = lines[statement.lineno - 2].strip()
            if above.startswith("#"):
                found.sections[statement.target.id] = above.lstrip("# ")
    return found
