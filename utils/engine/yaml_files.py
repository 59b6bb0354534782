"""Experiment files as plain values: `_base_` files merged, `key=value` arguments applied, the origin of every key."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from utils.options import ConfigError


def read_yaml(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict, dict[str, str]]:
    """The file's values merged over its `_base_` files, and for every dotted key the file it came from.

    `chain`: the files that include this one.
    """
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its _base_ files include it again; remove one _base_ line")
    if not path.is_file():
        nearby = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yml")], n=1)
        hint = f" (did you mean {nearby[0]}?)" if nearby else ""
        raise FileNotFoundError(f"experiment file not found: {path}{hint}")
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, found {type(own).__name__}")
    bases = own.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: '_base_' must be the name of a file or a list of such names, got {bases!r}")
    merged, origin = {}, {}
    for base in bases:
        base_values, base_origin = read_yaml(path.parent / base, (*chain, path.resolve()))
        merged, origin = merge(merged, base_values), {**origin, **base_origin}
    return merge(merged, own), {**origin, **{key: str(path) for key in _dotted_keys(own)}}


def merge(base: dict, over: dict) -> dict:
    """Groups of keys are merged, everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def apply_overrides(values: dict, origin: dict[str, str], overrides: Sequence[str]) -> None:
    """`key.subkey=value` arguments, in place; values are YAML."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"argument '{override}' is not of the form key=value, e.g. optimizer_kwargs.lr=1e-4")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"argument '{override}': the value is not valid YAML") from error
        *names, last = key.split(".")
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
