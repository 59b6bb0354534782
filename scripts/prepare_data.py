"""Builds the data folders from what their authors publish: python scripts/prepare_data.py NYUD --source FILES --out DIR

--source takes archives (.zip, .tar, .tar.gz, .tgz), files, or folders of either; `prepare_data.py list` says which,
where from and under which terms. Files that are there already are kept and never written over, so that a run that was
interrupted goes on where it stopped. What the layout still lacks is said at the end; `check_data.py DIR` then reads it.
"""

import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from data.base import Files
from data.datasets import DATASETS
from data.spec import DatasetSpec
from scripts.command_line import Command
from scripts.nyu_labelled import CONTAINER, once, write_frames
from utils.options import nearest

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
VOC_ID = r"(?P<id>\d{4}_\d{6})"


class Recipe(NamedTuple):
    """How a data set is made. sources: what to get, from where and on which terms, and what it gives or lacks.

    members: pattern of a file in a source -> its place in the layout. container: what else makes files of the sources.
    """

    sources: tuple[str, ...]
    members: dict[str, str]
    container: Callable[[Sequence[Path], Path], int] | None = None


RECIPES = {
    "NYUD": Recipe((
        "nyu_depth_v2_labeled.mat and splits.mat: NYU Depth Dataset V2, cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html "
        "(no licence stated, cite Silberman et al., ECCV 2012); images, depth, regions",
        "classMapping40.mat: Gupta et al., CVPR 2013, in their code for RGB-D scenes (BSD); the 40 classes",
        "These three lack the normals and boundaries of published results: scripts/nyu_labelled.py computes others.",
        "Or NYUDv2.tar.gz, the archive linked by InvPT, TaskPrompter, MLoRE and MTMamba (terms as above); everything",
    ), {r"NYUDv2/(?P<id>(images|segmentation|depth|normals|edge|gt_sets)/[^/]+)$": "{id}"}, write_frames),
    "PASCALContext": Recipe((
        "VOCtrainval_03-May-2010.tar: PASCAL VOC 2010, host.robots.ox.ac.uk/pascal/VOC (photographs: Flickr's terms); "
        "images, segmentation of some of them",
        "trainval.tar.gz: PASCAL-Context, cs.stanford.edu/~roozbeh/pascal-context (cite Mottaghi et al., CVPR 2014); "
        "the 459 classes, from which boundaries come",
        "trainval.tar.gz of PASCAL-Part, roozbehm.info/pascal-parts (cite Chen et al., CVPR 2014); body parts",
        "PASCALContext.tar.gz, linked by InvPT and its successors (or PASCAL_MT.tgz): split lists, and the distilled "
        "saliency, normals and segmentation, which exist nowhere else",
    ), {
        rf"JPEGImages/{VOC_ID}\.jpg$": "JPEGImages/{id}.jpg",
        rf"(semseg/VOC12|SegmentationClass(Aug)?)/{VOC_ID}\.png$": "semseg/VOC12/{id}.png",
        rf"semseg/pascal-context/{VOC_ID}\.png$": "semseg/pascal-context/{id}.png",
        rf"(Annotations_Part|human_parts)/{VOC_ID}\.mat$": "human_parts/{id}.mat",
        rf"trainval/{VOC_ID}\.mat$": "pascal-context/trainval/{id}.mat",
        rf"normals_distill/{VOC_ID}\.png$": "normals_distill/{id}.png",
        rf"sal_distill/{VOC_ID}\.png$": "sal_distill/{id}.png",
        r"ImageSets/Context/(?P<id>(train|val)\.txt)$": "ImageSets/Context/{id}",
    }),
    "Cityscapes": Recipe((
        "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip, disparity_trainvaltest.zip: cityscapes-dataset.com, "
        "after registration (non-commercial use, see its terms); everything",
        "gtBbox3d_trainvaltest.zip, from there too: vehicles in space, for Cityscapes3D",
    ), {
        r"(?P<id>leftImg8bit/(train|val)/[^/]+/[^/]+_leftImg8bit\.png)$": "{id}",
        r"(?P<id>gtFine/(train|val)/[^/]+/[^/]+_gtFine_labelIds\.png)$": "{id}",
        r"(?P<id>disparity/(train|val)/[^/]+/[^/]+_disparity\.png)$": "{id}",
        r"(?P<id>gtBbox3d/(train|val)/[^/]+/[^/]+_gtBbox3d\.json)$": "{id}",
    }),
}


def prepare(dataset: str, source: Sequence[Path], out: Path) -> int:
    """Fills the data set's folder below `out`; 0 where it is complete then."""
    if dataset == "list":
        for name, recipe in RECIPES.items():
            print(f"{name}:", *recipe.sources, sep="\n  ")
        return 0
    if dataset not in RECIPES:
        raise ValueError(f"unknown data set {dataset!r}; {nearest(dataset, RECIPES)}")
    recipe, spec = RECIPES[dataset], DATASETS.load(dataset)
    files = list(sources(source))
    folder = out.expanduser() / spec.folder
    used = {path: unpack(path, recipe, folder) for path in files}
    if recipe.container is not None:
        used[Path(CONTAINER)] = recipe.container(files, folder)
    for path, (new, kept) in used.items():
        if new or kept:
            print(f"{path.name}: {new} files written, {kept} were there")
    if not any(new or kept for new, kept in used.values()):
        raise ValueError(f"nothing in {', '.join(map(str, source))} belongs to {dataset}; these do: "
                         f"{' '.join(recipe.sources)}")
    return report(spec, folder)


def sources(given: Sequence[Path]) -> Iterator[Path]:
    """The files, and of folders everything in them."""
    for path in given:
        path = path.expanduser()
        if not path.exists():
            raise FileNotFoundError(f"source not found: {path}")
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def unpack(path: Path, recipe: Recipe, folder: Path) -> tuple[int, int]:
    """Puts what belongs to the data set into its folder: (files that are new, files that were there)."""
    counts = [0, 0]
    if not path.name.lower().endswith(ARCHIVES):
        if (place := place_of(path.as_posix(), recipe)) is not None:
            counts[not once(folder / place, lambda target: target.write_bytes(path.read_bytes()))] += 1
        return counts[0], counts[1]
    try:
        for name, read in tqdm(members(path), unit="file", desc=path.name, disable=None):
            if (place := place_of(name, recipe)) is not None:
                counts[not once(folder / place, lambda target, read=read: target.write_bytes(read()))] += 1
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or not all of it is there ({error}); get it again, what was unpacked stays"
                         ) from error
    return counts[0], counts[1]


def members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, function that reads it) of every file of an archive; a zip checks each file's checksum."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: archive.read(info)
        return
    with tarfile.open(path, "r|*") as archive:             # as a stream: an index would read all of it twice
        for info in archive:
            if info.isfile():
                yield info.name, lambda info=info: _content(archive.extractfile(info))


def _content(file: IO[bytes] | None) -> bytes:
    assert file is not None, "a regular file has contents"
    return file.read()


def place_of(name: str, recipe: Recipe) -> str | None:
    """Where a file of a source goes; None: it is not needed. A name never leads out of the folder."""
    for pattern, place in recipe.members.items():
        if (found := re.search(pattern, name)) and ".." not in found["id"].split("/"):
            return place.format(id=found["id"])
    return None


def report(spec: DatasetSpec, folder: Path) -> int:
    """Prints what the layout has and lacks by split; 1 where anything is missing."""
    files, complete = Files(folder), True
    for split, rule in spec.splits.items():
        try:
            ids = rule.ids(folder, spec.image.files[0])
        except (ValueError, OSError) as error:
            print(f"{split}: {error}")
            complete = False
            continue
        for key, source in {"image": spec.image, **spec.labels}.items():
            lacking = sum(any(files.find(pattern, name) is None for pattern in source.files) for name in ids)
            if lacking:
                print(f"{split}: {lacking} of {len(ids)} images lack {key} ({', '.join(source.files)})")
                complete = False
    print(f"{folder} is complete; read all of it with scripts/check_data.py {folder.parent}" if complete else
          f"{folder} is not complete: what it lacks is not in these sources (`prepare_data.py list`); tasks whose "
          "labels are there can be trained")
    return 0 if complete else 1


main = Command(__doc__, prepare, {
    "dataset": dict(help=f"{', '.join(RECIPES)}, or list: what to get, where, on which terms"),
    "--source": dict(type=Path, nargs="+", default=(), metavar="FILE", help="archives, files, folders of them"),
    "--out": dict(type=Path, default=Path("datasets"), help="db_root: the folder that holds the data sets"),
})

if __name__ == "__main__":
    sys.exit(main())
