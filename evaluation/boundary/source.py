"""Which images of a split the boundary score covers, and where their ground truth lies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation.boundary.settings import BoundaryTruth
from evaluation.evaluator import Split

FAST_STRIDE, FAST_LEAST = 8, 32      # the fast score takes every 8th image, or as many as make at least 32


@dataclass(frozen=True)
class TruthSource:
    """Ground truth of a split. `names`: the images that are scored, None for every one; `covered` says it in words."""

    folder: Path
    truth: BoundaryTruth
    num_images: int
    names: frozenset[str] | None = None
    covered: str = "all"
    truth_files: Callable[[str], tuple[Path, ...]] | None = None

    def files(self, name: str) -> tuple[Path, ...]:
        """Files of the image with this id."""
        if self.truth_files is not None:
            return self.truth_files(name)
        return tuple(self.folder / pattern.format(id=name) for pattern in self.truth.files)


def truth_source(split: Split, images: str, fast: bool = False) -> TruthSource:
    """Ground truth of a split. `images`: `all`, `test_new` (the data set's list of that name) or `auto`.

    `auto` takes the list where the data set has one and it lies in the folder. A data set without such a list is
    always scored as a whole; asking for a list that is not there is a FileNotFoundError that says where it belongs.
    `fast` takes every eighth of them, always the same ones.
    """
    truth = split.boundary
    if truth is None:
        raise ValueError(f"{split.dataset} has no ground truth for the boundary score; set boundary_infer=off")
    names, covered = None, f"all of {split.name}"
    if not split.complete:
        names, covered = frozenset(split.ids), f"the {len(split.ids)} images of {split.name} with labels"
    if truth.published_list is not None and images != "all":
        path = split.folder / truth.published_list
        if path.is_file():
            listed = frozenset(path.read_text(encoding="utf-8-sig").split())
            covered = f"the list {path.name}"
            names = listed & frozenset(split.ids)
            if split.complete and (absent := listed - names):
                raise ValueError(f"{path} lists {min(absent)}, which is not in the split {split.name!r}")
        elif images == "auto":
            covered += f"; published scores cover the list {path.name}, which is not at {path}"
        else:
            raise FileNotFoundError(f"list of images not found: {path} (SEISM's gt_sets/PASCALContext/{path.name}; "
                                    "copy it there, or set boundary_kwargs.images=all)")
    if fast:
        chosen = [name for name in split.ids if names is None or name in names]
        stride = max(1, min(FAST_STRIDE, len(chosen) // FAST_LEAST))
        names = frozenset(chosen[::stride])
        covered = f"a sample of {len(names)} from {covered}"
    return TruthSource(split.folder, truth, len(names or split.ids), names, covered, split.truth_files)
