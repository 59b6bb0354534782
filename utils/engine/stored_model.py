"""Which checkpoint is meant, and what the configuration that it holds becomes on this machine."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from models.ops import SCAN_BACKENDS
from models.ops.scan_choice import ScanNeeds
from utils.distributed import pick_device
from utils.engine.checkpoint import OF_A_RUN, SUFFIXES, read_checkpoint
from utils.engine.config import Config, config_from_dict

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OF_THE_HUB = ("*.pt", "*.pth", "*.tar", "*.safetensors", "config.yaml")


def find_checkpoint(source: str | Path) -> Path:
    """The file that is meant by a checkpoint, the folder of a run, or the name of a model on the Hugging Face Hub.

    Of a folder: best.pt, else last.pt, else its only checkpoint. OWNER/NAME that is no path here is fetched from the
    hub (once; then its copy is taken). FileNotFoundError and ValueError say what was found.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.exists() or not HUB_ID.fullmatch(str(source)) or path.suffix in SUFFIXES or path.parent.exists():
        return path                              # where it is missing, reading says what the folder has
    from huggingface_hub import snapshot_download  # here: it takes a while, and paths need none of it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return _of_folder(Path(snapshot_download(str(source), allow_patterns=list(OF_THE_HUB))))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source} is no file or folder here, and the Hugging Face Hub gives no model of that "
                                f"name: {str(error).splitlines()[0]}") from error


def _of_folder(folder: Path) -> Path:
    for name in OF_A_RUN:
        if (folder / name).is_file():
            return folder / name
    found = sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES)
    if len(found) == 1:
        return found[0]
    names = ", ".join(entry.name for entry in found) or "no checkpoint"
    raise FileNotFoundError(f"{folder} holds {names}; a run has {' or '.join(OF_A_RUN)}: name the file that you mean")


def own_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a checkpoint holds, or config.yaml beside it, with `key=value` overrides.

    Its device and its scan backend are those of another machine: what cannot be had here becomes auto, with a line in
    the log, unless an override names it. ValueError where there is no configuration.
    """
    values = read_checkpoint(path).get("config")
    beside = path.parent / "config.yaml"
    if values is None and beside.is_file():
        values = yaml.safe_load(beside.read_text(encoding="utf-8"))
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} does not hold its configuration; name it with --config_exp (in Python: config=...)")
    asked = {override.partition("=")[0] for override in overrides}
    return config_from_dict(_as_can_be_had(dict(values), asked, overrides), str(path), overrides)


def _as_can_be_had(values: dict[str, Any], asked: set[str], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with device and scan backend auto where this machine has not those, unless they were `asked` for."""
    if "device" not in asked and values.get("device") == "cuda" and not torch.cuda.is_available():
        logger.info("device: the checkpoint's cuda is not to be had here; auto takes its place")
        values["device"] = "auto"
    backend = values.get("scan_backend", "auto")
    if "scan_backend" in asked or backend == "auto" or backend not in SCAN_BACKENDS:
        return values
    wanted = next((o.partition("=")[2] for o in overrides if o.startswith("device=")), values.get("device", "auto"))
    device = pick_device(wanted).type
    if refusal := SCAN_BACKENDS.load(backend).refusal(ScanNeeds(device, torch.float32, 1, False)):
        logger.info("scan_backend: the checkpoint's %s cannot run here (%s); auto takes its place", backend, refusal)
        values["scan_backend"] = "auto"
    return values
