"""What a figure of a model says of its parts, asked of the built model: kinds of layers, parameters, shapes of maps."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.engine.build import model_from_config
from utils.engine.config import load_config
from utils.meta import meta_device

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"BatchNorm2d": "batch norm", "LayerNorm": "layer norm", "Linear": "linear"}


class MeasuredModel:
    """The network of an experiment on the meta device, after one forward pass of one image in eval mode.

    Parts are named by their path in the model; `{task}` in it stands for the first task.
    """

    def __init__(self, experiment: str) -> None:
        self.config = load_config(ROOT / experiment, ["pretrained=false"])
        with meta_device():
            self.model = model_from_config(self.config).eval()
            image = torch.empty(1, 3, *self.config.input_size)
        self.tasks = self.config.tasks
        self.outputs: dict[nn.Module, Any] = {}
        self.inputs: dict[nn.Module, Any] = {}
        for module in self.model.modules():
            module.register_forward_hook(self._note)
        with torch.no_grad():
            self.model(image)

    def _note(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.inputs[module], self.outputs[module] = inputs, output

    def part(self, path: str) -> nn.Module:
        """The module at a path; AttributeError where there is none."""
        return self.model.get_submodule(path.replace("{task}", self.tasks[0]))

    def parameters(self, paths: Iterable[str]) -> int:
        """Of all these parts together, for all tasks where a path names one."""
        every = {path.replace("{task}", task) for path in paths for task in self.tasks}
        return sum(p.numel() for path in every for p in self.model.get_submodule(path).parameters())

    def kind(self, path: str) -> str:
        """A part in words: the classes of the project by their names, layers of PyTorch in plain English."""
        return kind_of(self.part(path))

    def map_of(self, path: str, axes: str, entering: int | None = None) -> dict[str, int]:
        """Sizes of the first tensor that leaves a part, by the letters of its axes, such as "b c h w".

        entering: the number of an argument of the part, whose first tensor is asked for instead.
        """
        part = self.part(path)
        tensor = first_tensor(self.outputs[part] if entering is None else self.inputs[part][entering])
        return dict(zip(axes.split(), tensor.shape, strict=True))

    def maps(self) -> list[tuple[int, ...]]:
        """(channels, height, width) of the maps that backbone and neck give, finest first."""
        maps = self.outputs[self.model.neck if self.model.neck in self.outputs else self.model.encoder]
        return [tuple(first_tensor(level).shape[1:]) for level in maps]


def first_tensor(value: Any) -> Tensor:
    """The first tensor in lists, tuples and dictionaries within each other."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def kind_of(module: nn.Module) -> str:
    """What a module is called in a drawing."""
    if isinstance(module, nn.ConvTranspose2d):
        return f"{module.kernel_size[0]} x {module.kernel_size[0]} transposed conv"
    if isinstance(module, nn.Conv2d) and type(module).__module__.startswith("torch."):
        return f"{module.kernel_size[0]} x {module.kernel_size[0]} conv"
    if isinstance(module, nn.ModuleDict):
        return kind_of(next(iter(module.values())))
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return " + ".join(_counted([kind_of(layer) for layer in module]))
    name = type(module).__name__
    return SHORT.get(name, name)


def _counted(kinds: Sequence[str]) -> list[str]:
    """Equal neighbours once, with their number."""
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return [kind if number == 1 else f"{number} x ({kind})" if " + " in kind else f"{number} x {kind}"
            for kind, number in runs]
