"""Tables of everything that an experiment file can name: tasks, data sets, decoders, backbones, optimizers, ...

An entry is the thing itself, or the place where it is defined, "models.decoders.bim:BIMDecoder", which is imported
when it is first used. So a table costs nothing to read: a wrong name in an experiment file is refused, with the
nearest valid one, before PyTorch has been loaded. Adding something is one file and one entry.
"""

import ast
import builtins
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from utils.options import Options, nearest, shown

# What an options class may use; modules that cost nothing to import.
LIGHT_MODULES = ("dataclasses", "typing", "math", "collections.abc", "utils.options")


class Table(dict):
    """Names -> entries of one kind ("decoder").

    An entry with attributes `target` and `defaults` stands for what `target` names, with these options.

    `aliases` maps further spellings to names; upper and lower case make no difference.

    `families` maps the first word of names such as "timm:resnet50" to a function, rest of the name -> entry, which
    raises a ValueError for what it does not know. These names are no rows: the table does not list them.
    """

    def __init__(self, kind: str, entries: Mapping[str, Any], aliases: Mapping[str, str] | None = None,
                 families: Mapping[str, Callable[[str], Any]] | None = None):
        super().__init__(entries)
        self.kind, self.aliases, self.families = kind, dict(aliases or {}), dict(families or {})

    def __missing__(self, name: str) -> Any:
        family, colon, rest = str(name).partition(":")
        if not colon or family not in self.families:
            raise KeyError(name)
        return self.families[family](rest)

    def find(self, name: Any) -> str:
        """The entry's own name for any spelling of it; an unknown one is a ValueError with the nearest and all."""
        if not isinstance(name, str):
            raise ValueError(f"{self.kind} is given by its name, not by {shown(name)}; known: {', '.join(self)}")
        if name in self:
            return name
        spellings = {key.lower(): key for key in self} | {key.lower(): own for key, own in self.aliases.items()}
        if name.lower() in spellings:
            return spellings[name.lower()]
        if name.partition(":")[0] in self.families and ":" in name:
            _ = self[name]                      # ValueError where the family does not know it
            return name
        hint = nearest(name, [*self, *self.aliases])
        known = "" if hint.startswith("known") else f" known: {', '.join(self)}"
        known += "".join(f", {family}:NAME" for family in self.families)
        raise ValueError(f"unknown {self.kind} {shown(name)}; {hint}{known}")

    def load(self, name: str) -> Any:
        """What the entry stands for, imported if need be; a ValueError that names the entry where that fails."""
        target = self._target(name)
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.kind} {name!r} stands for {target}, which cannot be imported: {error}") from error

    def options(self, name: str) -> type[Options]:
        """The options class of an entry: its attribute `Config`, if possible without importing its module."""
        target = self._target(name)
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            if module not in sys.modules and (found := _read_config(module, attribute)) is not None:
                return found
        return self.load(name).Config

    def defaults(self, name: str) -> Mapping[str, Any]:
        """Options that an entry sets before a user's: its attribute `defaults`, e.g. the sizes of swin_large."""
        return getattr(self[self.find(name)], "defaults", {})

    def _target(self, name: str) -> Any:
        entry = self[self.find(name)]
        return getattr(entry, "target", entry)


def _read_config(module: str, owner: str) -> type[Options] | None:
    """The options class that class `owner` names by a line `Config = ...`, or None where only an import can tell."""
    if (tree := _parse(module)) is None or (node := _class(tree, owner)) is None:
        return None
    for statement in node.body:
        if (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name)
                and [target.id for target in statement.targets if isinstance(target, ast.Name)] == ["Config"]):
            return _read_options(module, statement.value.id)
    return None


def _read_options(module: str, name: str) -> type[Options] | None:
    """The options class `name` of a module, from its source: importing the module would load PyTorch.

    Only the class is executed, with its bases, the imports of `LIGHT_MODULES` and constants: a class that needs more
    gives None. The result is equal to the real class, not the same object; it serves for checking values.
    """
    if (tree := _parse(module)) is None:
        return None
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and any(a.name == name for a in statement.names):
            return _read_options(statement.module, name)
    if (node := _class(tree, name)) is None:
        return None
    names: dict[str, Any] = {"__name__": module}
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    for statement in tree.body:
        if _is_light(statement):
            exec(compile(ast.Module([statement], []), f"options of {module}", "exec"), names)
        elif isinstance(statement, ast.ImportFrom):
            names |= {a.name: _read_options(statement.module, a.name) for a in statement.names if a.name in bases}
        elif isinstance(statement, ast.ClassDef) and statement.name in bases:
            names[statement.name] = _read_options(module, statement.name)
    if any(names.get(used) is None for used in _names_used(node)):
        return None
    exec(compile(ast.Module([node], []), f"options of {module}", "exec"), names)
    names[name].__eq__ = _says_the_same
    return names[name]


def _names_used(node: ast.ClassDef) -> set[str]:
    """Names that a class takes from its module."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in found if not isinstance(n.ctx, ast.Load)} | {n.arg for n in ast.walk(node)
                                                                      if isinstance(n, ast.arg)} | {node.name}
    return {n.id for n in found} - own - set(dir(builtins))


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


def _parse(module: str) -> ast.Module | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or not str(spec.origin).endswith(".py"):
        return None
    return _tree(str(spec.origin), Path(spec.origin).stat().st_mtime_ns)


@cache
def _tree(file: str, changed: int) -> ast.Module:
    """The statements of a file, parsed once for each time it was changed."""
    return ast.parse(Path(file).read_text(encoding="utf-8"), file)


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
