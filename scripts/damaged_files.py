"""Damages data folders in every way we know and asks check and training: python scripts/damaged_files.py [--rounds 10]

Every round takes each kind of damage once, on a random file of a small rendered data set. What cannot be trained on
must be named by `check_data.py` (exit status 1) and by `main.py --run_mode train` before its first step; what is only
strange must be read as what it says. Prints one line per kind and ends with 1 if one was missed.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from scripts import check_data
from scripts.command_line import Command
from scripts.damages import HANDLED, REFUSED, Form, Kind, change, pick
from scripts.example_data.write import write_example
from scripts.measuring import markdown
from utils.engine.build import build_split
from utils.engine.config import load_config
from utils.engine.data_check import require_sound
from utils.engine.tasks import label_rules

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "example"
EXPERIMENTS = {"NYUDv2": "bim_nyud.yml", "PASCALContext": "bim_pascal.yml"}


def checked(root: Path) -> tuple[int, str]:
    """Exit status of check_data.py and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = check_data.main([str(root), "--workers", "1"])
    return status, printed.getvalue()


def prepared(root: Path, layout: str) -> str:
    """The message with which a training on this layout ends before its network is built; empty where it goes on."""
    config = load_config(CONFIGS / EXPERIMENTS[layout], [f"db_root={root}", f"out_dir={root / 'runs'}", "nworkers=0",
                                                         "device=cpu", "image_size=[64, 64]", "tensorboard=false"])
    try:
        require_sound({"train": build_split(config, "train"), "val": build_split(config, "selects")}, workers=0)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def refused(source: Path, root: Path, kind: Kind, rng: np.random.Generator) -> str:
    """What went wrong with one damaged copy of `source`; empty where both named the file."""
    shutil.copytree(source, root)
    path = pick(root, kind.files, rng)
    kind.damage(path, rng)
    status, printed = checked(root)
    message, named = prepared(root, path.relative_to(root).parts[0]), kind.named or path.name
    path = path.relative_to(root)
    shutil.rmtree(root)
    if status == 1 and named in printed and named in message and "Traceback" not in printed:
        return ""
    return f"{path}: check_data {status}{' without its name' * (named not in printed)}; training: {message!r}"


def samples(root: Path) -> list[dict]:
    """All samples of both layouts."""
    sets = [MultiTaskDataset(spec, root, split, label_rules(spec.tasks)) for spec in map(DATASETS.load, DATASETS)
            if spec.folder in EXPERIMENTS for split in ("train", "val")]
    return [dataset[i] for dataset in sets for i in range(len(dataset))]


def misread(source: Path, root: Path, form: Form, rng: np.random.Generator) -> str:
    """What differs once a file of a copy of `source` is stored in another form; empty where nothing does."""
    shutil.copytree(source, root)
    path = pick(root, form.files, rng)
    if form.few:
        change(path, lambda a: a % form.few)
    before = samples(root)
    form.rewrite(path)
    status, printed = checked(root)
    after = samples(root)
    shutil.rmtree(root)
    same = all(np.array_equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a if key != "meta")
    return "" if same and status == 0 else f"{path}: check_data {status}, same values: {same}; {printed}"


def campaign(rounds: int, seed: int, only: str | None) -> int:
    """1 if anything was missed."""
    failures, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        source, root = Path(folder) / "source", Path(folder) / "damaged"
        os.environ["DATA_CHECK_CACHE"] = str(Path(folder) / "known")
        write_example(source, 3, 2, (48, 64), workers=1, progress=False, layouts=list(EXPERIMENTS))
        for title, kinds, judge in (("refused", REFUSED, refused), ("read as it is", HANDLED, misread)):
            for name, kind in kinds.items():
                if only and only not in name:
                    continue
                found = [judge(source, root, kind, np.random.default_rng((seed, i))) for i in range(rounds)]
                failures += [f"{name}: {failure}" for failure in found if failure]
                rows.append({"kind": name, "must be": title, "right": f"{sum(not f for f in found)} of {rounds}"})
    print(markdown(rows), *failures[:20], sep="\n")
    print(f"{len(rows) * rounds} files of {len(rows)} kinds, {len(failures)} missed or misread")
    return 1 if failures else 0


main = Command(__doc__, campaign, {
    "--rounds": dict(type=int, default=10, help="files of each kind"),
    "--seed": dict(type=int, default=0),
    "--only": dict(metavar="TEXT", help="only the kinds whose name contains this"),
})

if __name__ == "__main__":
    sys.exit(main())
