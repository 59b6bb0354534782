"""YAML as experiment files need it: names with text, numbers, true or false, lists and groups, and no surprises.

YAML allows more than an experiment should: a key that stands twice (the last one counts), references that multiply
themselves or hold themselves, dates and clock times in place of text, Python objects. All of it is refused or read as
the text that it is, with the file and the line.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from utils.options import ConfigError

MAX_BYTES = 64 * 1024       # of a file; the longest of the shipped ones has 2 KiB
MAX_DEPTH = 16              # of groups and lists in each other
MAX_VALUES = 5000           # after the references have been followed
MERGE = "tag:yaml.org,2002:merge"
KINDS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")      # control characters, halves of characters


class Empty:
    """What stands behind a bare `key:`. A merge tells it from an explicit `null`."""


EMPTY = Empty()


class _Loader(yaml.SafeLoader):
    """The safe loader without dates and without numbers in base 60 (12:30), and not deeper than `MAX_DEPTH`."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(self.peek_event().start_mark, f"more than {MAX_DEPTH} groups or lists in each other")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        clock = kind is ScalarNode and implicit[0] and ":" in value and tag.endswith((":int", ":float"))
        return "tag:yaml.org,2002:str" if clock else tag


class _Refused(Exception):
    def __init__(self, mark: yaml.Mark, message: str):
        super().__init__(f", line {mark.line + 1}: {message}")


def read_strictly(text: str, source: str) -> Any:
    """The value of a YAML text; a bare `key:` gives `EMPTY`. Raises ConfigError, which begins with `source`."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source}: {len(text):,} characters are too many for an experiment (at most {MAX_BYTES:,})")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check().visit(node)
        return _value(loader, node)
    except _Refused as error:
        raise ConfigError(f"{source}{error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


class _Check:
    """Visits every node once: keys, references, and the number of values that a full copy would have."""

    def __init__(self) -> None:
        self.sizes: dict[int, int | None] = {}         # of a node by its id; None while it is being visited

    def visit(self, node: Node) -> int:
        if (known := self.sizes.get(id(node), 0)) is None:
            raise _Refused(node.start_mark, "the value holds itself by a reference (&name, *name)")
        if known:
            return known
        self.sizes[id(node)] = None
        children = []
        if isinstance(node, MappingNode):
            self._check_keys(node)
            children = [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            children = node.value
        size = 1 + sum(self.visit(child) for child in children)
        if size > MAX_VALUES:
            raise _Refused(node.start_mark, f"more than {MAX_VALUES:,} values, with references (*name) counted in full")
        self.sizes[id(node)] = size
        return size

    @staticmethod
    def _check_keys(node: MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if not isinstance(key, ScalarNode) or not key.tag.endswith(":str"):
                shown = f"'{key.value}' is no name" if isinstance(key, ScalarNode) else "a list or group is no name"
                raise _Refused(key.start_mark, f"a key must be a name; {shown} (quote it if it is meant as one)")
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Refused(key.start_mark, f"the key '{key.value}' stands twice, here and on line "
                                               f"{lines[key.value]}; remove one of them")
            lines[key.value] = line


def _value(loader: _Loader, node: Node) -> Any:
    if node.tag not in KINDS:
        raise _Refused(node.start_mark, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} has no meaning here; "
                                        "write text, a number, true, false, a list or a group")
    if isinstance(node, MappingNode):
        loader.flatten_mapping(node)                   # puts the keys of `<<: *name` first, so that own ones win
        return {_scalar(loader, key): _value(loader, value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [None if (value := _value(loader, item)) is EMPTY else value for item in node.value]
    return _scalar(loader, node)


def _scalar(loader: _Loader, node: ScalarNode) -> Any:
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, IndexError):
        kind = node.tag.rpartition(":")[2]
        raise _Refused(node.start_mark, f"'{node.value[:40]}' cannot be read as {kind}") from None
    if isinstance(value, str) and (found := NOT_TEXT.search(value)):
        raise _Refused(node.start_mark, f"the text {value[:40]!r} holds the character {found[0]!r}, which no name has")
    return EMPTY if value is None and not node.value else value
