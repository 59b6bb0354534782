"""What the checks of whole models share: features inside, keys of full-size models, norms of gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from scripts.parity.base import Check, Folder, Measure, Options, stem


class Recorder(dict[str, Tensor]):
    """Features inside a model under the reference's names, there after a forward pass."""

    def keep(self, module: nn.Module, read: Callable[[tuple, object], dict[str, Tensor]]) -> None:
        """Adds what `read(inputs, output)` makes of a call of the module."""
        module.register_forward_hook(lambda _, inputs, output: self.update(read(inputs, output)))

    def keep_output(self, module: nn.Module, name: str) -> None:
        self.keep(module, lambda _, output: {name: output})


def manifests(folder: Folder, fits: Callable[[dict], bool],
              run: Callable[[dict], Iterator[Measure]]) -> Iterator[Check]:
    """One check per entry {name: entry} of a table of full-size models that `fits`."""
    for path, content in folder.tables.items():
        for name, entry in (content.items() if isinstance(content, dict) else ()):
            if isinstance(entry, dict) and fits(entry):
                yield Check(f"{stem(path)}/{name}", frozenset({path}), lambda options, entry=entry: run(entry))


def compare_keys(model: nn.Module, published: Mapping[str, Sequence[int]]) -> Iterator[Measure]:
    """The model's state dict against the keys and shapes of a published one, both under our names."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    yield Measure("keys only here or only there", len(own.keys() ^ published.keys()), 0.0)
    different = sum(own[key] != tuple(published[key]) for key in own.keys() & published.keys())
    yield Measure("other shapes", different, 0.0)


def compare_norms(model: nn.Module, norms: Mapping[str, float | None], rename: Callable[[str], str],
                  is_dead: Callable[[str], bool], tolerance: float, options: Options) -> Iterator[Measure]:
    """Norms of all gradients, relative; one that is zero but for rounding is compared with the norm of all.

    `norms` has the original's keys, and None for what its loss does not depend on.
    """
    got = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    want = {rename(key): norm for key, norm in norms.items() if norm is not None and not is_dead(key)}
    yield Measure("parameters only here or only there", len(got.keys() ^ want.keys()), 0.0)
    unused = [key for key, norm in norms.items() if norm is None]
    yield Measure("unused there but not left out here", sum(not is_dead(key) for key in unused), 0.0)
    floor = options.pick(1e-6, 1e-3) * float(np.linalg.norm(list(want.values())))
    for name in got.keys() & want.keys():
        yield Measure(f"|grad {name}|", abs(got[name] - want[name]) / max(want[name], floor), tolerance)
