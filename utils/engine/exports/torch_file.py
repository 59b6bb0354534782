"""torch.export: a graph that `torch.export.load` reads anywhere, without this program."""

from pathlib import Path

import torch
from torch import Tensor

from utils.engine.exports.job import Job, as_json, check, deployed, traced


def export_torch(job: Job) -> list[Path]:
    """Writes model.pt2; what it is stands in its extra file about.json."""
    if job.open_size:
        raise ValueError(f"export: --dynamic {job.dynamic} leaves the image size open, which only --format onnx can: "
                         "PyTorch's file refuses many sizes other than the traced one; --dynamic batch is possible")
    network, chosen = deployed(job)
    path = job.folder / "model.pt2"
    job.folder.mkdir(parents=True, exist_ok=True)
    about = as_json(job.about(chosen, network.multiple))
    torch.export.save(traced(job, network), path, extra_files={"about.json": about})
    loaded = torch.export.load(path).module()

    def run(image: Tensor) -> dict[str, Tensor]:
        return dict(zip(network.names, loaded(image), strict=True))

    check(job, network, run, [path])
    return [path]
