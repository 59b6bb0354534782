"""Where the checks meet the program: how its models, losses and meters are made. Nothing else here asks for that."""

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evaluation.evaluator import Evaluator, TaskContext
from evaluation.meter import Meter
from losses.balancing import build_balancing
from losses.multi_task import MultiTaskLoss
from models.build import build_model
from models.model import MultiTaskModel
from scripts.parity.base import NotCovered, Options
from utils.engine.build import model_from_config
from utils.engine.checkpoint import load_model
from utils.engine.config import load_config
from utils.engine.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
Maps = Mapping[str, Tensor]


def build(model: str, backbone: str, tasks: Mapping[str, int], image_size: tuple[int, int],
          backbone_kwargs: Mapping, model_kwargs: Mapping, label_size: tuple[int, int] | None = None) -> MultiTaskModel:
    """A model by its names in experiment files; `tasks` gives each its number of output channels."""
    return build_model(model, backbone, tasks, tuple(image_size), backbone_kwargs=backbone_kwargs,
                       model_kwargs=model_kwargs, label_size=label_size and tuple(label_size))


def shipped(decoder: str, tasks: Collection[str], image_size: tuple[int, int], size: int) -> MultiTaskModel:
    """A published model of full size, without memory, as this repository's experiment files configure it.

    Of the files of this decoder for these tasks and images the one whose number of parameters is nearest to `size`.
    """
    paths = [path for folder in ("configs", "configs/backbones") for path in (ROOT / folder).glob(f"{decoder}_*.yml")]
    found = [path for path in paths if (config := load_config(path)).input_size == tuple(image_size)
             and set(config.tasks) == set(tasks)]
    if not found:
        raise NotCovered(f"no experiment file of {decoder} for {', '.join(tasks)} at this size")
    return min(map(experiment, found), key=lambda model: abs(parameters(model) - size))


@cache
def experiment(path: Path) -> MultiTaskModel:
    """The model of an experiment file, without memory."""
    with torch.device("meta"):
        return model_from_config(load_config(ROOT / path))


def load(model: MultiTaskModel, state: Path) -> None:
    """Fills a model as a released checkpoint would: recognised, converted, nothing missing or left over."""
    load_model(model, load_file(state), state)


def context(channels: int, **options) -> TaskContext:
    """What a task's loss and meter may depend on; `edge_w` is the share of the edge pixels' weight."""
    return TaskContext(num_channels=channels, **options)


def criterion(preds: Maps, weights: Mapping[str, float], scheme: str = "weighted_sum", intermediate_weight: float = 1.0,
              **options) -> nn.Module:
    """All losses of a training step on predictions like these; it takes predictions, labels and more."""
    losses = {task: TASKS.load(task).loss(context(logits.shape[1], **options)) for task, logits in preds.items()}
    return MultiTaskLoss(losses, build_balancing(scheme, tuple(preds), weights), intermediate_weight)


def losses_and_gradients(preds: Maps, labels: Maps, weights: Mapping[str, float], options: Options,
                         inter: Maps | None = None, **settings) -> tuple[Maps, Maps]:
    """Losses of a training step, and the gradients of their total; a preliminary prediction is "inter/<task>"."""
    final, inter = ({task: logits.to(options.dtype).detach().requires_grad_() for task, logits in maps.items()}
                    for maps in (preds, inter or {}))
    losses = criterion(final, weights, **settings)(final, labels, inter)
    losses["total"].backward()
    leaves = final | {f"inter/{task}": leaf for task, leaf in inter.items()}
    return losses, {name: leaf.grad for name, leaf in leaves.items()}


def filled(scored: Meter, task: str, batches: Iterable[tuple[Tensor, Tensor]], options: Options) -> Meter:
    """The meter after batches of logits and labels."""
    for logits, label in batches:
        scored.update(decode(task, logits.to(options.dtype)), label)
    return scored


def meter(task: str, channels: int, **options) -> Evaluator:
    """The evaluator that always runs."""
    return TASKS.load(task).build_evaluators(context(channels, **options))[0]


def decode(task: str, logits: Tensor) -> Tensor:
    """What a meter takes, from a model's raw output."""
    return TASKS.load(task).decode(logits, [])


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def flops(model: nn.Module, image_size: tuple[int, int]) -> FlopCounterMode:
    """The counter after one image, nothing allocated: the model is on the device "meta"."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *image_size, device="meta"))
    return counter
