"""Layers of T tasks, each with weights of its own, run as one layer.

The tasks' layers have one shape, so their weights lie one behind the other on the first axis: weights (T, out, in) are
stored as (T out, in). That is a layer of T-fold width in T groups, which PyTorch's grouped convolutions, its batch
norm and the routes of our scans are already; here is what else it takes. Every task's initial weights are those of a
layer of its own. Maps of all tasks are one tensor, (T, B, H, W, C) or (B, H, W, T, C).

In a state dict each task keeps keys of its own, as if it had a module of its own (`by_task`): files do not depend on
how layers are run, and a file of other tasks cannot be mistaken.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TaskLinear(nn.Linear):
    """One linear layer per task, as one batched product: (T, ..., in) -> (T, ..., out)."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, num_tasks * out_features, bias)
        self.num_tasks = num_tasks

    def forward(self, feat: Tensor) -> Tensor:
        weight, bias = self.per_task
        rows = feat.flatten(1, -2)  # (T, rows, in)
        out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
        return out.unflatten(1, feat.shape[1:-1])

    def of_common(self, feat: Tensor) -> Tensor:
        """All layers on one map: (..., in) -> (..., T, out)."""
        return super().forward(feat).unflatten(-1, (self.num_tasks, -1))

    @property
    def per_task(self) -> tuple[Tensor, Tensor | None]:
        """(T, in, out) and (T, 1, out)."""
        weight = self.weight.unflatten(0, (self.num_tasks, -1)).mT
        return weight, None if self.bias is None else self.bias.view(self.num_tasks, 1, -1)


class JoinLinear(TaskLinear):
    """One linear layer per task on its own map beside a common one, (T, ..., C_own), (..., C_common) -> (T, ..., out).

    The two products are added up; the joined map is never made.
    """

    def forward(self, own: Tensor, common: Tensor) -> Tensor:
        weight, bias = self.per_task
        split = (own.shape[-1], common.shape[-1])
        own_weight, common_weight = weight.split(split, dim=1)
        out = torch.baddbmm(bias, common.flatten(0, -2).expand(self.num_tasks, -1, -1), common_weight)
        return torch.baddbmm(out, own.flatten(1, -2), own_weight).unflatten(1, own.shape[1:-1])


class TaskLayerNorm(nn.Module):
    """One LayerNorm over the channels per task, (T, ..., C) to the same; with `tasks_last` it takes (..., T, C)."""

    def __init__(self, num_tasks: int, channels: int, tasks_last: bool = False, eps: float = 1e-5):
        super().__init__()
        self.num_tasks, self.channels, self.tasks_last, self.eps = num_tasks, channels, tasks_last, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_tasks * channels)), nn.Parameter(
            torch.zeros(num_tasks * channels))

    def forward(self, feat: Tensor) -> Tensor:
        normed = F.layer_norm(feat, (self.channels,), eps=self.eps)
        shape = (1,) * (0 if self.tasks_last else feat.dim() - 2)
        weight, bias = (x.view(self.num_tasks, *shape, self.channels) for x in (self.weight, self.bias))
        return torch.addcmul(bias, normed, weight)


class TaskDepthwise(nn.Conv2d):
    """One 3 x 3 depthwise convolution per task: (T, B, H, W, C) -> (B, H, W, T, C), as the scans take it."""

    def __init__(self, num_tasks: int, channels: int):
        super().__init__(num_tasks * channels, num_tasks * channels, 3, padding=1, groups=num_tasks * channels)
        self.num_tasks = num_tasks

    def forward(self, feat: Tensor) -> Tensor:
        rows = feat.permute(1, 2, 3, 0, 4).flatten(3)  # (B, H, W, T C): channels side by side, one copy
        out = super().forward(rows.movedim(-1, 1))  # seen in PyTorch's channels_last format
        return out.movedim(1, -1).unflatten(3, (self.num_tasks, -1))


class TaskDropPath(nn.Module):
    """Adds a residual branch to maps (T, B, ...), with stochastic depth: dropped for one image of one task alone."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, feat: Tensor, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_prob):
            return feat + branch
        keep = 1 - self.drop_prob
        kept = feat.new_empty(*feat.shape[:2], *(1,) * (feat.dim() - 2)).bernoulli_(keep)
        return torch.addcmul(feat, branch, kept, value=1 / keep)


# ------------------------------------------------------------ state dicts


def by_task(module: nn.Module, tasks: Sequence[str]) -> nn.Module:
    """Gives every task keys of its own in state dicts: `weight` (T C, ...) becomes `<task>.weight` (C, ...), views.

    Tensors without axes, such as a count of batches, are common to all tasks. Returns the module.
    """
    module.task_names = tuple(tasks)
    module.register_state_dict_post_hook(_split_keys)
    module.register_load_state_dict_pre_hook(_join_keys)
    return module


def split_by_task(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a model's parameters or buffers, e.g. gradients, under the keys of its state dict."""
    state = dict(tensors)
    for path, module in model.named_modules():
        if hasattr(module, "task_names"):
            _split_keys(module, state, f"{path}." if path else "")
    return state


def _split_keys(module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
    whole = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    for index, task in enumerate(module.task_names):
        for key, value in whole.items():
            state[f"{prefix}{task}.{key}"] = value.chunk(len(module.task_names))[index] if value.dim() else value


def _join_keys(module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
    heads = [f"{prefix}{task}." for task in module.task_names]
    for key in [key.removeprefix(heads[0]) for key in list(state) if key.startswith(heads[0])]:
        if all(head + key in state for head in heads):  # else they stay, and the load names them
            parts = [state.pop(head + key) for head in heads]
            state[prefix + key] = torch.cat(parts) if parts[0].dim() else parts[0]
