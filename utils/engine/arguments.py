"""The arguments of the command line, which of them each run mode reads, and what it says about itself."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from utils import exits
from utils.engine.exports import DYNAMIC, EXPORTS
from utils.logging import say

# What neither `infer` nor `predict` reads of an experiment: how a network is trained.
TRAINING_KEYS = (
    "trBatch", "augmentation", "max_iter", "epochs", "val_interval", "checkpoint_interval", "save_interval",
    "log_interval", "global_batch", "optimizer", "optimizer_kwargs", "scheduler", "scheduler_kwargs",
    "grad_clip_param", "ema_decay",
    "pretrained", "pretrained_allow_missing", "init_from", "freeze", "lr_scale", "layer_decay", "weight_decay_on",
    "activation_checkpointing", "compile", "find_unused_parameters", "tensorboard",
    "val_from_train", "on_nonfinite", "nonfinite_limit", "watchdog",
    "eval_at_start", "boundary_eval", "out_dir", "resume", "skip_data_check")
OVERRIDE = re.compile(r"[A-Za-z_][\w.@:/]*=")


class Mode(NamedTuple):
    """A run mode: what it does, the arguments that it needs, and an example."""

    says: str
    needs: tuple[str, ...]
    example: str


MODES = {
    "train": Mode("train a network", ("config_exp",),
                  "python main.py --run_mode train --config_exp configs/bim_nyud.yml trBatch=2"),
    "infer": Mode("score a checkpoint on the test split", ("trained_model",),
                  "python main.py --run_mode infer --trained_model runs/bim_nyud/best.pt"),
    "predict": Mode("see what a checkpoint says of your pictures and videos", ("trained_model", "input"),
                    "python main.py --run_mode predict --trained_model runs/bim_nyud --input photo.jpg film.mp4"),
    "export": Mode("write a checkpoint's network for other programs, and check it", ("trained_model", "format"),
                   "python main.py --run_mode export --trained_model runs/bim_nyud --format onnx"),
}
FIRST_STEPS = """\
Three commands to try, one after the other (minutes on two cores; the first draws rooms with exact labels):
  python scripts/render_example.py --out datasets/example --layouts NYUDv2 PASCALContext
  python main.py --config_exp configs/example/lite0_nyud.yml
  python main.py --run_mode predict --trained_model runs/example_lite0_nyud --input docs/demo_panel.png"""
MORE = """\
More:
  python main.py --help                 every argument
  python main.py --help_config [KEY]    every key of an experiment file, or one of them
  README.md, docs/                      data, models, clusters, your own folders, your own tasks"""

FLAGS = {       # flag -> (run modes that read it, options of argparse's add_argument)
    "--resume": (("train",), dict(action="store_true", help="continue from the run's newest checkpoint")),
    "--dry_run": (("train",), dict(action="store_true", help="rehearse everything once and say what it needs")),
    "--skip_data_check": (("train",), dict(action="store_true", help="start without reading every file first; a "
                                           "damaged one then ends the run when it is met")),
    "--trained_model": (("infer", "predict", "export"), dict(
        metavar="CKPT", help="a checkpoint, the folder of a run, or a name on the Hugging Face Hub")),
    "--output": (("infer", "predict", "export"), dict(type=Path, metavar="DIR", help="where to write; default: by the "
                                                                           "checkpoint")),
    "--split": (("infer",), dict(choices=("test", "held_out"), help="which images; held_out: those of val_from_train, "
                                 "by which the training selected (default: test)")),
    "--input": (("predict",), dict(nargs="+", metavar="PATH", help="images, videos, folders, patterns, lists (.txt), "
                                                                   "camera:0")),
    "--overwrite": (("predict",), dict(action="store_true", help="make anew what is there already")),
    "--format": (("export",), dict(choices=tuple(EXPORTS), help="the kind of file")),
    "--dynamic": (("export",), dict(choices=DYNAMIC, help="what of the input stays open (default: none)")),
}


def parse_arguments(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The arguments this field's programs take, and `key=value` overrides of the experiment file.

    Ends the program with exit code 2 where the run mode needs an argument that is not there, or does not read one that
    is, or where there are no arguments at all (with an overview); with 0 after help.
    """
    parser = build_parser(description)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        say(overview(description), sys.stdout)
        parser.exit(exits.USAGE)
    args = parser.parse_intermixed_args(given)
    _part_input(args)
    if args.seed is not None:
        args.overrides.append(f"seed={args.seed}")
    if args.skip_data_check:
        args.overrides.append("skip_data_check=true")
    for name in MODES[args.run_mode].needs:
        if getattr(args, name) is None:
            parser.error(f"--run_mode {args.run_mode} needs --{name}, e.g. {MODES[args.run_mode].example}")
    _refuse_unread(parser, args)
    return args


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """All arguments, in groups by the run modes that read them."""
    examples = "\n".join(["examples:", *(f"  {mode.example}" for mode in MODES.values()), "", MORE])
    parser = _Parser(description=description, epilog=examples, add_help=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    common = parser.add_argument_group("all run modes")
    common.add_argument("--run_mode", choices=tuple(MODES), default="train",
                        help="; ".join(f"{name}: {mode.says}" for name, mode in MODES.items()) + " (default: train)")
    common.add_argument("--config_exp", metavar="YAML", help="experiment file; default: the checkpoint's")
    common.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the experiment file, e.g. trBatch=2 "
                                                                          "optimizer_kwargs.lr=1e-4")
    common.add_argument("--seed", type=int, metavar="N", help="the same as seed=N; default: the experiment file's")
    readers = dict.fromkeys(modes for modes, _ in FLAGS.values())
    groups = {modes: parser.add_argument_group(f"--run_mode {' and '.join(modes)}") for modes in readers}
    for flag, (modes, options) in FLAGS.items():
        groups[modes].add_argument(flag, **options)
    help_ = parser.add_argument_group("help")
    help_.add_argument("--help", "-h", action="help", help="this page")
    help_.add_argument("--help_config", nargs="?", const="", metavar="KEY", action=_Says, says=_help_config,
                       help="the keys of an experiment file, or all about one (optimizer_kwargs.adamw, model, ...)")
    help_.add_argument("--completion", choices=("bash", "zsh"), action=_Says, says=_completion,
                       help="a script for the shell: source <(python main.py --completion bash)")
    help_.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--dataset_log", help=argparse.SUPPRESS)    # names a log in BridgeNet's program, nothing here
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)   # of torch's launcher
    return parser


def overview(description: str | None) -> str:
    """What the program can do, for somebody who has just found it."""
    modes = "\n".join(f"  {name:<9}{mode.says}\n             {mode.example}" for name, mode in MODES.items())
    return f"{description}\n\nRun modes:\n{modes}\n\n{FIRST_STEPS}\n\n{MORE}"


class _Parser(argparse.ArgumentParser):
    """A mistake is told in one line, with what to do next, and not below the whole usage."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        say(message.removesuffix("\n"), file or sys.stderr)

    def error(self, message: str) -> NoReturn:
        self.exit(exits.USAGE, exits.told(message, "python main.py --help lists the arguments") + "\n")


class _Says(argparse.Action):
    """Prints what `says(parser, value)` returns, and ends the program."""

    def __init__(self, *arguments: Any, says: Callable[[argparse.ArgumentParser, str], str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.says = says

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> NoReturn:
        try:
            text = self.says(parser, values)
        except ValueError as error:
            parser.error(str(error))
        say(text, sys.stdout)
        parser.exit()


def _help_config(parser: argparse.ArgumentParser, key: str) -> str:
    from utils.engine.help_config import describe  # here and below: what reading all options classes takes
    return describe(key)


def _completion(parser: argparse.ArgumentParser, shell: str) -> str:
    from utils.engine.completion import script
    return script(shell, parser)


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
