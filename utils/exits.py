"""How the program ends: its exit codes, and what a run raises that has left on request."""

import errno
import logging
import multiprocessing
import os
import sys
import zlib
from datetime import timedelta
from typing import NoReturn

FAILED = 1
USAGE = 2                   # wrong arguments; argparse's own code
CONTINUE = 75               # the run was asked to leave and has saved; start it again with --resume
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", None))      # Windows has no second
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
BY_SIGNAL = 128             # plus the signal's number: asked a second time, left at once


class ToBeContinued(KeyboardInterrupt):
    """The run has left because it was asked to; what it says is where it goes on."""


class ToldElsewhere(Exception):
    """An error that another process of the run reports."""


def ending_of(error: Exception) -> str | int | None:
    """What `sys.exit` takes at this error: its sentence, said by one process alone; None where it has none."""
    if (sentence := sentence_of(error)) is None:
        return None
    step = next_step(error, "change that, or see where it came from with --traceback")
    return told(sentence, step) if first_to_say(sentence) else FAILED


def told(sentence: str, next_step: str) -> str:
    """How an error is told: what is wrong, and what to do next."""
    return f"error: {sentence}{'' if sentence.endswith(('.', '?', '!')) else '.'} Next: {next_step}"


def next_step(error: Exception, otherwise: str) -> str:
    """What to do after an error of this kind, where its own sentence may not say it; `otherwise`: of all others."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return "free some space and start the same line again"
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return "get the right to that path, or name another one"
    if isinstance(error, FileNotFoundError):
        return f"check that path; a relative one begins at {os.getcwd()}"
    if isinstance(error, (OSError, MemoryError)) or not isinstance(error, ValueError):
        return "when that is mended, start the same line again"
    return getattr(error, "next_step", otherwise)


def first_to_say(sentence: str) -> bool:
    """Whether no other process of torchrun has said the same in this attempt; the launcher's store remembers it.

    So what all processes find wrong is said once, and what one of them finds is said by that one.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist  # here: it takes a second, which a mistake of a process alone need not wait
    key = f"said_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}_{zlib.crc32(sentence.encode())}"
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=5))
        return store.add(key, 1) == 1
    except dist.DistError:                  # the launcher is gone: better twice than never
        return True


def sentence_of(error: Exception) -> str | None:
    """What to tell of an error that is not a fault of this program; None for one that is, and wants its traceback."""
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return one_sentence(error)
    words = str(error)
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
        first = words.strip().splitlines()[0] if words.strip() else "the machine has no more"
        return (f"not enough memory: {first} (a smaller trBatch with the same global_batch, "
                "activation_checkpointing=all, precision=bf16 or a smaller valBatch need less)")
    return None


def one_sentence(error: Exception) -> str:
    """The message of an error on one line; of the system's errors the file and the cause.

    A data loader's worker wraps the message in its traceback; there the sentence is the last line.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("Error: ", 1)[-1] if str(error).startswith("Caught ") else " ".join(lines)


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
