"""The arguments of the command line, and which of them each run mode reads."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

# What neither `infer` nor `predict` reads of an experiment: how a network is trained.
TRAINING_KEYS = (
    "trBatch", "augmentation", "max_iter", "epochs", "val_interval", "checkpoint_interval", "save_interval",
    "log_interval", "global_batch", "optimizer", "optimizer_kwargs", "scheduler", "scheduler_kwargs",
    "grad_clip_param", "ema_decay",
    "pretrained", "pretrained_allow_missing", "init_from", "freeze", "lr_scale", "layer_decay", "weight_decay_on",
    "activation_checkpointing", "compile", "find_unused_parameters", "tensorboard",
    "val_from_train", "on_nonfinite", "nonfinite_limit", "watchdog",
    "eval_at_start", "boundary_eval", "out_dir", "resume", "skip_data_check")
OVERRIDE = re.compile(r"[A-Za-z_][\w.@]*=")
FLAGS = {       # flag -> (run modes that read it, options of argparse's add_argument)
    "--trained_model": (("infer", "predict"), dict(metavar="CKPT", help="for infer and predict: a checkpoint, the "
                                               "folder of a run, or a name on the Hugging Face Hub")),
    "--input": (("predict",), dict(nargs="+", metavar="PATH", help="predict: images, videos, folders, patterns, lists "
                                                                "(.txt), camera:0")),
    "--output": (("infer", "predict"), dict(type=Path, metavar="DIR", help="where to write; default: by the "
                                                                           "checkpoint")),
    "--overwrite": (("predict",), dict(action="store_true", help="predict: make anew what is there already")),
    "--split": (("infer",), dict(choices=("test", "held_out"), help="infer: which images; held_out: those of "
                                 "val_from_train, by which the training selected (default: test)")),
    "--skip_data_check": (("train",), dict(action="store_true", help="train: start without reading every file first; a "
                                           "damaged one then ends the run when it is met")),
    "--dry_run": (("train",), dict(action="store_true", help="train: rehearse everything once and say what it needs")),
    "--resume": (("train",), dict(action="store_true", help="train: continue from the run's newest checkpoint")),
}
NEEDED = {"train": ("config_exp",), "infer": ("trained_model",), "predict": ("trained_model", "input")}


def parse_arguments(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The arguments this field's programs take, and `key=value` overrides of the experiment file.

    Ends the program with exit code 2 where the run mode needs an argument that is not there, or does not read one that
    is.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run_mode", choices=tuple(NEEDED), default="train", help="what to do")
    parser.add_argument("--config_exp", metavar="YAML", help="experiment file; default: the checkpoint's")
    for flag, (_, options) in FLAGS.items():
        parser.add_argument(flag, **options)
    parser.add_argument("--seed", type=int, metavar="N", help="the same as seed=N; default: the experiment file's")
    parser.add_argument("--dataset_log", help=argparse.SUPPRESS)    # names a log in BridgeNet's program, nothing here
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)   # of torch's launcher
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trBatch=2 optimizer_kwargs.lr=1e-4")
    args = parser.parse_intermixed_args(arguments)
    _part_input(args)
    if args.seed is not None:
        args.overrides.append(f"seed={args.seed}")
    if args.skip_data_check:
        args.overrides.append("skip_data_check=true")
    for name in NEEDED[args.run_mode]:
        if getattr(args, name) is None:
            parser.error(f"--run_mode {args.run_mode} needs --{name} (README, \"The commands of the field\")")
    _refuse_unread(parser, args)
    return args


def _part_input(args: argparse.Namespace) -> None:
    """`--input a.jpg b.jpg key=value`: what has the form of an override, and is no file, is one."""
    given = args.input or []
    args.overrides += [word for word in given if OVERRIDE.match(word) and not Path(word).exists()]
    args.input = [word for word in given if word not in args.overrides] or None


def _refuse_unread(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """An argument that would change nothing is a misunderstanding, and told as one."""
    for flag, (modes, _) in FLAGS.items():
        value = getattr(args, flag.removeprefix("--"))
        if args.run_mode not in modes and value is not None and value is not False:
            advice = f"; init_from={value} starts a training from its weights" if flag == "--trained_model" else ""
            parser.error(f"--run_mode {args.run_mode} does not read {flag}; it is for --run_mode {' and '.join(modes)} "
                         f"(--run_mode train is the default){advice}")
    for override in args.overrides if args.run_mode != "train" else ():
        key = override.partition("=")[0]
        if key.partition(".")[0] in TRAINING_KEYS:
            parser.error(f"argument '{override}': --run_mode {args.run_mode} does not read {key}, which says how a "
                         "network is trained; leave it out")
