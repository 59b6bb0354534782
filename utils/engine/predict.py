"""Predictions on any photographs, and the evaluation of a checkpoint: what `predict` and `infer` run."""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import build_eval_loader
from data.transforms import MEAN, STD
from evaluation.evaluator import TaskContext
from models.blocks.resize import resize
from utils import distributed
from utils.engine.build import build_split, evaluation_contexts, task_contexts, trained_model
from utils.engine.config import Config
from utils.engine.evaluate import build_evaluators, evaluate, forward_pass, log_reports
from utils.engine.panel import prediction_panel, to_array
from utils.engine.results import Results, check_reference, format_table, save_results, unscored
from utils.engine.tasks import TASKS
from utils.engine.views import save_rgb
from utils.files import read_rgb

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MIN_SIDE = 32      # one cell of the coarsest feature map


def infer(config: Config, checkpoint: Path, output_dir: Path) -> Results:
    """Evaluates a checkpoint on the test split; writes results.json and the boundary maps (edge/<name>.png).

    Under a launcher every rank evaluates its share. A task without a valid pixel in the whole split is a ValueError,
    after the other scores have been reported.
    """
    check_reference(config.single_task_scores)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        model, chosen = trained_model(config, checkpoint, device)
        dataset, progress = build_split(config, "val"), distributed.is_main() and config.progress
        loader = build_eval_loader(dataset, config.valBatch, config.nworkers, distributed.rank(),
                                   distributed.world_size(), **config.loading)
        evaluators = build_evaluators(evaluation_contexts(config, dataset, config.boundary_infer, progress))
        results = evaluate(model, loader, evaluators, device, precision=config.precision,
                           cuda_graph=config.cuda_graph, export_dir=output_dir, progress=progress)
        if distributed.is_main():
            save_results(output_dir / "results.json", results, checkpoint=str(checkpoint),
                         dataset=str(config.val_db_name), selection=chosen)
            logger.info("%s (%s) on %s\n%s", checkpoint, chosen, config.val_db_name,
                     format_table({config.version_name: results}, config.single_task_scores,
                                  config.dataset.units))
            log_reports(evaluators)
            logger.info("scores: %s", output_dir / "results.json")
        if empty := unscored(results):
            raise ValueError(f"the {config.val_db_name} test split has no valid pixel for {', '.join(empty)}: "
                             "the score is undefined (check the label files)")
    return results


def predict(config: Config, checkpoint: Path, source: Path, output_dir: Path) -> list[Path]:
    """Writes panels, colour pictures and raw arrays for an image or all images of a folder; returns the panels.

    `output_dir` receives panels/<name>.png, colour/<task>/<name>.png, raw/<task>/<name>.<png|npy> at the image's own
    size, and formats.json with the units of the raw files; for <name> see `output_names`. An unreadable image is
    reported and skipped; at the end it makes the call a ValueError that names every such image. Under a launcher every
    rank takes its share.
    """
    paths = list_images(source)
    device = distributed.pick_device(config.device)
    names, contexts, panels, failed = output_names(paths), task_contexts(config), [], []
    with distributed.process_group(device):
        model, _ = trained_model(config, checkpoint, device)
        forward = forward_pass(model, device, config.precision, config.cuda_graph)
        paths = paths[distributed.rank()::distributed.world_size()]
        for path in tqdm(paths, desc="predict", unit="image", leave=False, disable=None if config.progress else True):
            try:
                rgb = _read(path)
            except (ValueError, OSError) as error:
                logger.error("%s", error)
                failed.append(path.name)
                continue
            maps = predict_image(forward, rgb, config, device)
            panels.append(_write(output_dir, names[path], rgb, maps, contexts))
    if panels:
        formats = {task: TASKS.load(task).view.raw_format(contexts[task]) for task in config.tasks}
        (output_dir / "formats.json").write_text(json.dumps(formats, indent=1) + "\n", encoding="ascii")
        logger.info("%d panel(s) in %s; beside it colour/ and raw/", len(panels), output_dir / "panels")
    if failed:
        raise ValueError(f"{len(failed)} of {len(paths)} image(s) could not be predicted: {', '.join(failed[:10])}")
    return panels


@torch.inference_mode()
def predict_image(forward: Callable[[Tensor], dict], rgb: np.ndarray, config: Config,
                  device: torch.device) -> dict[str, np.ndarray]:
    """Decoded predictions {task: (H, W, C)} of an image (H, W, 3) uint8 of any size, at that size.

    `forward` is a `forward_pass` of the model. The image is scaled to fit the network's frame with its aspect ratio
    kept, and padded centrally with the mean colour, as images of the data set are; the logits are cut out, scaled back
    and decoded.
    """
    height, width = rgb.shape[:2]
    image, (top, left, h, w) = _frame(rgb, config.input_size)
    maps = {}
    for task, full in forward(image.to(device)).items():
        full = resize(full.float(), config.input_size)                       # data sets may ask for other label sizes
        cut = full[..., top:top + h, left:left + w]
        maps[task] = to_array(TASKS.load(task).decode(resize(cut, (height, width)), [{}])[0])
    return maps


def _read(path: Path) -> np.ndarray:
    rgb = read_rgb(path)
    if min(rgb.shape[:2]) < MIN_SIDE:
        raise ValueError(f"{path} has {rgb.shape[0]} x {rgb.shape[1]} pixels; every side must have at least {MIN_SIDE}")
    return rgb


def output_names(paths: Sequence[Path]) -> dict[Path, str]:
    """What the files of each image are called: its stem, the whole file name where two share a stem.

    Dots become underscores, and a name that is taken by then gets a number.
    """
    stems = Counter(path.stem for path in paths)
    names: dict[str, Path] = {}
    for path in paths:
        base = (path.stem if stems[path.stem] == 1 else path.name).replace(".", "_")
        numbered = (f"{base}_{number}" for number in itertools.count(2))
        names[next(name for name in itertools.chain([base], numbered) if name not in names)] = path
    return {path: name for name, path in names.items()}


def list_images(source: Path) -> list[Path]:
    """The image itself, or the images of a folder by name; none is a FileNotFoundError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"--input {source}: no such image or folder")
    paths = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"--input {source}: the folder holds no image ({' '.join(IMAGE_SUFFIXES)})")
    return paths


def _frame(rgb: np.ndarray, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """(1, 3, *size) normalised and padded, and where the image lies in it: top, left, height, width."""
    scale = min(size[0] / rgb.shape[0], size[1] / rgb.shape[1])
    h = min(size[0], max(1, round(rgb.shape[0] * scale)))
    w = min(size[1], max(1, round(rgb.shape[1] * scale)))
    inside = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    frame = np.zeros((*size, 3), np.float32)
    frame[top:top + h, left:left + w] = (inside.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(frame).permute(2, 0, 1)[None], (top, left, h, w)  # (H, W, 3) -> (1, 3, H, W)


def _write(output_dir: Path, name: str, rgb: np.ndarray, maps: dict[str, np.ndarray],
           contexts: dict[str, TaskContext]) -> Path:
    for task, prediction in maps.items():
        view = TASKS.load(task).view
        view.write(output_dir / "raw" / task / name, prediction, contexts[task])
        save_rgb(output_dir / "colour" / task / f"{name}.png", view.picture(prediction, contexts[task], rgb))
    return save_rgb(output_dir / "panels" / f"{name}.png", prediction_panel(rgb, maps, contexts))
