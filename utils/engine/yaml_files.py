"""Experiment files as plain values: `_base_` files merged, `key=value` arguments applied, the origin of every key."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.engine.strict_yaml import EMPTY, MAX_BYTES, MAX_DEPTH, read_strictly
from utils.options import ConfigError, shown

Layer = tuple[dict, dict[str, str]]     # values, and for every dotted key the file it came from


def read_yaml(path: Path) -> Layer:
    """The file's values merged over its `_base_` files, and for every dotted key the file it came from."""
    return _read(path, (), {})


def _read(path: Path, chain: tuple[Path, ...], known: dict[Path, Layer]) -> Layer:
    """`chain`: the files that include this one; `known`: every file that has been read."""
    resolved = path.resolve()
    if resolved in chain:
        raise ConfigError(f"{path}: its _base_ files include it again; remove one _base_ line")
    if len(chain) > MAX_DEPTH:
        raise ConfigError(f"{path}: more than {MAX_DEPTH} _base_ files in a chain")
    if resolved not in known:
        own = _own_values(path, chain[-1] if chain else None)
        bases = own.pop("_base_", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{path}: '_base_' must be the name of a file or a list of such names, got "
                              f"{None if bases is EMPTY else shown(bases)}")
        merged, origin = {}, {}
        for base in bases:
            base_values, base_origin = _read(path.parent / base, (*chain, resolved), known)
            merged, origin = merge(merged, base_values, str(path)), {**origin, **base_origin}
        known[resolved] = (merge(merged, own, str(path)),
                           {**origin, **{key: str(path) for key in _dotted_keys(own)}})
    return known[resolved]


def _own_values(path: Path, included_by: Path | None) -> dict:
    if not path.is_file():
        nearby = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yml")], n=1)
        hint = f" (did you mean {nearby[0]}?)" if nearby else ""
        named = f", the _base_ of {included_by}" if included_by else ""
        raise FileNotFoundError(f"experiment file not found: {path}{hint}{named}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes, too many for an experiment file (at most {MAX_BYTES:,})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: not UTF-8 text ({error.reason} at byte {error.start})") from error
    own = read_strictly(text, str(path))
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, found {type(own).__name__}")
    return own


def merge(base: dict, over: dict, source: str, prefix: str = "") -> dict:
    """Groups of keys are merged, everything else is replaced; `source` is the file of `over`.

    A bare `key:` over a group is refused: it looks like "nothing to add" and would drop the group.
    """
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        if isinstance(value, dict):
            out[key] = merge(below if isinstance(below, dict) else {}, value, source, f"{prefix}{key}.")
        elif value is EMPTY and isinstance(below, dict) and below:
            raise ConfigError(f"{source}: '{prefix}{key}' is empty, which would drop what its _base_ file sets there "
                              f"({', '.join(below)}); leave the line out to keep it, or write '{key}: null' to drop it")
        else:
            out[key] = None if value is EMPTY else value
    return out


def apply_overrides(values: dict, origin: dict[str, str], overrides: Sequence[str]) -> None:
    """`key.subkey=value` arguments, in place; values are YAML."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"argument '{override}' is not of the form key=value, e.g. optimizer_kwargs.lr=1e-4")
        value: Any = read_strictly(text, f"argument '{override}'") if text else ""
        value = merge({}, {"": value}, "")[""]
        *names, last = key.split(".")
        if len(names) > MAX_DEPTH:
            raise ConfigError(f"argument '{override[:40]}...': more than {MAX_DEPTH} groups in each other")
        group = values
        for name in names:
            if group.get(name) is None:
                group[name] = {}
            group = group[name]
            if not isinstance(group, dict):
                raise ConfigError(f"argument '{override}': '{name}' is not a group of keys")
        group[last] = value
        for depth in range(key.count(".") + 1):         # also of the groups that did not exist before
            origin.setdefault(key.rsplit(".", depth)[0], "the command line")
        origin[key] = "the command line"


def nearest_origin(key: str, origin: dict[str, str], source: str) -> str:
    """Where a dotted key comes from: its own origin, else that of the nearest group around it."""
    prefixes = [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]
    return next((origin[prefix] for prefix in prefixes if prefix in origin), source)


def _dotted_keys(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted_keys(value, f"{prefix}{key}.")
    return keys
