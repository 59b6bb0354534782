"""Command line: train a model, evaluate a checkpoint, or predict on any images. All of it is in the README."""

import argparse
import os
import sys
from pathlib import Path

# Before anything loads OpenMP: threads that wait for each other must sleep. By default they spin, and where they have
# fewer cores than expected (data loader workers, other programs) every operation then costs a scheduler's time slice.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from utils.engine.config import Config, config_from_dict, load_config  # noqa: E402
from utils.logging import setup_logging  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The lineage's arguments, and `key=value` overrides of the experiment file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run_mode", choices=("train", "infer", "predict"), default="train", help="what to do")
    parser.add_argument("--config_exp", metavar="YAML", help="experiment file; default: the checkpoint's")
    parser.add_argument("--trained_model", type=Path, metavar="CKPT", help="checkpoint for infer and predict")
    parser.add_argument("--input", type=Path, metavar="PATH", help="predict: an image, or a folder of images")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: by the checkpoint")
    parser.add_argument("--resume", action="store_true", help="train: continue from last.pt of the run's folder")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as seed=N; default: the experiment file's")
    # BridgeNet's program names its log so; here a run's folder has its name from the experiment file.
    parser.add_argument("--dataset_log", help=argparse.SUPPRESS)
    # torch.distributed.launch passes this one.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trBatch=2 optimizer_kwargs.lr=1e-4")
    args = parser.parse_intermixed_args()
    if args.seed is not None:
        args.overrides.append(f"seed={args.seed}")
    for mode, name in (("infer", "trained_model"), ("predict", "trained_model"), ("predict", "input")):
        if args.run_mode == mode and getattr(args, name) is None:
            parser.error(f"--run_mode {mode} needs --{name}")
    if args.run_mode == "train" and args.config_exp is None:
        parser.error("--run_mode train needs --config_exp, e.g. configs/bim_nyud.yml")
    return args


def read_config(args: argparse.Namespace) -> Config:
    """The experiment: from --config_exp, else from the checkpoint."""
    if args.config_exp is not None:
        return load_config(args.config_exp, args.overrides)
    from utils.engine.checkpoint import read_checkpoint
    stored = read_checkpoint(args.trained_model).get("config")
    if stored is None:
        raise ValueError(f"{args.trained_model} does not hold its configuration; name it with --config_exp")
    return config_from_dict(stored, str(args.trained_model), args.overrides)


def run(args: argparse.Namespace) -> None:
    """Dispatches. The heavy imports come after the configuration has been checked."""
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
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    setup_logging(os.environ.get("RANK", "0") == "0")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, FloatingPointError) as error:
        if args.traceback:
            raise
        # A data loader's worker wraps the message in its traceback; the sentence is the last line.
        lines = [line for line in str(error).splitlines() if line.strip()]
        message = lines[-1].split("Error: ", 1)[-1] if str(error).startswith("Caught ") else " ".join(lines)
        sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
