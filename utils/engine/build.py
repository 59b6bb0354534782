"""From a `Config` to the objects it describes; what training, evaluation and prediction have in common."""

import logging
from pathlib import Path

import torch

from data.base import MultiTaskDataset
from data.boundary import truth_source
from data.datasets import DATASETS, build_dataset, build_transform
from data.transforms import CROP_GUIDE
from evaluation.boundary import BoundaryBenchmark
from models.blocks.recompute import recompute_blocks
from models.build import build_model
from models.model import MultiTaskModel
from models.ops.scan_choice import set_scan_backend
from utils.engine.checkpoint import load_model, read_checkpoint
from utils.engine.config import Config
from utils.engine.tasks import TASKS, tasks_named
from utils.precision import set_float32_arithmetic

logger = logging.getLogger(__name__)


def model_from_config(config: Config) -> MultiTaskModel:
    """The configured model with fresh weights."""
    set_scan_backend(config.scan_backend)
    set_float32_arithmetic(config.precision)
    outputs = {task: config.dataset.tasks[task] for task in config.tasks}
    return build_model(config.model, config.backbone, outputs, config.input_size, output_size=config.label_size,
                       neck=config.neck, head=config.head, backbone_kwargs=config.backbone_kwargs,
                       neck_kwargs=config.neck_kwargs, model_kwargs=config.model_kwargs)


def prepare_for_training(model: MultiTaskModel, config: Config) -> None:
    """Memory format, activation checkpointing and compilation, in place; weights and their names stay as they are."""
    parts = {"backbone": model.encoder, "decoder": model.decoder}
    if config.activation_checkpointing != "none":
        counts = {name: recompute_blocks(part) for name, part in parts.items()
                  if config.activation_checkpointing in (name, "all")}
        if not any(counts.values()):
            raise ValueError(f"activation_checkpointing {config.activation_checkpointing}: model '{config.model}' on "
                             f"backbone '{config.backbone}' names no blocks for it; set it to none")
        logger.info("activation checkpointing of %s", ", ".join(f"{n} blocks ({name})" for name, n in counts.items()))
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        for part in parts.values():
            part.compile()


def trained_model(config: Config, path: Path, device: torch.device) -> MultiTaskModel:
    """The configured model with a checkpoint's weights (its moving average where it has one), ready for inference."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("ema") or checkpoint["model"]
    state = {key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
    model = model_from_config(config)
    load_model(model, state, path, file_config=checkpoint.get("config"), yaml_config=config.to_dict())
    return model.to(device).prepare_for_inference()


def build_split(config: Config, split: str) -> MultiTaskDataset:
    """The "train" or "val" split with its transforms."""
    name = config.train_db_name if split == "train" else config.val_db_name
    a = config.augmentation
    tasks = tasks_named({*config.tasks, CROP_GUIDE} if split == "train" and a.always_guide_crop else config.tasks)
    transform = build_transform(DATASETS[name].spec, split == "train", tasks, config.image_size, config.label_size,
                                scale_range=a.scale_range, flip=a.flip_prob, photometric=a.photometric)
    return build_dataset(name, config.db_root, split, tasks, transform)


def build_benchmarks(config: Config, dataset: MultiTaskDataset, mode: str,
                     progress: bool = False) -> dict[str, BoundaryBenchmark]:
    """The benchmarks of the active tasks that have one, for one evaluation; none where `mode` is "off"."""
    if mode == "off":
        return {}
    settings = config.boundary_kwargs
    return {task: TASKS[task].benchmark(truth_source(dataset, settings.images, mode == "fast"), settings, progress)
            for task in config.tasks if TASKS[task].benchmark is not None}
