"""From a `Config` to the objects it describes; what training, evaluation and prediction have in common."""

from pathlib import Path

import torch

from data.base import MultiTaskDataset
from data.boundary import truth_source
from data.datasets import DATASETS, build_dataset, build_transform
from data.tasks import TASKS, tasks_named
from evaluation.boundary import BoundaryBenchmark
from models.build import build_model
from models.model import MultiTaskModel
from models.ops import set_scan_backend
from utils.checkpoint import load_model, read_checkpoint
from utils.config import Config


def model_from_config(config: Config) -> MultiTaskModel:
    """The configured model with fresh weights."""
    set_scan_backend(config.scan_backend)
    outputs = {task: config.dataset.tasks[task] for task in config.tasks}
    return build_model(config.model, config.backbone, outputs, config.input_size, output_size=config.dataset.label_size,
                       neck=config.neck, head=config.head, backbone_kwargs=config.backbone_kwargs,
                       neck_kwargs=config.neck_kwargs, model_kwargs=config.model_kwargs)


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
    tasks, a = tasks_named(config.tasks), config.augmentation
    transform = build_transform(DATASETS[name].spec, split == "train", tasks, config.image_size,
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
