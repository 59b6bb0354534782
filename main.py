"""Multi-task dense prediction: train a network, score it, or see what it says of your pictures."""

import argparse
import os
import sys
from pathlib import Path

# Before anything loads OpenMP: threads that wait for each other must sleep. By default they spin, and where they have
# fewer cores than expected (data loader workers, other programs) every operation then costs a scheduler's time slice.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from utils import exits  # noqa: E402
from utils.engine.arguments import parse_arguments  # noqa: E402
from utils.logging import setup_logging  # noqa: E402


def run(args: argparse.Namespace) -> None:
    # Each mode imports what it needs once the experiment has been read: a mistake is told before PyTorch is loaded.
    if args.config_exp is not None:
        from utils.engine.config import load_config
        config = load_config(args.config_exp, args.overrides)
    if args.dry_run:
        from utils.engine.dry_run import dry_run
        dry_run(config)
    elif args.run_mode == "train":
        from utils.engine.train import train
        train(config, args.resume)
    else:
        from utils.engine.predict import infer, predict
        from utils.engine.stored_model import find_checkpoint, own_config
        checkpoint = find_checkpoint(args.trained_model)
        config = own_config(checkpoint, args.overrides) if args.config_exp is None else config
        output = args.output or output_of(args.trained_model, checkpoint, args.run_mode)
        if args.run_mode == "export":
            from utils.engine.exports import EXPORTS
            from utils.engine.exports.job import Job
            EXPORTS.load(args.format)(Job(config, checkpoint, args.dynamic or "none", output))
        elif args.run_mode == "infer":
            infer(config, checkpoint, output, args.split or "test")
        else:
            predict(config, checkpoint, args.input, output, args.overwrite)


def output_of(named: str, checkpoint: Path, mode: str) -> Path:
    # beside the checkpoint, but never in the copy that is kept of a model of the hub
    return (checkpoint.parent if Path(named).exists() else Path()) / mode


def main() -> None:
    """Runs, and turns a user's mistake into one sentence and exit code 1."""
    args = parse_arguments(None, __doc__)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank or 0))
    setup_logging(os.environ.get("RANK", "0") == "0")
    try:
        run(args)
    except exits.ToBeContinued:
        exits.end_at_once(exits.CONTINUE)
    except KeyboardInterrupt:
        sys.exit("interrupted. Next: the same line begins again (train: with --resume; predict goes on where it was)")
    except exits.ToldElsewhere:
        sys.exit(exits.FAILED)
    except Exception as error:
        ending = None if args.traceback else exits.ending_of(error)
        if ending is None:
            raise
        sys.exit(ending)
    finally:
        exits.end_children()


if __name__ == "__main__":
    main()
