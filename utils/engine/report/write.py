"""report.html: everything that is known about an evaluation on one page."""

import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import yaml
from torch import nn

from utils import distributed
from utils.durable import write_text
from utils.engine import selection
from utils.engine.config import Config
from utils.engine.config_groups import AtTestTime
from utils.engine.cost import count, forward_ms
from utils.engine.evaluate import Evaluators
from utils.engine.report.figures import figure_html
from utils.engine.report.page import Section, code, facts, folded, heading, key_to_colours, page, pictures, plot, table
from utils.engine.report.plots import lines_svg
from utils.engine.report.review import INPUT, LABEL, ImageScores, Review, shown_images, thumbnail
from utils.engine.results import Results, table_rows, unit_of
from utils.engine.tasks import TASKS
from utils.machine import git_hash
from utils.sharded import is_sharded

logger = logging.getLogger(__name__)

REPORT = "report.html"


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation. split, chosen: which images, and how the weights were chosen, in words. folder: where the
    review of the images is."""

    config: Config
    results: Results
    evaluators: Evaluators
    images: ImageScores
    seconds: float
    split: str
    chosen: str
    checkpoint: Path
    folder: Path


def report_on(review: Review, model: nn.Module, device: torch.device, config: Config, results: Results,
              evaluators: Evaluators, split: str, chosen: str, checkpoint: Path,
              around: AbstractContextManager | None = None) -> None:
    """After an evaluation that `review` has seen, on every process; rank 0 writes the page, inside `around`."""
    images, seconds = review.finish()
    if distributed.is_main():
        about = Evaluated(config, results, evaluators, images, seconds, split, chosen, checkpoint, review.folder)
        with around or nullcontext():
            write_report(about, model, device)


def write_report(about: Evaluated, model: nn.Module, device: torch.device) -> Path:
    """Writes the page into the evaluation's folder."""
    name = about.config.version_name
    lead = f"{len(about.images.names)} images of {about.split}; weights: {about.chosen}; {about.checkpoint}"
    sections = [("Scores", _scores(about)), ("What may be compared with this", _protocol(about)), *_tasks(about),
                *_learning(about.checkpoint.parent / "metrics.jsonl", about.config.dataset.units),
                ("Model", _model(about, model, device)), ("Environment", facts(_environment(device))),
                ("Configuration", _configuration(about.config))]
    path = about.folder / REPORT
    write_text(path, page(f"{name}: evaluation", lead, sections))
    logger.info("report: %s", path)
    return path


def _scores(about: Evaluated) -> str:
    config = about.config
    rows = table_rows({config.version_name: about.results}, config.single_task_scores, config.dataset.units)
    shown = {(task, score.key) for task in about.results for score in TASKS.load(task).scores}
    others = [(f"{task} {key}", f"{value:.6g}") for task, scores in about.results.items()
              for key, value in scores.items() if (task, key) not in shown and "/" not in key]
    return table("As papers print them", rows) + folded("Further scores", facts(others))


def _protocol(about: Evaluated) -> str:
    config = about.config
    reports = [(task, line) for task, of_task in about.evaluators.items() for line in (e.report() for e in of_task)
               if line]
    pairs = [("images scored", f"{len(about.images.names)}, {about.split}"), ("weights", about.chosen),
             ("size of the network's input", "{} x {}".format(*config.input_size)),
             ("arithmetic", config.precision), ("views of an image (test_time)", _in_words(config.test_time)), *reports]
    warning = ""
    if about.chosen == selection.BY_TEST:
        warning = ("<p>The weights were chosen by their scores on these very images, so the scores are too good to be "
                   "compared with those of weights taken at the last update or chosen on held-out images.</p>")
    return warning + facts(pairs) + ("<p>Comparable are numbers of the same images, the same rule by which weights are "
                                     "chosen, the same boundary protocol, and for delta_m single-task networks of the "
                                     "same backbone.</p>")


def _in_words(group: AtTestTime) -> str:
    said = {True: "yes", False: "no"}
    return ", ".join(f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else said.get(value, value)}"
                     for key, value in asdict(group).items())


def _tasks(about: Evaluated) -> Iterator[Section]:
    for task, evaluators in about.evaluators.items():
        drawn = [figure_html(task, figure) for evaluator in evaluators for figure in evaluator.figures()]
        yield f"Task {task}", "\n".join([*drawn, *_examples(about, task)])


def _examples(about: Evaluated, task: str) -> Iterator[str]:
    """What the colours mean; the images that are shown, with the label beside the prediction."""
    images, score = about.images, about.images.scores.get(task)
    unit = unit_of(task, score, about.config.dataset.units) if score else ""
    yield key_to_colours(task, images.keys[task])
    for rank, indices in shown_images(images, task):
        yield heading(3, f"{task}: {rank} images" + (f" by {score.label}" if score else ""))
        for i in indices:
            value = f": {score.label} {score.format(images.values[task][i])} {unit}".rstrip() if score else ""
            shown = [("image", INPUT), ("prediction", task), ("label", f"{task}{LABEL}")]
            yield pictures(images.names[i] + value, [(what, thumbnail(about.folder, kind, images.names[i]))
                                                     for what, kind in shown])


def _learning(metrics: Path, units: Mapping[str, str]) -> Iterator[Section]:
    """Losses and scores over the training, where its metrics.jsonl lies beside the checkpoint."""
    if not metrics.is_file():
        return
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = _series(rows, "train", "loss/")
    scores = _series(rows, "eval", "")
    parts = []
    if losses:
        parts.append(plot(lines_svg(losses, "update", "loss", logarithmic=_positive(losses)), "Losses of the training",
                          "Losses over the updates: " + _ends(losses)))
    for name in TASKS.in_order({key.partition("/")[0] for key in scores}):
        for score in TASKS.load(name).scores:
            if line := scores.get(f"{name}/{score.key}"):
                scaled = {f"{name} {score.label}": (line[0], [score.scale * value for value in line[1]])}
                direction = "higher is better" if score.higher_is_better else "lower is better"
                parts.append(plot(lines_svg(scaled, "update", f"{score.label} {unit_of(name, score, units)}".strip()),
                                  f"{name} {score.label} in the evaluations, {direction}",
                                  f"Over the updates: {_ends(scaled)}"))
    if parts:
        yield "Learning curves", "\n".join(parts)


def _series(rows: list[dict], kind: str, prefix: str) -> dict[str, tuple[list, list]]:
    """name -> (updates, values) of a kind of line, finite values only."""
    found: dict[str, tuple[list, list]] = {}
    for row in rows:
        if row["kind"] == kind:
            for key, value in row.items():
                if key.startswith(prefix) and key not in ("kind", "step") and value is not None:
                    x, y = found.setdefault(key.removeprefix(prefix), ([], []))
                    x.append(row["step"])
                    y.append(value)
    return found


def _positive(lines: Mapping[str, tuple[list, list]]) -> bool:
    return all(value > 0 for _, y in lines.values() for value in y)


def _ends(lines: Mapping[str, tuple[list, list]]) -> str:
    return "; ".join(f"{name} from {y[0]:.4g} to {y[-1]:.4g}" for name, (_, y) in lines.items())


def _model(about: Evaluated, model: nn.Module, device: torch.device) -> str:
    config, number = about.config, len(about.images.names)
    alone = ("not measured: every process holds a part of the model" if is_sharded(model)
             else f"{forward_ms(model, config, device):.1f} ms, median of 5")
    speed = [("evaluation", f"{number} images in {about.seconds:.0f} s, reading, scoring and these pictures included"),
             ("forward pass of one image", alone)]
    return facts([("decoder", config.model), ("backbone", config.backbone), *count(config), *speed])


def _environment(device: torch.device) -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "device", torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield "processor cores", str(cores)
    yield "system", platform.platform()
    yield "Python", platform.python_version()
    yield from ((name, metadata.version(name)) for name in ("torch", "torchvision", "timm", "numpy"))
    yield "commit", git_hash() or "not known"


def _configuration(config: Config) -> str:
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    return folded("All keys and their values", code(text))
