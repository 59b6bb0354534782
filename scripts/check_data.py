"""Checks data folders: python scripts/check_data.py ROOT [--dataset NYUD] [--split train] [--sheet sheet.png]

ROOT holds NYUDv2/, PASCALContext/ or cityscapes/, or is one of them, or has a dataset.yml (docs/own_data.md). Every
file of every split is read with the training loaders. The report says which known copy of a data set this is, what is
missing, unreadable, of another kind, range or geometry than it should be, listed twice or in both splits, and describes
every map: sizes, values, void, classes, and what the papers leave open (how wide boundary lines are, whether depth has
holes, whether normals have unit length). Exit status 1 if anything is wrong that a training would refuse. --sheet draws
samples with their labels laid over them; --fix-list writes split lists of the sound images into another folder.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from data.base import MultiTaskDataset
from data.check import repeated, survey
from data.datasets import DATASETS
from data.spec import DatasetSpec, find_folder
from data.splits import SplitList, SplitRule
from evaluation.boundary.pool import default_workers
from scripts.command_line import Command
from scripts.contact_sheet import contact_sheet
from scripts.data_report import MapReport, look, recognise
from utils.engine.data_choice import FILE, DataChoice
from utils.engine.tasks import label_rules

MAX_LISTED = 50
ENCODINGS = ("utf-8-sig", "cp1252")


class Lenient(MultiTaskDataset):
    """A data set that opens whatever is wrong with it, so that all of it can be listed."""

    def check_files(self) -> None:
        """Missing files are told with everything else."""

    def select_ids(self) -> list[str]:
        return self.ids


class SplitReport:
    """One split: read, described, judged."""

    def __init__(self, spec: DatasetSpec, root: str, split: str, tasks: Sequence[str] | None, limit: int | None,
                 workers: int):
        self.split, self.problems, self.notes, self.digests, self.sound = split, [], [], {}, []
        self.reports = {"image": MapReport()}
        self.dataset: Lenient | None = None
        try:
            self.dataset = dataset = Lenient(spec, root, split, label_rules(tasks or spec.tasks))
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
            return
        missing = dataset.missing_files()
        self.problems += [f"missing: {path}" for path in missing]
        self.reports |= {task: MapReport(spec.labels[task].classes) for task in dataset.labels}
        absent = set(missing)
        step = max(1, len(dataset.ids) // limit) if limit else 1
        chosen = [name for name in dataset.ids[::step]
                  if not any(path in absent for key in self.reports for path in dataset.paths(key, name))]
        found = survey(dataset, chosen, workers, look)
        for examined in tqdm(found, desc=split, total=len(chosen), leave=False, disable=not sys.stderr.isatty()):
            self.problems += examined.problems
            self.notes += examined.notes
            self.digests[examined.name] = examined.digest
            for key, facts in examined.seen.items():
                self.reports[key].facts.append(facts)
            if not examined.problems:
                self.sound.append(examined.name)
        print(f"{spec.name} {split}: {len(dataset.ids)} ids, {len(missing)} missing files, {len(chosen)} images "
              f"examined in {dataset.folder}")
        for key, report in self.reports.items():
            print("\n".join(report.lines(key)))


def check(root: Path, dataset: str | None, split: str | None, tasks: list[str] | None, limit: int | None, workers: int,
          sheet: Path | None, fix_list: Path | None) -> int:
    """0 if a training would take all data sets that were found, 1 with a list of problems otherwise."""
    problems, notes, opened = [], [], []
    for spec in found_specs(root, dataset):
        reports = [SplitReport(spec, str(root), name, tasks, limit, workers) for name in ([split] if split else
                                                                                          spec.splits)]
        sizes = {facts.size for report in reports for facts in report.reports["image"].facts}
        numbers = {report.split: len(report.dataset.ids) for report in reports if report.dataset}
        if not (split or limit) and numbers:
            print(f"{spec.name}: {recognise(spec, numbers, sizes)}")
        leaks, twins = repeated({report.split: report.digests for report in reports})
        problems += [problem for report in reports for problem in report.problems] + leaks
        notes += [note for report in reports for note in report.notes] + twins
        opened += [report.dataset for report in reports if report.dataset]
        for report in reports if fix_list else ():
            write_list(report, spec.splits[report.split], root, spec, fix_list)
    problems, notes = list(dict.fromkeys(problems)), list(dict.fromkeys(notes))
    for title, lines in (("note(s), which do no harm", notes), ("problem(s)", problems)):
        if lines:
            more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
            print(f"{len(lines)} {title}:", *lines[:MAX_LISTED], *more, sep="\n  ")
    if not problems:
        print("no problems found")
    if sheet is not None:
        print(f"{contact_sheet(opened, sheet, rows=4)} samples with their labels: {sheet}")
    return 1 if problems else 0


def found_specs(root: Path, dataset: str | None) -> list[DatasetSpec]:
    """The data sets whose folders are there, or the named one."""
    if dataset:
        return [DATASETS.load(dataset)]
    specs: dict[str, DatasetSpec] = {}                     # by folder, which may be read in several ways
    if (root / FILE).is_file():
        spec = DataChoice.from_yaml({"folder": str(root)}, "ROOT", lambda key: str(root / FILE)).spec
        specs[spec.folder] = spec
    for spec in map(DATASETS.load, DATASETS):
        try:
            folder = find_folder(root, spec)
        except FileNotFoundError:
            continue
        known = specs.setdefault(spec.folder, spec)
        more = [label for task, label in spec.labels.items() if task not in known.labels]
        if more and all((folder / pattern.partition("/")[0]).is_dir() for label in more for pattern in label.files):
            specs[spec.folder] = spec
    if not specs:
        folders = ", ".join(dict.fromkeys(f"{spec.folder}/" for spec in map(DATASETS.load, DATASETS)))
        raise FileNotFoundError(f"{root} holds none of {folders}, and no {FILE}; docs/training.md says where "
                                "to get them")
    return list(specs.values())


def write_list(report: SplitReport, rule: SplitRule, root: Path, spec: DatasetSpec, target: Path) -> None:
    """The sound images of a split, one id per line, in their order, as UTF-8; never over a list that is there."""
    if not isinstance(rule, SplitList):
        print(f"--fix-list: split {report.split!r} of {spec.name} is no list, its images are found by name")
        return
    path = target / Path(spec.folder).name / rule.file
    if path.exists():
        raise FileExistsError(f"{path} exists and is left alone; give --fix-list another folder")
    names = report.sound
    if report.dataset is None:                             # the list itself cannot be read: what can be saved of it
        names = repaired_ids(find_folder(root, spec) / rule.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    checked = "sound" if report.dataset else "repaired, run this check with it again"
    print(f"{path}: {len(names)} ids, {checked}")


def repaired_ids(path: Path) -> list[str]:
    """Ids of a list in another encoding, with invisible characters, repeated lines, or more columns (the first)."""
    content = path.read_bytes()
    for encoding in ("utf-16",) if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ENCODINGS:
        try:
            text = content.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        raise ValueError(f"{path} is no text in any of {', '.join(ENCODINGS)}")
    lines = ("".join(c for c in line if c.isprintable()).split() for line in re.split(r"\r\n|\r|\n", text))
    return list(dict.fromkeys(columns[0] for columns in lines if columns and ".." not in columns[0].split("/")))


main = Command(__doc__, check, {
    "root": dict(type=Path, help="holds NYUDv2/, PASCALContext/ or cityscapes/, or is one of them, or a dataset.yml"),
    "--dataset": dict(choices=list(DATASETS), help="default: all that are there"),
    "--split": dict(help="default: all splits"),
    "--tasks": dict(nargs="+", help="default: all tasks of the data set"),
    "--limit": dict(type=int, help="examine about this many images per split, evenly spaced"),
    "--workers": dict(type=int, default=default_workers(), help="processes"),
    "--sheet": dict(type=Path, metavar="PNG", help="write a picture of random samples with their labels"),
    "--fix-list": dict(type=Path, metavar="DIR", help="write split lists of the sound images into this folder"),
})

if __name__ == "__main__":
    sys.exit(main())
