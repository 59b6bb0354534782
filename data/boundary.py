"""Which images of a data set the boundary score covers, and where their ground truth lies."""

from data.base import MultiTaskDataset
from evaluation.boundary import TruthSource

FAST_STRIDE, FAST_LEAST = 8, 32      # the fast score takes every 8th image, or as many as make at least 32


def truth_source(dataset: MultiTaskDataset, images: str, fast: bool = False) -> TruthSource:
    """Ground truth of a split. `images`: `all`, `test_new` (the data set's list of that name) or `auto`.

    `auto` takes the list where the data set has one and it lies in the folder. A data set without such a list is
    always scored as a whole; asking for a list that is not there is a FileNotFoundError that says where it belongs.
    `fast` takes every eighth of them, always the same ones.
    """
    spec = dataset.spec
    if dataset.boundary_source is None:
        raise ValueError(f"{spec.name} has no ground truth for the boundary score; set boundary_infer=off")
    names, covered = None, f"all of {dataset.split}"
    if spec.boundary_list is not None and images != "all":
        path = dataset.folder / spec.split_file.format(split=spec.boundary_list)
        if path.is_file():
            names = frozenset(path.read_text(encoding="utf-8").split())
            covered = f"the list {path.name}"
            if absent := names - set(dataset.ids):
                raise ValueError(f"{path} lists {min(absent)}, which is not in the split {dataset.split!r}")
        elif images == "auto":
            covered += f"; published scores cover the list {path.name}, which is not at {path}"
        else:
            raise FileNotFoundError(f"list of images not found: {path} (SEISM's gt_sets/PASCALContext/{path.name}; "
                                    "copy it there, or set boundary_kwargs.images=all)")
    if fast:
        chosen = [name for name in dataset.ids if names is None or name in names]
        stride = max(1, min(FAST_STRIDE, len(chosen) // FAST_LEAST))
        names = frozenset(chosen[::stride])
        covered = f"a sample of {len(names)} from {covered}"
    return TruthSource(dataset.boundary_files, dataset.boundary_source.read, spec.boundary_kind,
                       spec.boundary_max_dist, len(names or dataset.ids), names, covered)
