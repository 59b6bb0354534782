"""Adapters of low rank in a model's layers, put in and merged.

Plain linear layers and convolutions get those of the library peft. Layers stacked by task (`models.blocks.stacked`),
whose weights are read in several ways, get one for every task inside their weight, without dropout. Layers of a
backbone with maps of its own for every task (`fan_out`) have the tasks' adapters beside the common one.

References: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Agiza et al., "MTLoRA: A
Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024.
Axes: T tasks, B batch, r rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from models.blocks.layers import ProductLinear
from models.blocks.stacked import TaskLinear, by_task
from models.lora.settings import LoraSettings


def adaptable(layer: nn.Module) -> bool:
    """Whether a layer can have an adapter: a linear layer, a convolution (of one group, without dilation, padded by
    zeros), or linear layers stacked by task."""
    return type(layer) in (nn.Linear, ProductLinear) or isinstance(layer, TaskLinear) or (
        type(layer) is nn.Conv2d and (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros"))


def add_adapters(model: nn.Module, names: Sequence[str], settings: LoraSettings) -> None:
    """Puts an adapter into each of these layers; the outputs stay bit for bit, and so does what is trained beside.

    ValueError: without the library.
    """
    trained = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    layers = {name: model.get_submodule(name) for name in names}
    for layer in layers.values():
        if isinstance(layer, TaskLinear):
            parametrize.register_parametrization(layer, "weight", TaskLowRank(layer, settings.rank, settings.scale))
    plain = [name for name, layer in layers.items() if not isinstance(layer, TaskLinear)]
    if plain:
        _inject(model, plain, settings)
    for parameter in model.parameters():                # the library freezes everything but its own
        parameter.requires_grad_(trained.get(id(parameter), True))


def add_task_adapters(model: nn.Module, names: Sequence[str], tasks: Sequence[str], settings: LoraSettings) -> None:
    """Puts each task's own adapter beside the common one of these linear layers.

    Their rows belong to all tasks: see `TaskLora`.
    """
    for name in names:
        layer = model.get_submodule(name)
        model.set_submodule(name, TaskLora(layer, tasks, settings))


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to the weights it adapts: plain layers again, equal up to rounding."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TaskLora):
            model.set_submodule(name, module.merged())
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            model.set_submodule(name, _merged(module))
        elif parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0],
                                                                          TaskLowRank):
            # Not `remove_parametrizations`: it changes the class, which copies of the module share.
            weight = module.weight.detach()
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            module.weight = nn.Parameter(weight)


@torch.no_grad()
def called_layers(model: nn.Module, image_size: tuple[int, int]) -> set[str]:
    """Names of the layers whose adapters act: stacked by task, or called in a pass, and not just read by their owners.

    The pass runs on the meta device, where it costs nothing.
    """
    called = {name for name, layer in model.named_modules() if isinstance(layer, TaskLinear)}
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name))
             for name, layer in model.named_modules() if adaptable(layer)]
    tensors = {name: torch.empty_like(value, device="meta")
               for name, value in (*model.named_parameters(), *model.named_buffers())}
    training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    try:
        functional_call(model, tensors, torch.empty(2, 3, *image_size, device="meta", dtype=dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return called


class TaskLowRank(nn.Module):
    """The weight (T out, in) of layers stacked by task with a product of rank r for each added to it."""

    def __init__(self, layer: TaskLinear, rank: int, scale: float):
        super().__init__()
        self.num_tasks, self.scale = layer.num_tasks, scale
        self.down = nn.Parameter(layer.weight.new_empty(layer.num_tasks * rank, layer.in_features))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))         # as peft's

    def forward(self, weight: Tensor) -> Tensor:
        up, down = (x.unflatten(0, (self.num_tasks, -1)) for x in (self.up, self.down))
        return weight + self.scale * torch.bmm(up, down).flatten(0, 1)


class TaskLora(nn.Module):
    """A layer with a common adapter, and one more for each task: ((1 + T) B, ..., in) -> ((1 + T) B, ..., out).

    The first B rows belong to no task, the next B to the first one, and so on.
    """

    def __init__(self, layer: nn.Module, tasks: Sequence[str], settings: LoraSettings):
        super().__init__()
        num_tasks, place = len(tasks), layer.weight
        self.layer, self.scale, self.num_tasks = layer, settings.scale, num_tasks
        self.dropout = nn.Dropout(settings.dropout)
        self.down = TaskLinear(num_tasks, layer.in_features, settings.task_rank, bias=False).to(place)
        self.up = TaskLinear(num_tasks, settings.task_rank, layer.out_features, bias=False).to(place)
        nn.init.zeros_(self.up.weight)
        by_task(self, tasks, "down", "up")

    def forward(self, rows: Tensor) -> Tensor:
        common, of_tasks = self._split(self.layer(rows))
        own = self.up(self.down(self.dropout(self._split(rows)[1])))
        return torch.cat((common, (of_tasks + self.scale * own).flatten(0, 1)))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, ...) and (T, B, ...)."""
        grouped = rows.unflatten(0, (1 + self.num_tasks, -1))
        return grouped[0], grouped[1:]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """One linear layer for each task, and the common one."""
        layer = _merged(self.layer)
        own = self.scale * torch.bmm(self.up.per_task[0], self.down.per_task[0])
        merged = RowsLinear(1 + self.num_tasks, layer.in_features, layer.out_features, layer.bias is not None)
        merged = merged.to(layer.weight)
        merged.weight.copy_(torch.cat((layer.weight, (layer.weight + own).flatten(0, 1))))
        if layer.bias is not None:
            merged.bias.copy_(layer.bias.repeat(1 + self.num_tasks))
        return merged


class RowsLinear(TaskLinear):
    """Linear layers of T groups of rows that lie one behind the other: (T B, ..., in) -> (T B, ..., out)."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows.unflatten(0, (self.num_tasks, -1))).flatten(0, 1)


def _inject(model: nn.Module, names: Sequence[str], settings: LoraSettings) -> None:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora needs the library peft: pip install peft ({error})") from error
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.scale * settings.rank, target_modules=list(names),
                             lora_dropout=settings.dropout)
    peft.inject_adapter_in_model(config, model)


def _merged(layer: nn.Module) -> nn.Module:
    layer.merge()
    return layer.get_base_layer()
