"""What the evaluation of a training reports is what `infer` says of the file that it wrote, whatever was switched on.

Every two values of two options meet in one of the runs below. On a CPU the scores are equal bit for bit: the same
weights, laid out alike in memory, see the same images in the same arithmetic.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import run_main
from tests.watched_run import EXPERIMENT, experiment
from utils.engine.config import Config
from utils.engine.predict import infer
from utils.engine.stored_model import own_config
from utils.engine.train import train

# Every option and its values, as arguments of the command line; the first of each is the default.
OPTIONS = {
    "weights": ((), ("ema_decay=0.5",), ("ema_decay=0.5", "test_time.ema=false")),
    "precision": ((), ("precision=bf16",), ("precision=fp16",)),
    "layout": ((), ("channels_last=true",)),
    "looks": ((), ("test_time.flip=true",), ("test_time.scales=[1.25, 0.5]",),
              ("test_time={windows: true, overlap: 0.25}", "image_size=[32, 64]")),
    "tasks": ((), ("task_dictionary={include_semseg: true}",),
              ("task_dictionary={include_depth: true, include_normals: true, include_edge: true}",),
              ("train_db_name=PASCALContext", "val_db_name=PASCALContext",
               "task_dictionary={include_sal: true, include_human_parts: true}")),
    "labels": ((), ("partial_labels.subset=random",), ("partial_labels={missing: allow, subset: one}",)),
    "scored": ((), ("val_from_train=0.4",)),
    "edges": (("boundary_eval=off", "boundary_infer=off"), ("boundary_eval=fast", "boundary_infer=fast")),
    "batches": ((), ("valBatch=3", "trBatch=1", "global_batch=2")),
    "training": ((), ("freeze=[encoder]",), ("activation_checkpointing=backbone", "deterministic=true")),
    "model": ((), ("model=bim", "model_kwargs={msst_depth: 1, d_state: 2}", "intermediate_supervision=true",
                   "scan_backend=torch")),
}
# Keys of an experiment that are no option of OPTIONS: they say how weights come to be, what is shown or written, or
# where things lie, before or beside an evaluation.
NOT_OF_AN_EVALUATION = {
    "version_name", "out_dir", "resume", "db_root", "pretrained", "pretrained_allow_missing", "init_from",
    "augmentation", "data_cache", "skip_data_check", "max_iter", "epochs", "val_interval", "checkpoint_interval",
    "save_interval", "log_interval", "optimizer", "optimizer_kwargs", "scheduler", "scheduler_kwargs", "lr_scale",
    "layer_decay", "weight_decay_on", "loss_kwargs", "grad_clip_param", "seed", "on_nonfinite", "nonfinite_limit",
    "loader_timeout", "watchdog", "find_unused_parameters", "tensorboard", "progress", "eval_at_start",
    "single_task_scores", "report", "camera_file", "nworkers", "worker_start",
}
# What a test on one CPU cannot switch, what is equal but for rounding (adapters, which infer merges), and the kinds of
# models and labels whose evaluation is that of all others.
ELSEWHERE = {"device", "parallel", "compile", "cuda_graph", "ignore_index", "lora", "backbone", "backbone_kwargs",
             "neck", "neck_kwargs", "label_size", "boundary_kwargs", "det3d_kwargs"}


def covering_runs() -> Iterator[tuple[tuple[str, ...], ...]]:
    """Runs, a value per option, in which every two values of two options meet; each takes many new pairs."""
    names = list(OPTIONS)
    pairs = {frozenset(((a, x), (b, y))) for a, b in itertools.combinations(names, 2)
             for x in OPTIONS[a] for y in OPTIONS[b]}
    while pairs:
        run = dict(min(pairs, key=lambda pair: sorted(pair)))
        for name in names:
            if name not in run:
                run[name] = max(OPTIONS[name], key=lambda value: sum(
                    frozenset(((name, value), other)) in pairs for other in run.items()))     # noqa: B023
        pairs -= {frozenset(pair) for pair in itertools.combinations(run.items(), 2)}
        yield tuple(run[name] for name in names)


def scores(path: Path) -> dict:
    return json.loads(path.read_text(encoding="ascii"))["scores"]


def inferred(config: Config, output: Path) -> dict:
    """Of last.pt, with no experiment but the one in the file."""
    path = config.run_dir / "last.pt"
    infer(own_config(path), path, output, split="held_out" if config.val_from_train else "test")
    return scores(output / "results.json")


@pytest.mark.parametrize("run", covering_runs(), ids=lambda run: " ".join(itertools.chain(*run)))
def test_infer_repeats_the_evaluation_of_the_training(example_root, tmp_path, run):
    config = experiment(example_root, tmp_path, "max_iter=2", "val_interval=2", "optimizer_kwargs.lr=1e-2",
                        "report=false", *itertools.chain(*run))
    train(config, resume=False)
    reported = scores(config.run_dir / "results" / "step_2.json")
    assert reported.keys() == set(config.tasks) and all(task["valid_pixels"] for task in reported.values())
    assert inferred(config, tmp_path / "infer") == reported


def test_two_processes_report_what_one_infers(example_root, tmp_path):
    """With batch norm, whose statistics differ from process to process."""
    arguments = ["ema_decay=0.5", "test_time.flip=true", "precision=bf16", "boundary_eval=fast", "boundary_infer=fast",
                 "task_dictionary={include_semseg: true, include_depth: true, include_edge: true}", "max_iter=2",
                 "optimizer_kwargs.lr=1e-2", "valBatch=1", "report=false"]
    config = experiment(example_root, tmp_path, *arguments)
    run_main(["--config_exp", str(tmp_path / "watched.yml"), f"db_root={example_root}", f"out_dir={tmp_path}",
              *arguments], processes=2)
    reported, found = scores(config.run_dir / "results" / "step_2.json"), inferred(config, tmp_path / "infer")
    assert found.keys() == reported.keys() == {"semseg", "depth", "edge"}
    for task, values in reported.items():
        assert found[task] == pytest.approx(values, rel=1e-12)      # sums of two processes, added up in another order


def test_every_key_of_an_experiment_is_switched_above_or_does_not_matter():
    arguments = itertools.chain.from_iterable(itertools.chain(*OPTIONS.values()))
    switched = {argument.partition("=")[0].partition(".")[0] for argument in arguments}
    keys = {field.name for field in dataclasses.fields(Config)}
    assert switched | NOT_OF_AN_EVALUATION | ELSEWHERE == keys and EXPERIMENT.keys() <= keys
    assert not switched & (NOT_OF_AN_EVALUATION | ELSEWHERE) and not NOT_OF_AN_EVALUATION & ELSEWHERE
