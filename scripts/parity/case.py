"""One published model: its weights and recorded tensors, and our model with these weights.

A case is a configuration and, under the same name up to the first dot, the original's state dict, arrays of an
evaluation and of a training step and, if there, norms of all gradients. Every publication names its arrays its own
way; a `System` says how, and the comparisons (`compare`) know only these names:

    image            eval.out.<task>  eval.inter.<task>  eval.mid.<name>   predictions and features inside
    train.fixed.<task> or train.fixed.<out|inter>.<task>    the loss is the sum of mean(prediction * fixed array)
    train.out.<task>  train.inter.<task>  train.mid.<name>  train.loss     with batch statistics
    train.grad.image  train.grad.<key>  train.after.<key>                  gradients, and buffers after the step

A second evaluation or training has another word instead of "eval" or "train". Keys are those of the original.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from models.model import MultiTaskModel, Predictions
from models.ops.scan_choice import set_scan_backend
from models.released import recognise
from scripts.parity.base import (
    Bound,
    Check,
    Folder,
    Measure,
    Options,
    below,
    scaled_error,
    stem,
    stored_error,
    stored_share,
)
from scripts.parity.program import load

NO_EFFECT = "no output depends on it, and it is not computed here"
MODEL = ("state", "image")  # what every comparison of a model needs


@dataclass(frozen=True)
class Bounds:
    """What each kind of quantity may be off by; `inside`, `train` and `after` are as `value` where not given.

    Given for a reference that ran in float64 and was stored in float32. In float32 a ReLU whose input is nearly zero
    may switch: gradients move by up to 1e-3 of the largest entry.
    """

    value: Bound = Bound(stored_error, 1e-9, 5e-5)
    loss: Bound = Bound(scaled_error, 1e-12, 5e-5)
    gradient: Bound = Bound(stored_share, 1e-9, 1e-3)
    inside: Bound | None = None
    train: Bound | None = None
    after: Bound | None = None


@dataclass(frozen=True)
class System:
    """What is particular about the references of one published model.

    released: rows of RELEASED that its state dicts belong to. fits: whether a table is the configuration of a case.
    build: our model of a configuration. convert: tensors under the original's keys, or some of them, under ours.
    groups: name -> the comparison, and beginnings of the names that it needs. names: patterns of the original's
    names of arrays, and the names above. places: patterns of the names of features inside and where ours are, see
    `find`. uncovered: why a feature is not compared, or nothing. as_stored: ours in the shape of the reference.
    methods: those that are recorded like modules, see `record_inside`. uses_scan: whether --device and --scan_backend
    apply. full_size: the comparison of an entry of a table of models of full size, which has the
    original's keys with their shapes below the key `shapes`.
    """

    released: Collection[str]
    fits: Callable[[dict], bool]
    build: Callable[..., MultiTaskModel]
    convert: Callable[[Mapping, Sequence[str]], dict]
    groups: Mapping[str, tuple]
    names: Sequence[tuple[str, str]] = ()
    places: Sequence[tuple] = ()
    bounds: Bounds = field(default_factory=Bounds)
    uncovered: Callable[[dict, str], str] = lambda config, name: ""
    as_stored: Callable[[Tensor, Tensor], Tensor] = lambda got, want: got
    methods: Sequence[str] = ()
    uses_scan: bool = False
    shapes: str = "state_dict"
    full_size: Callable[[dict], Iterator[Measure]] | None = None

    def checks(self, folder: Folder) -> Iterator[Check]:
        """Every comparison of every case whose files are there, and every model of full size."""
        for path, config in folder.tables.items():
            if not (isinstance(config, dict) and self.fits(config)):
                continue
            beside = folder.beside(path)
            weights = max((p for p in beside if p.suffix != ".json" and recognise(beside[p]) in self.released),
                          key=lambda p: len(beside[p]), default=None)
            files = {p: ["state"] if p == weights else self._held(p, names) for p, names in beside.items()}
            case = Case(self, config, files, {p: folder.tables[p] for p in files if p in folder.tables})
            for group, (run, *needed) in self.groups.items():
                found = [case.holding(need) for need in needed]
                if None not in found:
                    yield Check(f"{stem(path)}/{group}", frozenset({path, *found}), partial(case.compare_by, run))
        for path, name, entry in folder.entries(lambda entry: isinstance(entry.get(self.shapes), dict)):
            if self.full_size is not None and recognise(entry[self.shapes]) in self.released:
                yield Check(f"{stem(path)}/{name}", frozenset({path}), lambda _, entry=entry: self.full_size(entry))

    def _held(self, path: Path, names: Iterable[str]) -> list[str]:
        """Names of what a file beside the weights holds; their gradients are one thing, the norms of these another."""
        is_table = path.suffix == ".json"
        if recognise(names) in self.released:
            return ["norms" if is_table else "gradients"]
        return list(names) if is_table else [self.canonical(name) for name in names]

    def canonical(self, name: str) -> str:
        """The name of an array as the comparisons know it."""
        found = ((re.fullmatch(pattern, name), ours) for pattern, ours in self.names)
        return next((match.expand(ours) for match, ours in found if match), name)


@dataclass(frozen=True)
class Case:
    """One model of toy size: its configuration, its files with the names of what they hold, and the run's options."""

    system: System
    config: dict
    files: Mapping[Path, list[str]]
    tables: Mapping[Path, dict]
    options: Options = Options()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config.get("task_order") or self.config["tasks"])

    @property
    def device(self) -> str:
        return self.options.device if self.system.uses_scan else "cpu"

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """All arrays under the names of this file."""
        paths = [path for path, names in self.files.items()
                 if names not in (["state"], ["gradients"]) and path not in self.tables]
        return {self.system.canonical(name): value for path in paths
                for name, value in load_file(path, device=self.device).items()}

    def compare_by(self, run: Callable[["Case"], Iterator[Measure]], options: Options) -> Iterator[Measure]:
        """A comparison in this arithmetic."""
        set_scan_backend(options.scan_backend if self.system.uses_scan else "auto")
        try:
            yield from run(Case(self.system, self.config, self.files, self.tables, options))
        finally:
            set_scan_backend("auto")

    def holding(self, need: str) -> Path | None:
        """The file of the arrays or figures whose names begin so."""
        return next((path for path, names in self.files.items() if any(n.startswith(need) for n in names)), None)

    def table(self, need: str) -> dict:
        return self.tables[self.holding(need)]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return below(self.values, prefix)

    def image(self) -> Tensor:
        return self.values["image"].to(self.options.dtype)

    def model(self, **changes) -> MultiTaskModel:
        """With the reference's weights, loaded as a released checkpoint is. Nothing in it is random."""
        model = self.system.build(self.config, **changes)
        load(model, self.holding("state"))
        return model.to(self.device, self.options.dtype)

    def record(self, model: MultiTaskModel) -> dict[str, Tensor]:
        """A dict that holds everything inside after a forward pass."""
        return record_inside(model, self.system.methods)

    def predict(self) -> Predictions:
        with torch.no_grad():
            return self.model().eval()(self.image())

    def measure(self, kind: str, name: str, got: Tensor, want: Tensor) -> Measure:
        """`kind` is a field of `Bounds`."""
        bounds = self.system.bounds
        bound = getattr(bounds, kind) or bounds.value
        return bound.measure(name, self.system.as_stored(got, want), want, self.options)

    def find(self, name: str, seen: Mapping[str, Tensor]) -> Tensor:
        """A feature inside our model by the reference's name.

        A row of `places` is a pattern, a path as in `record_inside` or a function of case, `seen` and groups, and
        perhaps an einops pattern that brings the axes into order. In a path "{tasks[0]}" is the first task.
        """
        for pattern, place, *axes in self.system.places:
            if match := re.fullmatch(pattern, name):
                path = None if callable(place) else match.expand(place).format(tasks=self.tasks)
                got = place(self, seen, *match.groups()) if path is None else seen[path]
                return rearrange(got, *axes) if axes else got
        return seen[name]

    def paired(self, published: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """Our name, ours and theirs of tensors under the original's keys."""
        ours = self.system.convert(published, self.tasks)
        if len(ours) != len(published):
            raise ValueError(f"{len(published)} published keys become {len(ours)} of ours")
        return [(name, own[name], want) for name, want in ours.items()]


def record_inside(model: nn.Module, methods: Sequence[str] = ()) -> dict[str, Tensor]:
    """Everything that the modules take and give, filled by forward passes.

    `path` is a module's output, `path<0` its first input, `path.method#0` the result of a method's first call; what
    lies in a list, tuple or dictionary is `path[0]`, `path[1][depth]`, ...
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str, value: object) -> None:
        if isinstance(value, Tensor):
            seen[path] = value
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                keep(f"{path}[{key}]", item)

    def hook(path: str, inputs: tuple, output: object) -> None:
        keep(path, output)
        for index, value in enumerate(inputs):
            keep(f"{path}<{index}", value)

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, path=path: hook(path, inputs, output))
    for path in methods:
        owner, _, name = path.rpartition(".")
        module, calls = model.get_submodule(owner), count()
        method = getattr(module, name)

        def watched(*args, path=path, method=method, calls=calls):
            out = method(*args)
            keep(f"{path}#{next(calls)}", out)
            return out
        setattr(module, name, watched)
    return seen
