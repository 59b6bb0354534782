"""Damaged checkpoints: each must be refused in one sentence, or be passed over for the one before it; none may pass.

    python scripts/faults/damage.py --files 400

A run of a few updates leaves last.pt, previous.pt, best.pt and a manifest. Copies of its folder are damaged: single
bits, zeroed pages, truncation, files swapped with each other or with those of another run, files that are gone, a
damaged manifest, several of these at once. Then the run is resumed: it must come to the state that it had at the step
it says, and that must be the newest one that is left whole. Exit code 1 where one is silently wrong, a traceback, or
goes back further than it had to.
"""

import hashlib
import logging
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scripts.command_line import Command
from scripts.faults.runs import Stage, checkpoint
from utils.engine.checkpoint import read_checkpoint
from utils.engine.manifest import MANIFEST, newest_whole, take_over

NAMES = ("last.pt", "previous.pt", "best.pt")
PAGE, SEED = 4096, 0


def flip(path: Path, rng: random.Random, other: Path) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: Path, rng: random.Random, other: Path) -> None:
    """A page, as after a crash of the machine."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(0, len(content), PAGE)
    content[start:start + PAGE] = bytes(len(content[start:start + PAGE]))
    path.write_bytes(content)


def cut(path: Path, rng: random.Random, other: Path) -> None:
    """Truncated, anywhere."""
    path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


def swap(path: Path, rng: random.Random, other: Path) -> None:
    """The same name of another run of the same experiment."""
    shutil.copy(other / path.name, path)


def remove(path: Path, rng: random.Random, other: Path) -> None:
    """Gone."""
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random, Path], None], ...] = (flip, flip, zero, cut, swap, remove)


def damaged(folder: Path, rng: random.Random, other: Path) -> list[str]:
    """Damages one file or several of a folder; what was done."""
    done = []
    for name in rng.sample(NAMES, rng.choice((1, 1, 2, 3))):
        path, damage = folder / name, rng.choice(DAMAGES)
        path.write_bytes(content := path.read_bytes())           # best.pt may be another name of the same file
        shutil.copy(path, folder / "copy")
        path.unlink()
        (folder / "copy").rename(path)
        damage(path, rng, other)
        if not path.exists() or path.read_bytes() != content:    # zeros over zeros change nothing
            done.append(f"{damage.__name__} {name}")
    if rng.random() < 0.15:
        flip(folder / MANIFEST, rng, other)
        done.append(f"flip {MANIFEST}")
    return done


def state_sum(state: dict) -> str:
    """A sum over all that a checkpoint holds."""
    sha256 = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sha256.update(value.numpy().tobytes())
        elif isinstance(value, (dict, list, tuple)):
            for entry in value.items() if isinstance(value, dict) else value:
                add(entry)
        else:
            sha256.update(repr(value).encode())

    add(state)
    return sha256.hexdigest()


def judge(folder: Path, true: dict[int, list[str]], whole: list[int], manifest_whole: bool) -> str:
    """What resuming makes of a damaged folder: "resumed", "went back", "refused", or what is wrong."""
    try:
        path = newest_whole(folder)
        if path is None:
            return "refused" if not whole else "wrong: nothing found"
        state = read_checkpoint(path)
        if state["config"]["seed"] != SEED and not manifest_whole:
            return "refused"                # by `restore`: only a manifest tells runs of one experiment apart
        take_over(folder, path)
    except ValueError as error:
        fair = not whole and "\n" not in str(error)
        return "refused" if fair else f"wrong: refused though {whole} are whole: {error}"
    except Exception:
        return f"traceback: {traceback.format_exc()}"
    step = state["step"]
    if state_sum(state) not in true[step]:
        return f"silently wrong at step {step}"
    if whole and step < max(whole):
        return f"wrong: went back to step {step}, step {max(whole)} is whole"
    return "resumed" if step == max(true) else "went back"


def campaign(files: int, seed: int) -> int:
    """Prints what became of the damaged folders."""
    rng, counts, wrong = random.Random(seed), Counter(), []
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as name:
            stage = Stage(Path(name))
            keys = {"max_iter": 9, "val_interval": 4, "nworkers": 0, "checkpoint_interval": 0}
            for run in ("run", "other"):
                done = stage.start(stage.experiment(run, **keys, seed=SEED + (run == "other")))
                if not done.wait(300) or set(done.codes.values()) != {0}:
                    raise ValueError(f"the run failed: {done.text()[-2000:]}")
            original, other = stage.run_dir("run"), stage.run_dir("other")
            true: dict[int, list[str]] = {}
            for checkpoint_name in NAMES:
                state = read_checkpoint(original / checkpoint_name)
                true.setdefault(state["step"], []).append(state_sum(state))
            while sum(counts.values()) < files:
                folder = stage.folder / "damaged"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(original, folder)
                what = damaged(folder, rng, other)
                if not what:
                    continue
                hit = {text.split()[1] for text in what}
                whole = [checkpoint(original, n)["step"] for n in NAMES if n not in hit]
                outcome = judge(folder, true, whole, MANIFEST not in hit)
                counts[outcome.partition(":")[0]] += 1
                if outcome not in ("resumed", "went back", "refused"):
                    wrong.append(f"{what}: {outcome}")
    finally:
        logging.disable(logging.NOTSET)
    for words in wrong:
        print(words)
    print(f"{files} damaged folders: {dict(counts)}")
    return int(bool(wrong))


main = Command(__doc__, campaign, {
    "--files": dict(type=int, default=400, help="how many folders"),
    "--seed": dict(type=int, default=0, help="of the damage"),
})

if __name__ == "__main__":
    sys.exit(main())
