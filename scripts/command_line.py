"""What the scripts share: a command line that shows the script's docstring and ends a mistake in one sentence."""

import argparse
import sys
from collections.abc import Callable, Sequence

from utils.logging import one_sentence


class Command(argparse.ArgumentParser):
    """Arguments are added as to any parser; they may stand in any order."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def run(self, work: Callable[[argparse.Namespace], int | None], arguments: Sequence[str] | None = None) -> int:
        """The exit status: what work(args) returns, None counts as 0; 1 after a ValueError or OSError, which is told."""
        args = self.parse_intermixed_args(arguments)
        try:
            return work(args) or 0
        except (ValueError, OSError) as error:
            print(f"error: {one_sentence(error)}", file=sys.stderr)
            return 1
