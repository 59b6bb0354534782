"""Command line: train a model, evaluate a checkpoint, or predict on any images. All of it is in the README."""

import argparse
import os
import sys

# Before anything loads OpenMP: threads that wait for each other must sleep. By default they spin, and where they have
# fewer cores than expected (data loader workers, other programs) every operation then costs a scheduler's time slice.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from utils import exits  # noqa: E402
from utils.engine.arguments import parse_arguments  # noqa: E402
from utils.logging import setup_logging  # noqa: E402


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
    if args.dry_run:
        from utils.engine.dry_run import dry_run
        dry_run(config)
        return
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
    args = parse_arguments(None, __doc__)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank or 0))
    setup_logging(os.environ.get("RANK", "0") == "0")
    try:
        run(args)
    except exits.ToBeContinued:
        exits.end_at_once(exits.CONTINUE)
    except KeyboardInterrupt:
        sys.exit("interrupted")
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
