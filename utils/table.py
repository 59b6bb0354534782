"""Tables of everything that an experiment file can name: tasks, data sets, decoders, backbones, optimizers, ...

An entry is the thing itself, or the place where it is defined, "models.decoders.bim:BIMDecoder", which is imported
when it is first used. So a table costs nothing to read: a wrong name in an experiment file is refused, with the
nearest valid one, before PyTorch has been loaded. Adding something is one file and one entry.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.options import Options, nearest

# What an options class may use; modules that cost nothing to import.
LIGHT_MODULES = ("dataclasses", "typing", "math", "collections.abc", "utils.options")


class Table(dict):
    """Names -> entries of one kind ("decoder").

    An entry with attributes `target` and `defaults` stands for what `target` names, with these options.

    `aliases` maps further spellings to names; upper and lower case make no difference.
    """

    def __init__(self, kind: str, entries: Mapping[str, Any], aliases: Mapping[str, str] | None = None):
        super().__init__(entries)
        self.kind, self.aliases = kind, dict(aliases or {})

    def find(self, name: Any) -> str:
        """The entry's own name for any spelling of it; an unknown one is a ValueError with the nearest and all."""
        if not isinstance(name, str):
            raise ValueError(f"{self.kind} is given by its name, not by {name!r}; known: {', '.join(self)}")
        if name in self:
            return name
        spellings = {key.lower(): key for key in self} | {key.lower(): own for key, own in self.aliases.items()}
        if name.lower() in spellings:
            return spellings[name.lower()]
        hint = nearest(name, [*self, *self.aliases])
        known = "" if hint.startswith("known") else f" known: {', '.join(self)}"
        raise ValueError(f"unknown {self.kind} {name!r}; {hint}{known}")

    def load(self, name: str) -> Any:
        """What the entry stands for, imported if need be."""
        target = self._target(name)
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def options(self, name: str) -> type[Options]:
        """The options class of an entry: its attribute `Config`. Its module is not imported for that."""
        target = self._target(name)
        if not isinstance(target, str):
            return target.Config
        module, _, attribute = target.partition(":")
        if module in sys.modules:
            return getattr(sys.modules[module], attribute).Config
        return _read_options(module, _config_name(_class(_parse(module), attribute)))

    def defaults(self, name: str) -> Mapping[str, Any]:
        """Options that an entry sets before a user's: its attribute `defaults`, e.g. the sizes of swin_large."""
        return getattr(self[self.find(name)], "defaults", {})

    def _target(self, name: str) -> Any:
        entry = self[self.find(name)]
        return getattr(entry, "target", entry)


def _read_options(module: str, name: str) -> type[Options]:
    """The options class `name` of a module, from its source: importing the module would load PyTorch.

    Only the class is executed, its bases among the module's own imports, the imports of `LIGHT_MODULES`, and
    constants. The result is equal to the real class, not the same object; it serves for checking values.
    """
    tree = _parse(module)
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and any(a.name == name for a in statement.names):
            return _read_options(statement.module, name)
    node = _class(tree, name)
    names: dict[str, Any] = {"__name__": module}
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    needed: list[ast.stmt] = []
    for statement in tree.body:
        if _is_light(statement):
            needed.append(statement)
        elif isinstance(statement, ast.ImportFrom):
            names |= {a.name: _read_options(statement.module, a.name) for a in statement.names if a.name in bases}
        elif isinstance(statement, ast.ClassDef) and statement.name in bases:
            names[statement.name] = _read_options(module, statement.name)
    exec(compile(ast.Module([*needed, node], []), f"options of {module}", "exec"), names)
    names[name].__eq__ = _says_the_same
    return names[name]


def _says_the_same(self: Options, other: object) -> bool:
    """Equality of options that were read from a source, also with those of the imported class."""
    return type(self).__name__ == type(other).__name__ and vars(self) == vars(other)


def _is_light(statement: ast.stmt) -> bool:
    """An import of `LIGHT_MODULES`, or a constant."""
    if isinstance(statement, ast.Import):
        return all(alias.name in LIGHT_MODULES for alias in statement.names)
    if isinstance(statement, ast.ImportFrom):
        return statement.module in LIGHT_MODULES
    if not isinstance(statement, ast.Assign):
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True


def _parse(module: str) -> ast.Module:
    source = Path(importlib.util.find_spec(module).origin)
    return ast.parse(source.read_text(encoding="utf-8"), str(source))


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _config_name(owner: ast.ClassDef) -> str:
    """Of `Config = BIMConfig` in a class: BIMConfig; without such a line there are no options."""
    for statement in owner.body:
        if (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
                and statement.targets[0].id == "Config"):
            return statement.value.id
    raise TypeError(f"class {owner.name} says nothing about its options: it needs a line `Config = ...`")
