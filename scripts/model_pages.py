"""The parts of the models' pages that are asked of the program: options, size and cost.

    python scripts/model_pages.py [NAME ...] [--write]

Options are those of the decoder's options class, in the words of `python main.py --help_config`. Parameters and
multiply-adds are counted as `scripts/benchmark.py --count_only` counts them, for every experiment of the model in
configs/. --write puts them into docs/models/NAME.md and one line of each model into docs/models.md.
"""

import inspect
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.decoders import DECODERS
from models.decoders.options import DecoderOptions
from scripts.benchmark import compared
from scripts.command_line import Command
from scripts.docs_site.model_figures import FIGURES
from scripts.docs_site.parts import with_part
from scripts.measuring import Row, markdown
from utils.engine.config import load_config
from utils.engine.help_config import options

ROOT = Path(__file__).resolve().parents[1]
DOCS, FOLDERS = ROOT / "docs", ("configs", "configs/backbones", "configs/baselines")


@cache
def experiments() -> dict[str, list[str]]:
    """The experiment files of every model that train several tasks, the main ones first."""
    found: dict[str, list[str]] = {name: [] for name in DECODERS}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.yml")):
            config = load_config(path)
            if len(config.tasks) > 1:
                found[config.model].append(path.relative_to(ROOT).as_posix())
    return found


def options_part(name: str) -> str:
    """What the docstring of a decoder's options says of all of them, and a row for each."""
    given = options(DECODERS, name)
    names, paragraphs, notes = [option.name for option in given], [], {}
    for cls in reversed(DECODERS.load(name).Config.__mro__):
        if issubclass(cls, DecoderOptions) and cls is not DecoderOptions:
            paragraphs, own = _docstring(cls, names)
            notes |= own
    rows: list[Row] = [{"`model_kwargs`": f"`{option.name}`", "may be": _cell(option.values),
                        "default": f"`{option.default}`" if option.default != "empty" else "empty",
                        "meaning": _cell(" ".join(filter(None, (option.comment, notes.get(option.name, "")))))}
                       for option in given]
    return "\n\n".join([*paragraphs, markdown(rows)]) + "\n"


def _docstring(cls: type, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Paragraphs about all options, and what is said of single ones (`name: words`, over as many lines as it takes)."""
    text = inspect.cleandoc(cls.__doc__ or "")
    begins = re.compile(rf"^(?=(?:{'|'.join(names)}): )", re.MULTILINE)
    paragraphs, notes = [], {}
    for paragraph in text.split("\n\n"):
        general, *single = begins.split(paragraph)
        paragraphs += [" ".join(general.split())] if general.strip() else []
        for part in single:
            name, _, words = part.partition(": ")
            notes[name] = " ".join(words.split())
    paragraphs = [paragraph.removeprefix("Options of the decoder.").strip() for paragraph in paragraphs]
    return [*filter(None, paragraphs)], notes


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def cost_part(files: Sequence[str]) -> str:
    """Parameters and multiply-adds of experiments, beside the original's."""
    return compared([str(ROOT / file) for file in files], [], repeats=0, count_only=True) + "\n"


def model_pages(names: list[str], write: bool) -> None:
    """Prints the parts, or puts them into the pages."""
    for name in names or FIGURES:
        parts = {"options": options_part(name), "cost": cost_part(experiments()[name])}
        if not write:
            print("\n".join((f"{name}\n", *parts.values())))
            continue
        page = DOCS / "models" / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        for part, words in parts.items():
            text = with_part(text, part, words)
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
    if write and not names:
        page = DOCS / "models.md"
        parts = cost_part([figure.experiment for figure in FIGURES.values()])
        page.write_text(with_part(page.read_text(encoding="utf-8"), "cost", parts), encoding="utf-8")


main = Command(__doc__, model_pages, {
    "names": dict(nargs="*", choices=[[], *FIGURES], metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all"),
    "--write": dict(action="store_true", help="put them into the pages"),
})

if __name__ == "__main__":
    sys.exit(main())
