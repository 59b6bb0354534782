"""What the scripts share: a command line that is a table of arguments, and an end in one sentence after a mistake."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from utils.exits import next_step, sentence_of, told


class Command:
    """A script's main function: the exit status of `work`, called with the arguments by name; 1 after an error.

    help: the script's docstring. arguments: flag -> options of argparse's add_argument; they may stand in any order.
    """

    def __init__(self, help: str | None, work: Callable[..., int | None], arguments: Mapping[str, Mapping]):
        self.work = work
        self.parser = argparse.ArgumentParser(description=help, formatter_class=argparse.RawDescriptionHelpFormatter)
        for flag, options in arguments.items():
            self.parser.add_argument(flag, **options)

    def __call__(self, given: Sequence[str] | None = None) -> int:
        args = self.parser.parse_intermixed_args(given)
        try:
            return self.work(**vars(args)) or 0
        except Exception as error:
            if (sentence := sentence_of(error)) is None:
                raise
            print(told(sentence, next_step(error, "change that; --help lists the arguments")), file=sys.stderr)
            return 1
