"""Reading YAML into dataclasses: `_base_` files, `key=value` arguments, types checked, mistakes named.

Knows nothing of any particular key; `utils.engine.config` holds the schema.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A mistake in an experiment file or in a `key=value` argument."""


def read_yaml(path: Path, chain: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    """The file's values merged over its `_base_` files, and for every dotted key the file it came from."""
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
    merged, origin = {}, {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_values, base_origin = read_yaml(path.parent / base, (*chain, path.resolve()))
        merged, origin = merge(merged, base_values), {**origin, **base_origin}
    return merge(merged, own), {**origin, **{key: str(path) for key in dotted_keys(own)}}


def merge(base: dict, over: dict) -> dict:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def dotted_keys(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{key}.")
    return keys


def nearest_origin(key: str, origin: dict[str, str], source: str) -> str:
    parents = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]
    return next((origin[parent] for parent in parents if parent in origin), source)


def parse_scalar(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"argument '{override}': the value is not valid YAML") from error


def assign(values: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"argument '{override}': '{key}' is not a group of keys")
    values[keys[-1]] = value


def parse_dataclass(cls: type, values: Mapping, prefix: str, where: Callable[[str], str],
                    also_known: frozenset[str] = frozenset()) -> Any:
    """`values` as `cls`. `where(dotted_key)` names the key's file; `also_known` joins the suggestions."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), [*fields, *also_known], n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where(f'{prefix}{key}')}: unknown key '{prefix}{key}'; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise ConfigError(f"{where(f'{prefix}{name}')}: the key '{prefix}{name}' is required")
    return cls(**{key: _convert(value, hints[key], f"{prefix}{key}", where) for key, value in values.items()})


def _convert(value: Any, hint: Any, key: str, where: Callable[[str], str]) -> Any:
    """The value as the field's type, or a ConfigError that says which types and values are valid."""
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{where(key)}: '{key}' must be {expected}, got {value!r}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise wrong("a group of keys (" + ", ".join(f.name for f in dataclasses.fields(hint)) + ")")
        return parse_dataclass(hint, value, f"{key}.", where)
    if origin is Literal:
        text = value.lower() if isinstance(value, str) else value
        if text is False and "off" in args:     # YAML 1.1 reads off as false
            text = "off"
        if text not in args:
            near = difflib.get_close_matches(str(text), args, n=1)
            raise wrong("one of " + ", ".join(args) + (f" (did you mean '{near[0]}'?)" if near else ""))
        return text
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, args, wrong, key, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not ... and len(value) != len(args)):
            raise wrong("a list" if args[-1] is ... else f"a list of {len(args)} values")
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return tuple(_convert(v, kind, key, where) for v, kind in zip(value, kinds, strict=True))
    if hint is dict or origin is dict:
        if value is not None and not isinstance(value, Mapping):
            raise wrong("a group of keys")
        return {str(k): _convert(v, args[1], f"{key}.{k}", where) for k, v in (value or {}).items()}
    return value if hint is Any else _convert_scalar(value, hint, wrong)


def _convert_union(value: Any, args: tuple, wrong: Callable, key: str, where: Callable) -> Any:
    if value is None and type(None) in args:
        return None
    if isinstance(value, tuple(a for a in args if typing.get_origin(a) is None)):
        return value
    for option in (a for a in args if typing.get_origin(a) is not None):
        return _convert(value, option, key, where)
    raise wrong(" or ".join("empty" if a is type(None) else a.__name__ for a in args))


def _convert_scalar(value: Any, hint: type, wrong: Callable[[str], ConfigError]) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)                 # YAML 1.1 reads 1e-4 as text
        except ValueError:
            raise wrong("a number") from None
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong({int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint])
    return value
