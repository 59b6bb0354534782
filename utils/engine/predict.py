"""Predictions on any photographs, and the evaluation of a checkpoint: what `predict` and `infer` run."""

import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from data.loader import build_eval_loader
from utils import distributed
from utils.durable import write_text
from utils.engine import selection
from utils.engine.build import build_split, evaluation_contexts, trained_model
from utils.engine.config import Config
from utils.engine.evaluate import build_evaluators, evaluate, log_reports
from utils.engine.inputs import Journal, Source, find_inputs, is_camera, is_video, output_names
from utils.engine.prediction import Answer, write_prediction
from utils.engine.predictor import Framed, Predictor
from utils.engine.report.review import Review
from utils.engine.report.write import report_on
from utils.engine.results import Results, check_reference, format_table, save_results, unscored
from utils.engine.tasks import TASKS
from utils.engine.video import predict_video
from utils.progress import Progress

logger = logging.getLogger(__name__)

# Keys that change how fast predictions come, not what they are.
OF_THE_MACHINE = ("device", "nworkers", "valBatch", "progress", "loader_timeout", "worker_start", "scan_backend",
                  "cuda_graph", "tensorboard", "report", "db_root", "out_dir")


class LeftOut(ValueError):
    """Some inputs could not be read."""

    next_step = "the lines above say what is wrong with each; the same line again does those alone"


def infer(config: Config, checkpoint: Path, output_dir: Path, split: Literal["test", "held_out"] = "test") -> Results:
    """Evaluates a checkpoint; writes results.json and the boundary maps (edge/<name>.png).

    split: the test images, or those that `val_from_train` held out of the training. Under a launcher every rank
    evaluates its share. A task without a valid pixel in the whole split is a ValueError, after the other scores have
    been reported.
    """
    check_reference(config.single_task_scores)
    held_out = config.val_from_train if split == "held_out" else 0.0
    if split == "held_out" and not held_out:
        raise ValueError(f"--split held_out: {checkpoint} held no images out of its training (val_from_train is 0); "
                         "leave --split out to score the test images")
    scored = selection.evaluated_split(str(config.train_db_name), str(config.val_db_name), held_out)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        model, chosen = trained_model(config, checkpoint, device)
        dataset = build_split(config, "selects" if held_out else "val")
        progress = distributed.is_main() and config.progress
        loader = build_eval_loader(dataset, config.valBatch, config.nworkers, distributed.rank(),
                                   distributed.world_size(), **config.loading)
        contexts = evaluation_contexts(config, dataset, config.boundary_infer, progress)
        evaluators, review = build_evaluators(contexts), Review(contexts, output_dir) if config.report else None
        results = evaluate(model, loader, evaluators, config, device, export_dir=output_dir, progress=progress,
                           on_batch=review)
        loader.close()
        if distributed.is_main():
            save_results(output_dir / "results.json", results, checkpoint=str(checkpoint), split=scored,
                         dataset=str(config.train_db_name if held_out else config.val_db_name), selection=chosen,
                         units=config.dataset.units, test_time=dataclasses.asdict(config.test_time))
            logger.info("%s (%s) on %s\n%s", checkpoint, chosen, scored,
                     format_table({config.version_name: results}, config.single_task_scores,
                                  config.dataset.units))
            log_reports(evaluators)
            logger.info("scores: %s", output_dir / "results.json")
        if review is not None:
            report_on(review, model, device, config, results, evaluators, scored, chosen, checkpoint)
        if empty := unscored(results):
            raise ValueError(f"the {scored} split has no valid pixel for {', '.join(empty)}: "
                             "the score is undefined (check the label files)")
    return results


def predict(config: Config, checkpoint: Path, sources: Source | Sequence[Source], output_dir: Path,
            overwrite: bool = False) -> list[Path]:
    """Predicts pictures, videos and cameras; returns the file that shows all of each: its panel, or its video.

    `sources`: see `find_inputs`. `output_dir` receives panels/<name>.png, colour/<task>/<name>.png and
    raw/<task>/<name>.<png|npy> at the picture's own size, formats.json with the units of the raw files, and
    videos/<name>.mp4; for <name> see `output_names`. What predictions.jsonl says to be there, made by the same
    checkpoint and settings of the same file, is left as it is unless `overwrite`. What cannot be read is reported and
    skipped; at the end that makes the call a ValueError that names every such input. Under a launcher every rank takes
    its share.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output {output_dir} is a file; name a folder, which need not be there yet")
    inputs = find_inputs(sources)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        predictor = Predictor(config, checkpoint, device)
        journal = Journal(output_dir, _fingerprint(config, checkpoint))
        there = [path for path in inputs if path.is_file() or is_camera(path)]
        names = distributed.from_main(lambda: output_names(there, journal.names()))
        if distributed.is_main():
            _write_formats(predictor, output_dir)
        share = inputs[distributed.rank()::distributed.world_size()]
        left = [path for path in share if overwrite or path not in names or not journal.has(path, names[path])]
        if len(left) < len(share):
            logger.info("%d of %d are there already; --overwrite makes them anew", len(share) - len(left), len(share))
        pictures = [path for path in left if not is_video(path)]
        failed = predict_pictures(predictor, pictures, names, output_dir, journal)
        failed += _predict_videos(predictor, [path for path in left if is_video(path)], names, output_dir, journal)
    shown = [_shown(output_dir, path, names[path]) for path in share if path not in failed]
    logger.info("%d of %d input(s) are predicted, in %s", len(shown), len(share), output_dir)
    if failed:
        raise LeftOut(f"{len(failed)} of {len(share)} input(s) could not be predicted: "
                      f"{', '.join(path.name for path in failed[:10])}{', ...' if len(failed) > 10 else ''}; all "
                      "others are done")
    return shown


def _shown(output_dir: Path, path: Path, name: str) -> Path:
    """The file that shows all of an input."""
    return output_dir / ("videos" if is_video(path) else "panels") / f"{name}{'.mp4' if is_video(path) else '.png'}"


def _predict_videos(predictor: Predictor, paths: Sequence[Path], names: Mapping[Path, str], output_dir: Path,
                    journal: Journal) -> list[Path]:
    """Writes a video for each of these; returns those that could not be read. A camera's is told to no journal."""
    failed = []
    for path in paths:
        try:
            predict_video(predictor, str(path), _shown(output_dir, path, names.get(path, path.name)))
        except (ValueError, FileNotFoundError) as error:
            logger.error("%s", error)
            failed.append(path)
        else:
            if path.is_file():
                journal.add(path, names[path])
    return failed


def predict_pictures(predictor: Predictor, paths: Sequence[Path], names: Mapping[Path, str], output_dir: Path,
                      journal: Journal) -> list[Path]:
    """Writes the files of these pictures; returns those that could not be read."""
    def write(path: Path, framed: Framed, answer: Answer) -> None:
        write_prediction(answer.results(framed.image, to_write=True), framed.image, output_dir, names[path])

    failed = []
    with Progress(len(paths), "predict", "image", predictor.config.progress) as progress:
        for path, _, error in predictor.steps(paths, predictor.read, write):
            if error is None:
                journal.add(path, names[path])
            else:
                logger.error("%s", error)
                failed.append(path)
            progress.step()
    return failed


def _write_formats(predictor: Predictor, output_dir: Path) -> None:
    formats = {task: TASKS.load(task).view.raw_format(context) for task, context in predictor.contexts.items()}
    write_text(output_dir / "formats.json", json.dumps(formats, indent=1) + "\n")


def _fingerprint(config: Config, checkpoint: Path) -> str:
    """Stands for a checkpoint and all settings that may change what it predicts."""
    stamp = checkpoint.stat() if checkpoint.is_file() else None
    settings = {key: value for key, value in config.to_dict().items() if key not in OF_THE_MACHINE}
    about = (os.path.abspath(checkpoint), stamp and (stamp.st_size, stamp.st_mtime_ns), settings)
    return f"{zlib.crc32(json.dumps(about, sort_keys=True, default=str).encode()):08x}"
