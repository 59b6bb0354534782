"""Options: YAML values into dataclasses, types and values checked, every mistake named with its file and its key.

Knows no key of any experiment. An options class is a dataclass derived from `Options`; it belongs to what it
configures and stands in the same file. `utils.table` finds it there without importing that file.
"""

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

MOST_SHOWN = 20                     # of the valid names in a message
MOST_CHARACTERS = 80                # of a value in a message
LARGEST = 2**53                     # whole numbers up to here are exact in every format that a run writes
Where = Callable[[str], str]        # dotted key -> the file (or argument) that holds it
PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "empty"}


class ConfigError(ValueError):
    """A mistake in an experiment file or in a `key=value` argument."""

    next_step = "python main.py --help_config [KEY] says what keys there are and what they may hold"


class OptionError(ValueError):
    """An option whose value is impossible: its name, the value, and in words what would be valid."""

    def __init__(self, name: str, value: Any, valid: str):
        self.name, self.value, self.valid = name, value, valid
        super().__init__(f"option '{name}' must be {valid}, got {shown(value)}")


class Options:
    """Base of options dataclasses. `__post_init__` calls `require` for what a type cannot say."""

    def require(self, condition: object, name: str, valid: str) -> None:
        """OptionError naming the option, its value and what would be valid, unless the condition holds."""
        if not condition:
            raise OptionError(name, getattr(self, name), valid)

    def require_counts(self, *names: str, least: int = 1) -> None:
        """Each of these options is `least` or more."""
        for name in names:
            self.require(getattr(self, name) >= least, name, f"a whole number of at least {least}")

    def require_rates(self, *names: str) -> None:
        """Each of these options is a probability below 1."""
        for name in names:
            self.require(0 <= getattr(self, name) < 1, name, "a rate in [0, 1)")


def shown(value: Any) -> str:
    """A value for a message, at most some words of it."""
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def nearest(word: Any, choices: Iterable[Any]) -> str:
    """`did you mean 'x'?`, or the choices where none is similar."""
    names = {str(choice).lower(): str(choice) for choice in choices}
    near = difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=0.6)
    shown = [*names.values()][:MOST_SHOWN] + ["..."] * (len(names) > MOST_SHOWN)
    return f"did you mean '{names[near[0]]}'?" if near else f"known: {', '.join(shown) or 'none'}"


def choice(table: Mapping, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that holds a name of a `utils.table.Table`."""
    return dataclasses.field(default=default, metadata={"table": table})


def options_of(name_field: str, resolved: bool = True) -> Any:
    """A dataclass field that holds the options of whatever the field `name_field`, a `choice`, names.

    It is an instance of the options class, or with `resolved` False a dictionary of the options that were given: for
    parts whose defaults depend on the other parts.
    """
    return dataclasses.field(default=None, metadata={"options_of": name_field, "resolved": resolved})


def given(default: Any = dataclasses.MISSING, **valid: Any) -> Any:
    """A dataclass field with a range: `at_least`, `at_most`, `above`, `below` (numbers)."""
    return dataclasses.field(default=default, metadata={"range": valid})


def parse(cls: type, values: Mapping | None, prefix: str = "", where: Where = lambda key: "options",
          owner: str = "") -> Any:
    """`values` as an instance of the dataclass `cls`.

    `prefix` stands before the key in messages ("model_kwargs."), `where(dotted_key)` names the file, `owner` says whose
    options these are. A wrong type, an unknown key and an impossible value are a ConfigError that says what would be
    right. A field's type may have a class method `from_yaml(value, key, where)` that reads it in its own way.
    """
    values = _group(values, prefix.rstrip("."), where)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where(f'{prefix}{key}')}: unknown key '{prefix}{key}'{owner}; {nearest(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise ConfigError(f"{where(f'{prefix}{name}')}: the key '{prefix}{name}' is required")
    hints = typing.get_type_hints(cls)
    converted = {}
    for name, f in fields.items():          # a field's options come after the name that they belong to
        key = f"{prefix}{name}"
        if "options_of" in f.metadata:
            named_by = fields[f.metadata["options_of"]]
            table, chosen = named_by.metadata["table"], converted.get(named_by.name, named_by.default)
            group = _group(values.get(name), key, where)
            options = parse(table.options(chosen), {**table.defaults(chosen), **group}, f"{key}.", where,
                            f" of {table.kind} '{chosen}'")
            converted[name] = options if f.metadata["resolved"] else {k: getattr(options, k) for k in group}
        elif name in values:
            converted[name] = _field(values[name], f, hints[name], key, where)
        elif dataclasses.is_dataclass(hints[name]):     # a group of keys that is absent has its defaults
            converted[name] = parse(hints[name], None, f"{key}.", where)
    try:
        return cls(**converted)
    except OptionError as error:
        key, value = f"{prefix}{error.name}", list(error.value) if isinstance(error.value, tuple) else error.value
        raise ConfigError(f"{where(key)}: '{key}' must be {error.valid}, got {shown(value)}") from error


def _group(values: Any, key: str, where: Where) -> Mapping:
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{where(key)}: '{key}' must be a group of keys, got {shown(values)}")
    return values or {}


def _field(value: Any, f: dataclasses.Field, hint: Any, key: str, where: Where) -> Any:
    if "table" in f.metadata:
        try:
            return f.metadata["table"].find(value)
        except ValueError as error:
            raise ConfigError(f"{where(key)}: '{key}': {error}") from error
    result = _convert(value, hint, key, where)
    checks = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
    bounds = f.metadata.get("range", {})
    if not all(checks[name](result, bound) for name, bound in bounds.items()):
        words = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
        raise ConfigError(f"{where(key)}: '{key}' must be {words}, got {shown(value)}")
    return result


def _convert(value: Any, hint: Any, key: str, where: Where, also: str = "") -> Any:
    """The value as the field's type, or a ConfigError that says which types and values (and `also`) are valid."""
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{where(key)}: '{key}' must be {expected}{also}, got {shown(value)}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hasattr(hint, "from_yaml"):
        return hint.from_yaml(value, key, where)
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, f"{key}.", where)
    if origin is Literal:
        return _one_of(value, args, wrong)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, args, key, where, wrong)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not ... and len(value) != len(args)):
            raise wrong(_words(hint))
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return tuple(_convert(v, kind, key, where) for v, kind in zip(value, kinds, strict=True))
    if hint is dict or origin is dict:
        return {str(k): _convert(v, args[1], f"{key}.{k}", where) for k, v in _group(value, key, where).items()}
    return _convert_scalar(value, hint, wrong)


def _one_of(value: Any, valid: tuple, wrong: Callable[[str], ConfigError]) -> Any:
    value = value.lower() if isinstance(value, str) else value
    if value is False and "off" in valid:       # YAML 1.1 reads off as false
        value = "off"
    # A number that equals a choice is not enough: True == 1.
    if not any(value == option and type(value) is type(option) for option in valid):
        near = difflib.get_close_matches(str(value), [str(option) for option in valid], n=1)
        raise wrong("one of " + ", ".join(map(str, valid)) + (f" (did you mean '{near[0]}'?)" if near else ""))
    return value


def _convert_union(value: Any, options: tuple, key: str, where: Where, wrong: Callable[[str], ConfigError]) -> Any:
    if value is None and type(None) in options:
        return None
    if len(options) == 2 and type(None) in options:
        [kind] = (option for option in options if option is not type(None))
        return _convert(value, kind, key, where, " or empty")
    for option in options:
        if option is bool or option is str:     # only what is one already: text would accept any number
            if isinstance(value, option):
                return value
        elif option is not type(None):
            try:
                return _convert(value, option, key, where)
            except ConfigError:
                continue
    raise wrong(" or ".join(_words(option) for option in options))


def _convert_scalar(value: Any, hint: type, wrong: Callable[[str], ConfigError]) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)               # YAML 1.1 reads 1e-4 as text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise wrong("a number")
        return number
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is int and isinstance(value, int) and abs(value) > LARGEST:
        raise wrong(f"a whole number of at most {LARGEST}")
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong(_words(hint))
    return value


def _words(hint: Any) -> str:
    """A type in plain English."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return "a list" if args[-1] is ... else f"a list of {len(args)} values"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, args))
    return PLAIN.get(hint, "a group of keys")
