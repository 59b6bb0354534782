"""From a `Config` to the objects it describes; what training, evaluation and prediction have in common."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from data.base import MultiTaskDataset
from data.cache import DecodedCache
from data.labels import LabelRules
from data.mixture import MixedDataset
from data.spec import DatasetSpec
from data.splits import PartOfSplit
from data.transforms import build_transform
from evaluation.boundary.settings import Mode
from evaluation.evaluator import TaskContext
from losses.balancing import build_balancing
from losses.multi_task import MultiTaskLoss
from models.blocks.recompute import recompute_blocks
from models.build import build_model
from models.lora.layers import merge_adapters
from models.model import MultiTaskModel
from models.ops.products import speed_up_products
from models.ops.scan_choice import set_scan_backend
from utils.distributed import pick_device
from utils.engine import selection
from utils.engine.checkpoint import load_model, read_checkpoint, weights_of
from utils.engine.config import Config
from utils.engine.first_weights import begin, require_whole
from utils.engine.tasks import TASKS, label_rules, tasks_named
from utils.machine import keep_freed_memory
from utils.precision import set_determinism, set_float32_arithmetic

logger = logging.getLogger(__name__)


def task_contexts(config: Config) -> dict[str, TaskContext]:
    """What losses, evaluators and views of the active tasks need to know of this experiment."""
    spec = config.dataset
    for task, row in tasks_named(config.tasks).items():
        if row.num_channels not in (None, spec.tasks[task]):
            raise ValueError(f"{spec.name} gives task {task} {spec.tasks[task]} channels, it has {row.num_channels}")
    return {task: TaskContext(label.channels, config.ignore_index, config.task_dictionary.edge_w, label.classes,
                              label.valid_range, label.colours, label.unit, config.det3d_kwargs)
            for task, label in ((task, spec.labels[task]) for task in config.tasks)}


def evaluation_contexts(config: Config, dataset: MultiTaskDataset | MixedDataset, boundary: Mode,
                        progress: bool = False) -> dict[str, TaskContext]:
    """`task_contexts` for an evaluation on this split; `boundary` says whether the boundary score is wanted."""
    return {task: replace(context, split=dataset.scored(task), boundary=config.boundary_kwargs, boundary_mode=boundary,
                          progress=progress)
            for task, context in task_contexts(config).items() if task in dataset.labels}


def model_from_config(config: Config) -> MultiTaskModel:
    """The configured model with fresh weights."""
    set_scan_backend(config.scan_backend)
    set_float32_arithmetic(config.precision)
    set_determinism(config.deterministic)
    speed_up_products()
    outputs = {task: config.dataset.tasks[task] for task in config.tasks}
    rows, contexts = tasks_named(config.tasks), task_contexts(config)
    heads = {task: row.head(contexts[task]) for task, row in rows.items() if row.head is not None}
    return build_model(config.model, config.backbone, outputs, config.input_size, label_size=config.output_size,
                       neck=config.neck, heads=heads, backbone_kwargs=config.backbone_kwargs,
                       neck_kwargs=config.neck_kwargs, model_kwargs=config.model_kwargs)


def prepare_for_training(model: MultiTaskModel, config: Config) -> None:
    """Memory format, activation checkpointing and compilation, in place; weights and their names stay as they are.

    On a CPU the process keeps from now on the memory that it has freed.
    """
    if pick_device(config.device).type == "cpu":
        keep_freed_memory()
    parts = {"backbone": model.encoder, "decoder": model.decoder}
    if config.activation_checkpointing != "none":
        counts = {name: recompute_blocks(part) for name, part in parts.items()
                  if config.activation_checkpointing in (name, "all")}
        if not any(counts.values()):
            raise ValueError(f"activation_checkpointing {config.activation_checkpointing}: model '{config.model}' on "
                             f"backbone '{config.backbone}' names no blocks for it; set it to none")
        logger.info("activation checkpointing of %s", ", ".join(f"{n} blocks ({name})" for name, n in counts.items()))
    _lay_out(model, config)
    if config.compile:
        for part in parts.values():
            part.compile()


def _lay_out(model: MultiTaskModel, config: Config) -> None:
    """In memory; it decides about the last bits of what a convolution gives."""
    if config.channels_last:
        model.to(memory_format=torch.channels_last)


def build_criterion(config: Config, model: MultiTaskModel) -> MultiTaskLoss:
    """The task losses and their balance, as `loss_kwargs` says."""
    settings, contexts = config.loss_kwargs, task_contexts(config)
    losses = {task: TASKS.load(task).loss(context) for task, context in contexts.items()}
    weights = {task: settings.loss_weights.get(task, 1.0) for task in config.tasks}
    balancing = build_balancing(settings.loss_scheme, config.tasks, weights, settings.scheme_kwargs)
    balancing.prepare([parameter for parameter in model.encoder.parameters() if parameter.requires_grad])
    intermediate = settings.intermediate_weight
    if intermediate is None:
        intermediate = model.decoder.intermediate_weight
    return MultiTaskLoss(losses, balancing, intermediate, settings.loss_scope,
                         use_intermediate=config.intermediate_supervision)


def trained_model(config: Config, path: Path, device: torch.device) -> tuple[MultiTaskModel, str]:
    """The configured model with a checkpoint's weights, ready for inference.

    They are those of its moving average where it has one and `test_time.ema` does not say no.

    Beside it, how these weights were chosen (`selection`).
    """
    model, chosen = loaded_model(config, path)
    _lay_out(model.to(device), config)
    return model.prepare_for_inference(), chosen


def loaded_model(config: Config, path: Path) -> tuple[MultiTaskModel, str]:
    """As `trained_model`, on the CPU, adapters merged, nothing else done to it."""
    checkpoint, model = read_checkpoint(path), model_from_config(config)
    if config.lora.rank:
        checkpoint = begin(model, config, resumed=True).completed(checkpoint, model, path)
    else:
        require_whole(checkpoint, path)
    load_model(model, weights_of(checkpoint, config.test_time.ema), path, file_config=checkpoint.get("config"),
               yaml_config=config.to_dict())
    merge_adapters(model)
    return model, selection.of_checkpoint(path, checkpoint)


def build_split(config: Config, split: str) -> MultiTaskDataset | MixedDataset:
    """The "train" or "val" split with its transforms, or the one that a training `selects` by.

    With `val_from_train` that is a part of the training split, which is not trained on; else it is "val".
    """
    split = "val" if split == "selects" and not config.val_from_train else split
    choice, training = (config.val_db_name if split == "val" else config.train_db_name), split == "train"
    names = {task for task in config.tasks if task in choice.spec.labels}
    if training and config.augmentation.always_guide_crop:
        names |= {name for name, task in tasks_named(choice.spec.labels).items() if task.label.guides_crop}
    labels = {task: choice.spec.labels[task].rules or rules for task, rules in label_rules(names).items()}
    parts = [_build_part(config, part.spec, split, labels) for part in choice.parts]
    dataset = parts[0] if len(parts) == 1 else MixedDataset(parts, [part.weight for part in choice.parts])
    if training and (empty := [task for task in config.tasks if not dataset.labelled(task)]):
        advice = (", or draw other labels with partial_labels.seed" if config.partial_labels.subset != "all" else "")
        raise ValueError(f"no training image of {choice} has a label for {', '.join(empty)}; take the task out of "
                         f"task_dictionary{advice}")
    return dataset


def _build_part(config: Config, spec: DatasetSpec, split: str, labels: Mapping[str, LabelRules]) -> MultiTaskDataset:
    """One data set of a split; `labels` may hold tasks of others."""
    training = split == "train"
    if config.val_from_train and split != "val":
        whole = spec.splits["train"]
        parts = {name: PartOfSplit(whole, config.val_from_train, name == "selects") for name in ("train", "selects")}
        spec = replace(spec, splits={**spec.splits, **parts})
    fixed_label_size = None if spec.label_size is None else config.output_size or spec.label_size
    settings = config.augmentation
    windows = config.test_time.windows and not training
    largest = tuple(map(max, config.input_size, spec.image_size)) if windows else None
    transform = build_transform(config.input_size, fixed_label_size, training, labels, spec.resize, largest,
                                fixed_flip=settings.fixed_flip_prob, scale_range=settings.scale_range,
                                flip=settings.flip_prob, photometric=settings.photometric,
                                photometric_on_device=settings.photometric_on_device)
    cache = config.data_cache
    decoded = DecodedCache(cache.folder, cache.max_gb * 1e9) if cache.folder else None
    partial = config.partial_labels if training else replace(config.partial_labels, subset="all", empty="keep")
    return MultiTaskDataset(spec, config.db_root, split, labels, transform, decoded, partial,
                            elsewhere=labels.keys() - spec.labels.keys())
