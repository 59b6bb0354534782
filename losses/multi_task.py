"""All losses of a training step in one place, and what one loss belongs to.

Losses of a mini-batch pool its valid pixels. `scope` states whether one "loss" is that of a process's mini-batch or
of an image, so that the objective does not silently depend on how many processes share a batch. Where images lack
labels, `shares` make every loss a mean over those that have one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losses.balancing.base import INTER, Balancing

SCOPES = ("process", "image")
Outputs = Mapping[str, Any]          # task -> its output or label: (B, C, H, W), or one entry per image


class MultiTaskLoss(nn.Module):
    """All losses of a training step: every task, its intermediate predictions, further terms and their total.

    task_losses: task -> loss module. balancing: makes the total of the tasks' losses, and the backward pass.
    intermediate_weight: factor of the intermediate predictions' sum (1 in InvPT, 0.5 in BridgeNet);
    use_intermediate False leaves them out. scope: "process" takes the losses over this process's mini-batch
    (InvPT and its successors); "image" takes them per image (own valid pixels, own class balance, own log) and
    averages over the images, so the objective is the same for every split of a global batch - MTMamba's
    published runs had one image per process.
    """

    def __init__(self, task_losses: Mapping[str, nn.Module], balancing: Balancing,
                 intermediate_weight: float = 1.0, scope: str = "process", use_intermediate: bool = True):
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"loss_scope '{scope}' is unknown; valid: {', '.join(SCOPES)}")
        self.task_losses = nn.ModuleDict(task_losses)
        self.balancing = balancing
        self.intermediate_weight = balancing.intermediate_weight = intermediate_weight
        self.scope = scope
        self.use_intermediate = use_intermediate

    def forward(self, final: Outputs, labels: Outputs, intermediate: Outputs | None = None,
                extra: Mapping[str, Tensor] | None = None,
                shares: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Un-weighted loss per task, `inter/<task>`, the extras, and `total`; all 0-dim.

        final, intermediate: task -> raw outputs (B, n_t, H, W), intermediate for some tasks or none; labels: task
        -> (B, C, H, W), or for a task without maps a sequence of B entries; extra: name -> 0-dim term, already
        weighted, added to the total whichever the scheme. Under scope "image" every figure is the mean over the
        images. shares: task -> (B,), how much the loss of each image (scope "process": of the mini-batch, B times)
        counts, as `data.loader` works it out; None: every label is there. A loss without a label counts 0: it is
        computed on void, so that every output has a gradient on every process, if only of zeros.
        """
        outputs = {task: _of(final, task, "prediction") for task in self.task_losses}
        labels = {task: _of(labels, task, "label") for task in self.task_losses}
        if self.use_intermediate:
            outputs |= {f"{INTER}{task}": logits for task, logits in (intermediate or {}).items()}
        if self.scope == "process":
            units = [(outputs, labels, {task: share[0] for task, share in (shares or {}).items()})]
        else:
            images = images_of(outputs)
            shared = images_of({task: shares[task] for task in self.task_losses}) if shares else [{}] * len(images)
            units = zip(images, images_of(labels), shared, strict=True)
        parts = [self._one(*unit) for unit in units]
        losses = {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}
        for name, term in (extra or {}).items():
            losses[name] = term
            losses["total"] = losses["total"] + term
        return losses

    def _one(self, outputs: Outputs, labels: Outputs, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses and total of one unit of the scope: the mini-batch or a single image."""
        shares = {task: shares[task].squeeze() if task in shares else 1.0 for task in self.task_losses}
        final = {task: loss(outputs[task], labels[task]) for task, loss in self.task_losses.items()}
        inter = {task: loss(outputs[INTER + task], labels[task])
                 for task, loss in self.task_losses.items() if INTER + task in outputs}
        total = self.balancing.combine(final, shares)
        if inter:
            total = total + self.intermediate_weight * self.balancing.combine(inter, shares)
        final, inter = ({task: shares[task] * loss for task, loss in losses.items()} for losses in (final, inter))
        return final | {INTER + task: loss for task, loss in inter.items()} | {"total": total}


def images_of(batch: Any) -> Sequence[Any]:
    """A batch as B batches of one image: tensors (B, ...), sequences of B entries, and dictionaries of either.

    `split` and not indexing: the backward pass of split joins the B gradients once, while every index writes a
    zero-filled gradient of the full batch, i.e. B^2 traffic.
    """
    if isinstance(batch, Tensor):
        return batch.split(1)
    if isinstance(batch, Mapping):
        parts = {key: images_of(value) for key, value in batch.items()}
        return [{key: images[i] for key, images in parts.items()} for i in range(len(next(iter(parts.values()))))]
    return [[entry] for entry in batch]


def _of(outputs: Outputs, task: str, what: str) -> Any:
    if task not in outputs:
        raise ValueError(f"no {what} for task '{task}'; got: {', '.join(outputs) or 'none'}")
    return outputs[task]
