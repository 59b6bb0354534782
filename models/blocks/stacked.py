"""Layers of T tasks, each with weights of its own, run as one layer.

The tasks' layers have one shape, so their weights lie one behind the other on the first axis: weights (T, out, in) are
stored as (T out, in). That is a layer of T-fold width in T groups, which PyTorch's grouped convolutions, its batch
norm and the routes of our scans are already; here is what else it takes. Every task's initial weights are those of a
layer of its own. All tasks' maps are one tensor: (T, B, H, W, C), (B, H, W, T, C) or, in convolutions, (B, T C, H, W).

In a state dict each task keeps keys of its own, as if it had a module of its own (`by_task`): files do not depend on
how layers are run, and a file of other tasks cannot be mistaken.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.products import batched_linear, gated_norm, normed_halves, normed_linear
from models.ops.norms import has_kernels, layer_norm
from utils.precision import product_dtype


class TaskLinear(nn.Linear):
    """One linear layer per task, as one batched product: (T, ..., in) -> (T, ..., out)."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, num_tasks * out_features, bias)
        self.num_tasks = num_tasks

    def forward(self, feat: Tensor) -> Tensor:
        return batched_linear(feat.flatten(1, -2), *self.per_task).unflatten(1, feat.shape[1:-1])

    def of_normed(self, norm: "TaskLayerNorm", feat: Tensor) -> Tensor:
        """The layers on the normed map, which is not kept for the backward pass."""
        weight, bias = self.per_task
        out = normed_linear(feat.flatten(1, -2), norm.weight, norm.bias, norm.eps, weight, bias)
        return out.unflatten(1, feat.shape[1:-1])

    def halves(self, feat: Tensor, norm: "TaskLayerNorm | None" = None) -> tuple[Tensor, Tensor]:
        """Two halves of the channels, of the normed map if there is a norm: the first as the scans take it,
        (B, H, W, T, D), and the second, (T, B, H, W, D). For layers without bias."""
        if norm is None or not has_kernels(feat):
            whole = self(feat) if norm is None else self.of_normed(norm, feat)
            first, second = whole.chunk(2, dim=-1)
            return first.permute(1, 2, 3, 0, 4), second
        shape, weight = feat.shape[1:-1], self.per_task[0]
        first, second = normed_halves(feat.flatten(1, -2), *norm.per_task, norm.eps, weight)
        return first.unflatten(0, shape), second.unflatten(1, shape)

    def of_common(self, feat: Tensor) -> Tensor:
        """All layers on one map: (..., in) -> (..., T, out)."""
        return super().forward(feat).unflatten(-1, (self.num_tasks, -1))

    @property
    def per_task(self) -> tuple[Tensor, Tensor | None]:
        """(T, out, in) and (T, 1, out)."""
        weight = self.weight.unflatten(0, (self.num_tasks, -1))
        return weight, None if self.bias is None else self.bias.view(self.num_tasks, 1, -1)


class JoinLinear(TaskLinear):
    """One linear layer per task on its own map beside a common one, (T, ..., C_own), (..., C_common) -> (T, ..., out).

    The two products are added up; the joined map is never made.
    """

    def forward(self, own: Tensor, common: Tensor) -> Tensor:
        weight, bias = self.per_task
        own_weight, common_weight = weight.split((own.shape[-1], common.shape[-1]), dim=2)
        out = batched_linear(common.flatten(0, -2).expand(self.num_tasks, -1, -1), common_weight, bias)
        return batched_linear(own.flatten(1, -2), own_weight, out).unflatten(1, own.shape[1:-1])


class TaskLayerNorm(nn.Module):
    """One LayerNorm over the channels per task, (T, ..., C) to the same; with `tasks_last` it takes (..., T, C)."""

    def __init__(self, num_tasks: int, channels: int, tasks_last: bool = False, eps: float = 1e-5):
        super().__init__()
        self.num_tasks, self.channels, self.tasks_last, self.eps = num_tasks, channels, tasks_last, eps
        self.weight = nn.Parameter(torch.ones(num_tasks * channels))
        self.bias = nn.Parameter(torch.zeros(num_tasks * channels))

    def forward(self, feat: Tensor) -> Tensor:
        return self._normed(feat, torch.promote_types(feat.dtype, torch.float32))

    def for_product(self, feat: Tensor) -> Tensor:
        """The same in the type of the product that takes it."""
        return self._normed(feat, product_dtype(feat, self.weight.dtype))

    def gated(self, feat: Tensor, gate: Tensor) -> Tensor:
        """norm(feat) * SiLU(gate): (B, H, W, T, C), (T, B, H, W, C) -> (T, B, H, W, C), in the type of a product.

        Of the four maps on the way none is kept for the backward pass.
        """
        dtype = product_dtype(feat, self.weight.dtype)
        if has_kernels(feat):
            rows = feat.flatten(0, 2).transpose(0, 1)  # (T, B H W, C), as they lie
            return layer_norm(rows, *self.per_task, self.eps, dtype, gate.flatten(1, 3)).view(gate.shape)
        return gated_norm(feat, gate, *self.per_task, self.eps).to(dtype)

    def _normed(self, feat: Tensor, dtype: torch.dtype) -> Tensor:
        if has_kernels(feat):
            rows = feat.flatten(0, -3).transpose(0, 1) if self.tasks_last else feat.flatten(1, -2)
            out = layer_norm(rows, *self.per_task, self.eps, dtype)  # (T, rows, C)
            return out.transpose(0, 1).reshape(feat.shape) if self.tasks_last else out.view(feat.shape)
        shape = (1,) * (0 if self.tasks_last else feat.dim() - 2)
        weight, bias = (x.view(self.num_tasks, *shape, self.channels) for x in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(feat, (self.channels,), eps=self.eps), weight).to(dtype)

    @property
    def per_task(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (T, C)."""
        return self.weight.view(self.num_tasks, -1), self.bias.view(self.num_tasks, -1)


class TaskDepthwise(nn.Conv2d):
    """One 3 x 3 depthwise convolution per task: (B, H, W, T, C) -> the same, as the scans take it."""

    def __init__(self, num_tasks: int, channels: int):
        super().__init__(num_tasks * channels, num_tasks * channels, 3, padding=1, groups=num_tasks * channels)
        self.num_tasks = num_tasks

    def forward(self, feat: Tensor) -> Tensor:
        rows = feat.flatten(3)  # (B, H, W, T C): channels side by side
        out = super().forward(rows.movedim(-1, 1))  # seen in PyTorch's channels_last format
        return out.movedim(1, -1).unflatten(3, (self.num_tasks, -1))


class TaskConv(nn.Conv2d):
    """One convolution per task that keeps the size: (B, T in, H, W) -> (B, T out, H, W).

    A map (B, in, H, W) is common to all tasks.
    """

    def __init__(self, num_tasks: int, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(num_tasks * in_channels, num_tasks * out_channels, kernel_size, padding=kernel_size // 2,
                         groups=num_tasks)

    def forward(self, feat: Tensor) -> Tensor:
        groups = 1 if feat.shape[1] == self.weight.shape[1] else self.groups
        return F.conv2d(feat, self.weight, self.bias, padding=self.padding, groups=groups)


class TaskDropPath(nn.Module):
    """Adds a residual branch to maps (T, B, ...), with stochastic depth: dropped for one image of one task alone."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer("keep", torch.tensor(1.0 - drop_prob), persistent=False)

    def forward(self, feat: Tensor, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_prob):
            return feat + branch
        kept = torch.bernoulli(self.keep.expand(*feat.shape[:2], *(1,) * (feat.dim() - 2)))
        return torch.addcmul(feat, branch, kept, value=1 / (1 - self.drop_prob))


# ------------------------------------------------------------ state dicts


def by_task(module: nn.Module, tasks: Sequence[str], *children: str) -> nn.Module:
    """Gives every task keys of its own in state dicts: `weight` (T C, ...) becomes `<task>.weight` (C, ...), views.

    With names of children it is theirs that change, to `<child>.<task>.weight`. Tensors without axes, such as a count
    of batches, are common to all tasks. Returns the module.
    """
    module.task_names, module.task_parts = tuple(tasks), tuple(f"{child}." for child in children) or ("",)
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
    for part in (prefix + part for part in module.task_parts):
        whole = {key.removeprefix(part): state.pop(key) for key in list(state) if key.startswith(part)}
        for index, task in enumerate(module.task_names):
            for key, value in whole.items():
                state[f"{part}{task}.{key}"] = value.chunk(len(module.task_names))[index] if value.dim() else value


def _join_keys(module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
    for part in module.task_parts:
        heads = [f"{prefix}{part}{task}." for task in module.task_names]
        for key in [key.removeprefix(heads[0]) for key in list(state) if key.startswith(heads[0])]:
            if all(head + key in state for head in heads):  # else they stay, and the load names them
                values = [state.pop(head + key) for head in heads]
                state[prefix + part + key] = torch.cat(values) if values[0].dim() else values[0]
