"""Combination of the task losses into the number that is minimised.

Two schemes are in use. The weighted sum needs hand-tuned weights per task. The sum of logarithms (MTMamba,
Lin et al., ECCV 2024) has the gradient  sum_t w_t grad(L_t) / L_t  and is free of the losses' scales, but it
is not linear: the log of a batch's loss is not the mean of the logs of its images. `scope` states what one
"loss" belongs to, so that the objective does not silently depend on how many processes share a batch.
"""


from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

LOG_EPS = 1e-8
SCOPES = ("process", "image")
INTER = "inter/"                     # prefix of an intermediate prediction's loss
Maps = Mapping[str, Tensor]


def weighted_sum(losses: Maps, weights: Mapping[str, float]) -> Tensor:
    """sum_t w_t L_t over the tasks in `losses` (0-dim each)."""
    return torch.stack([weights[task] * loss for task, loss in losses.items()]).sum()


def log_sum(losses: Maps, weights: Mapping[str, float]) -> Tensor:
    """sum_t w_t ln(L_t + 1e-8) over the tasks in `losses` (0-dim each)."""
    return torch.stack([weights[task] * torch.log(loss + LOG_EPS) for task, loss in losses.items()]).sum()


SCHEMES: dict[str, Callable[[Maps, Mapping[str, float]], Tensor]] = {
    "weighted_sum": weighted_sum, "log": log_sum}


class MultiTaskLoss(nn.Module):
    """All losses of a training step: every task, its intermediate predictions, further terms and their total.

    tasks_losses: task -> loss module; weights: task -> w_t. scheme: "weighted_sum" or "log".
    intermediate_weight: factor of the intermediate predictions' sum (1 in InvPT, 0.5 in BridgeNet);
    use_intermediate False leaves them out. scope: "process" takes the losses over this process's mini-batch
    (the InvPT lineage); "image" takes them per image (own valid pixels, own class balance, own log) and
    averages over the images, so the objective is the same for every split of a global batch - MTMamba's
    published runs had one image per process.
    """

    def __init__(self, tasks_losses: Mapping[str, nn.Module], weights: Mapping[str, float],
                 scheme: str = "weighted_sum", intermediate_weight: float = 1.0, scope: str = "process",
                 use_intermediate: bool = True):
        super().__init__()
        if scheme not in SCHEMES:
            raise ValueError(f"loss_scheme '{scheme}' is unknown; valid: {', '.join(SCHEMES)}")
        if scope not in SCOPES:
            raise ValueError(f"loss_scope '{scope}' is unknown; valid: {', '.join(SCOPES)}")
        if lacking := [task for task in tasks_losses if task not in weights]:
            raise ValueError(f"loss_weights lacks {', '.join(lacking)}; given: {', '.join(weights) or '-'}")
        self.tasks_losses = nn.ModuleDict(tasks_losses)
        self.weights = dict(weights)
        self.combine = SCHEMES[scheme]
        self.intermediate_weight = intermediate_weight
        self.scope = scope
        self.use_intermediate = use_intermediate

    def forward(self, final: Maps, labels: Maps, intermediate: Maps | None = None,
                extra: Maps | None = None) -> dict[str, Tensor]:
        """Un-weighted loss per task, `inter/<task>`, the extras, and `total`; all 0-dim.

        final, intermediate: task -> logits (B, n_t, H, W), intermediate for some tasks or none; labels: task
        -> (B, C, H, W); extra: name -> 0-dim term, already weighted, added to the total whichever the scheme.
        Under scope "image" every figure is the mean over the images.
        """
        preds = {task: _of(final, task, "prediction") for task in self.tasks_losses}
        labels = {task: _of(labels, task, "label") for task in self.tasks_losses}
        if self.use_intermediate:
            preds |= {f"{INTER}{task}": logits for task, logits in (intermediate or {}).items()}
        parts = [self._one(*part) for part in self._split(preds, labels)]
        losses = {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}
        for name, term in (extra or {}).items():
            losses[name] = term
            losses["total"] = losses["total"] + term
        return losses

    def _one(self, preds: Maps, labels: Maps) -> dict[str, Tensor]:
        """Losses and total of one unit of the scope: the mini-batch or a single image."""
        final = {task: self.tasks_losses[task](preds[task], labels[task]) for task in self.tasks_losses}
        inter = {task: self.tasks_losses[task](preds[INTER + task], labels[task])
                 for task in self.tasks_losses if INTER + task in preds}
        total = self.combine(final, self.weights)
        if inter:
            total = total + self.intermediate_weight * self.combine(inter, self.weights)
        return final | {INTER + task: loss for task, loss in inter.items()} | {"total": total}

    def _split(self, preds: Maps, labels: Maps) -> Iterator[tuple[Maps, Maps]]:
        """The whole batch, or its images one by one.

        `split` and not indexing: the backward pass of split joins the B gradients once, while every index
        writes a zero-filled gradient of the full batch, i.e. B^2 traffic.
        """
        if self.scope == "process":
            yield preds, labels
            return
        preds = {key: logits.split(1) for key, logits in preds.items()}
        labels = {task: label.split(1) for task, label in labels.items()}
        for i in range(len(next(iter(labels.values())))):
            yield ({key: images[i] for key, images in preds.items()},
                   {task: images[i] for task, images in labels.items()})


def _of(maps: Maps, task: str, what: str) -> Tensor:
    if task not in maps:
        raise ValueError(f"no {what} for task '{task}'; got: {', '.join(maps) or 'none'}")
    return maps[task]
