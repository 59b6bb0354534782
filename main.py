"""Command line: train a model, evaluate a checkpoint, or predict on any images. All of it is in the README."""

import argparse
import os
import sys
from pathlib import Path

# Before anything loads OpenMP: threads that wait for each other must sleep. By default they spin, and where they have
# fewer cores than expected (data loader workers, other programs) every operation then costs a scheduler's time slice.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from utils.logging import one_sentence, setup_logging  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments this field's programs take, and `key=value` overrides of the experiment file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run_mode", choices=("train", "infer", "predict"), default="train", help="what to do")
    parser.add_argument("--config_exp", metavar="YAML", help="experiment file; default: the checkpoint's")
    parser.add_argument("--trained_model", type=Path, metavar="CKPT", help="checkpoint for infer and predict")
    parser.add_argument("--input", type=Path, metavar="PATH", help="predict: an image, or a folder of images")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: by the checkpoint")
    parser.add_argument("--resume", action="store_true", help="train: continue from last.pt of the run's folder")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as seed=N; default: the experiment file's")
    parser.add_argument("--dataset_log", help=argparse.SUPPRESS)    # names a log in BridgeNet's program, nothing here
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)   # of torch's launcher
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trBatch=2 optimizer_kwargs.lr=1e-4")
    args = parser.parse_intermixed_args(arguments)
    if args.seed is not None:
        args.overrides.append(f"seed={args.seed}")
    needed = {"train": ("config_exp",), "infer": ("trained_model",), "predict": ("trained_model", "input")}
    for name in needed[args.run_mode]:
        if getattr(args, name) is None:
            parser.error(f"--run_mode {args.run_mode} needs --{name} (README, \"The commands of the field\")")
    return args


def read_config(args: argparse.Namespace):
    """The `utils.engine.config.Config` of the experiment file, else the checkpoint's."""
    from utils.engine.config import config_from_dict, load_config
    if args.config_exp is not None:
        return load_config(args.config_exp, args.overrides)
    from utils.engine.checkpoint import stored_config
    return config_from_dict(stored_config(args.trained_model), str(args.trained_model), args.overrides)


def run(args: argparse.Namespace) -> None:
    """Imports what the mode needs once the experiment has been read: a mistake is told before PyTorch is loaded."""
    config = read_config(args)
    if args.run_mode == "train":
        from utils.engine.train import train
        train(config, args.resume)
        return
    from utils.engine.predict import infer, predict
    output = args.output or args.trained_model.parent / args.run_mode
    if args.run_mode == "infer":
        infer(config, args.trained_model, output)
    else:
        predict(config, args.trained_model, args.input, output)


def main() -> None:
    """Runs, and turns a user's mistake into one sentence and exit code 1."""
    args = parse_arguments()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank or 0))
    setup_logging(os.environ.get("RANK", "0") == "0")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, FloatingPointError) as error:
        if args.traceback:
            raise
        sys.exit(f"error: {one_sentence(error)}")


if __name__ == "__main__":
    main()
