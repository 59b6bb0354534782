"""The commands that README and the pages of docs/ print, as a shell reads them."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.shared import ROOT

PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", ROOT / "pretrained_ckpts" / "README.md",
         *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "bash", "sbatch", "source", "pip", "mkdocs", "node", "cd",
            "tensorboard")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:python|torchrun|bash|node) [^`]*(?:\.(?:py|sh|js)|-m )[^`]*)`")
# Every program is a function that writes down its words, at one go, as `source <(program)` runs two at a time; nothing
# else can be found.
STAND_INS = "".join(f'{name}() {{ local IFS=$\'\\x1f\'; set -- {name} "$@"; printf "%s\\x1f\\x1e" "$*" >> "$OUT"; }}\n'
                    for name in PROGRAMS)


def printed(page: Path) -> str:
    """All commands of a page: those in blocks of bash, and those in its sentences."""
    text = page.read_text(encoding="utf-8")
    blocks = [match[2] for match in FENCE.finditer(text) if match[1] == "bash"]
    spans = [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]
    return "\n".join([*blocks, *(span for span in spans if "..." not in span)])


def unmarked(page: Path) -> Iterator[str]:
    """Blocks that hold commands and do not say so."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if not language and block.lstrip().startswith(PROGRAMS):
            yield block


@cache
def commands() -> dict[tuple[str, ...], list[str]]:
    """The words of every command, once, with the pages that print it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for page in PAGES:
        for words in words_of(printed(page)):
            if len(words) > 1:                  # `torchrun` alone is a word of a sentence
                found.setdefault(plain(words), []).append(page.relative_to(ROOT).as_posix())
    return found


def words_of(script: str) -> list[tuple[str, ...]]:
    """What a shell would run, in order; ValueError for what it does not understand or find."""
    with tempfile.NamedTemporaryFile() as out:
        done = subprocess.run([shutil.which("bash"), "-c", f"PATH=\nOUT={out.name}\n{STAND_INS}\n{script}\nwait"],
                              capture_output=True, text=True, timeout=30)
        if done.returncode or done.stderr:
            raise ValueError(f"bash says: {done.stderr}")
        lines = out.read().decode().split("\x1e")[:-1]
    return [tuple(line.split("\x1f")[:-1]) for line in lines]


def plain(words: tuple[str, ...]) -> tuple[str, ...]:
    """`torchrun --nproc_per_node 8 main.py --run_mode train ...` is `python main.py ...`."""
    program = "python" if words[0] == ".venv/bin/python" else words[0]
    launched = program == "torchrun" or words[1:3] == ("-m", "torch.distributed.launch")
    start = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words)) if launched else 1
    rest = list(words[start:])
    if "train" in rest and rest[rest.index("train") - 1] == "--run_mode":
        del rest[rest.index("train") - 1:rest.index("train") + 1]
    return ("python" if launched else program, *rest)
