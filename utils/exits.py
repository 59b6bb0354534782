"""How the program ends: its exit codes, and what a run raises that has left on request."""

import logging
import multiprocessing
import os
import sys
from typing import NoReturn

DONE = 0
FAILED = 1
USAGE = 2                   # wrong arguments; argparse's own code
CONTINUE = 75               # the run was asked to leave and has saved; start it again with --resume
BY_SIGNAL = 128             # plus the signal's number: asked a second time, left at once


class ToBeContinued(KeyboardInterrupt):
    """The run has left because it was asked to; what it says is where it goes on."""


class ToldElsewhere(Exception):
    """An error that another process of the run reports."""


def end_at_once(code: int) -> NoReturn:
    """Ends the process and its workers, without the seconds that Python takes to tidy up behind PyTorch."""
    end_children()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_children() -> None:
    """Ends this process's workers, also those that have been stopped: nobody waits for them any more."""
    for child in multiprocessing.active_children():
        child.kill()
