"""ONNX: a file for onnxruntime and the like. Scans are ONNX's own loop of that name.

The library's optimiser is left out: it takes products of several tasks for ones that broadcast where a map happens to
have as many columns as there are tasks (onnxscript 0.7.2). onnxruntime optimises what it loads by itself.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from utils.engine.exports.job import INPUT, Job, as_json, check, deployed, first_line, library, traced

LARGEST = 1.5e9             # bytes of weights in one file; the format ends at 2 GB
METADATA = "mtdp"


def export_onnx(job: Job) -> list[Path]:
    """Writes model.onnx (and model.onnx.data where the weights are large), which says itself what it is."""
    with library("onnx", "onnx onnxscript onnxruntime"):
        import onnxruntime
        import onnxscript  # noqa: F401
    for talkative in ("onnx_ir", "onnxscript"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    network, chosen = deployed(job)
    graph = traced(job, network)
    path = job.folder / "model.onnx"
    job.folder.mkdir(parents=True, exist_ok=True)
    large = sum(value.numel() * value.element_size() for value in network.state_dict().values()) > LARGEST
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")                 # of deprecations inside PyTorch
            program = torch.onnx.export(graph, dynamo=True, verbose=False, optimize=False, input_names=[INPUT],
                                        output_names=network.names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"export: model '{job.config.model}' cannot be written as ONNX: "
                         f"{first_line(error)}") from error
    program.model.metadata_props[METADATA] = as_json(job.about(chosen, network.multiple))
    program.save(str(path), external_data=large)
    wrote = [path, *([Path(f"{path}.data")] if large else [])]
    reasons = onnxruntime.capi.onnxruntime_pybind11_state
    refusals = tuple(kind for kind in vars(reasons).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        check(job, network, _runner(path, network.names), wrote)
    except refusals as error:
        for file in wrote:
            file.unlink()
        raise ValueError(f"export: onnxruntime {onnxruntime.__version__} cannot run what PyTorch wrote of model "
                         f"'{job.config.model}'; the file(s) are removed again: {first_line(error)}") from error
    return wrote


def _runner(path: Path, names: list[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3                          # errors: constants that it does not fold are none
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {INPUT: image.numpy()})), strict=True))
    return run
