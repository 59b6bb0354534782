"""Weights on disk: run checkpoints going out and coming back (published backbones: `utils.engine.pretrained`).

Two habits shape this file. Loading never skips silently: each load logs one line of counts, and anything that
would leave a layer at its random values is an error with names. Saving never harms what is there: a file is
complete under its final name or it is not there at all. Every read uses `weights_only=True`, so a file cannot
run code.
"""

import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models.released import RELEASED, describe, recognise, tasks_in
from utils.durable import atomic_path
from utils.engine.tasks import tasks_named
from utils.seals import check_whole, save_sealed
from utils.sharded import parted_like

OF_A_RUN = ("best.pt", "last.pt")       # which checkpoint of a run is meant: the first of these that is there
SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors", ".npz")
ABOUT = "mtdp"              # in the header of a safetensors file: JSON with "config" and "selection"
PLAIN_TYPES = (int, float, str, bool, type(None), torch.Size)
# Files of Lightning 1.x name a callback by its class; an empty class stands for it, so none of its code is run.
LIGHTNING_CLASSES = [(type("Unread", (), {}), "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]

logger = logging.getLogger(__name__)


# ------------------------------------------------------------ run checkpoints


def save_checkpoint(path: str | Path, state: Mapping) -> None:
    """Writes a run checkpoint, all of it or nothing.

    `state` holds "model" (a state dict) and what else resuming needs: "ema", "optimizer", "scheduler",
    "scaler", "rng", "step", "epoch", "config", "metrics", "git". Only tensors and plain Python values, so
    that `weights_only=True` reads it back; anything else is a TypeError that names the entry.
    """
    check_plain(state, "state")
    with atomic_path(path) as temporary:
        save_sealed(temporary, state, state.get("step", 0))


def read_checkpoint(path: str | Path) -> dict:
    """Reads a run checkpoint to the CPU: a dict whose "model" is a flat state dict without `module.` prefix.

    Files of other training code are accepted: weights under "model" or "state_dict", or nothing but weights.
    """
    path = Path(path)
    content = read_file(path)
    model = find_weights(content, path)
    is_wrapper = not all(isinstance(value, Tensor) for value in content.values())
    return {**(content if is_wrapper else {}), "model": model}


def weights_of(checkpoint: Mapping, ema: bool = True) -> dict[str, Tensor]:
    """The state dict of the model in a checkpoint; with `ema` that of its moving average, where it has one."""
    state = (checkpoint.get("ema") if ema else None) or checkpoint["model"]
    return strip_wrappers({key: value for key, value in state.items() if key != "n_averaged"})


def load_model(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path,
               file_config: Mapping | None = None, yaml_config: Mapping | None = None) -> None:
    """Strict load that logs its counts; a state dict of another model is a ValueError that says which.

    A checkpoint that the authors of a published system released is recognised and converted.

    Args:
        path: where the weights come from, for the message.
        file_config, yaml_config: configuration stored in the file and the one of this run, if known; the
            message compares their model, backbone and tasks.
    """
    state, held, ignored = strip_wrappers(state_dict), _describe(file_config), ""
    if released := recognise(state):
        held = f"the released {released} ({describe(state)})"
        state, dead = convert_released(state)
        ignored = f" / ignored {len(dead)} without effect in {held}: {', '.join(dead) or 'none'}"
    own = model.state_dict()
    missing, unexpected, mismatched = compare_states(own, state)
    if missing or unexpected or mismatched:
        raise ValueError(f"{path} holds {held} but the configuration asks for {_describe(yaml_config)}: "
                         + differences(missing, unexpected, mismatched))
    model.load_state_dict({key: parted_like(tensor, own[key]) for key, tensor in state.items()})
    logger.info("%s: loaded %d / missing 0 / unexpected 0%s", path, len(own), ignored)


def convert_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A recognised state dict under our keys, and the keys it loses: layers that no output depends on."""
    kind = RELEASED[recognise(state)]
    dead = kind.dead_keys(state)
    return (kind.convert(state, tuple(tasks_named(tasks_in(state)))),
            [key for key in state if kind.is_dead(key) or key in dead])


# ------------------------------------------------------------ file reading


def read_file(path: Path) -> Any:
    """Content of a .safetensors or torch file; one sentence for a missing, truncated, damaged or foreign file."""
    require_file(path)
    check_whole(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals(LIGHTNING_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error):
            raise ValueError(damaged(path)) from error
        raise ValueError(f"{path} holds Python objects besides tensors and is not read for safety; if you "
                         "trust it, save its weights alone: torch.save({'model': torch.load(path, "
                         "weights_only=False)['model']}, new_path)") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(damaged(path)) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors; in a file of ours together with what its header says of them."""
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get(ABOUT)
    return load_file(path) if about is None else {"model": load_file(path), **json.loads(about)}


def find_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The flat state dict in a file's content, out of its "model" or "state_dict", without `module.`."""
    if not isinstance(content, Mapping):
        content = {f"a {type(content).__name__}": None}
    for wrapper in ("model", "state_dict"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise ValueError(f"{path} is not a checkpoint: no weights under 'model' or 'state_dict' "
                         f"(it holds {found})")
    return strip_wrappers(content)


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes of DistributedDataParallel and torch.compile where every key has them."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either wrapper may be the outer one
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def require_file(path: Path) -> None:
    """FileNotFoundError without such a file; it names the checkpoints of the folder."""
    if path.is_file():
        return
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}: the folder {folder} does not exist")
    found = sorted(entry.name for entry in folder.iterdir()
                   if entry.suffix in SUFFIXES or any((entry / name).is_file() for name in OF_A_RUN))
    raise FileNotFoundError(f"no checkpoint {path}; the folder holds {', '.join(found) or 'neither one nor a run'}")


def damaged(path: Path) -> str:
    """The sentence about a file that cannot be read."""
    return f"{path} cannot be read: truncated or not a checkpoint ({path.stat().st_size:,} bytes); fetch it again"


# ------------------------------------------------------------ comparison, words


def compare_states(own: Mapping[str, Tensor],
                   state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Keys only in `own`, keys only in `state`, and `key: file (..), model (..)` where shapes differ."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    mismatched = [f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
                  for key in own if key in state and own[key].shape != state[key].shape]
    return missing, unexpected, mismatched


def differences(missing: list[str], unexpected: list[str], mismatched: list[str]) -> str:
    """What `compare_states` found, in words: numbers, and the first two of each; empty where nothing differs."""
    parts = []
    for words, entries in (("missing in the file", missing), ("unknown to the model", unexpected),
                           ("of another shape", mismatched)):
        if entries:
            more = ", ..." if len(entries) > 2 else ""
            parts.append(f"{len(entries)} {words} ({', '.join(entries[:2])}{more})")
    return "; ".join(parts)


def _describe(config: Mapping | None) -> str:
    config = config or {}
    known = [f"{key} {config[key]}" for key in ("model", "backbone") if key in config]
    switches = config.get("task_dictionary", {})
    tasks = [key.removeprefix("include_") for key, value in switches.items() if value is True]
    known += [f"tasks {' '.join(tasks)}"] if tasks else []
    return ", ".join(known) or "another model"


def check_plain(value: Any, place: str) -> None:
    """TypeError for what a checkpoint cannot hold.

    Exact types on purpose: numpy's float64 is a float, and EasyDict a dict, that would not load again.
    """
    if isinstance(value, Tensor) or type(value) in PLAIN_TYPES:
        return
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            check_plain(key, f"a key of {place}")
            check_plain(entry, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            check_plain(entry, f"{place}[{index}]")
    else:
        raise TypeError(f"{place} is a {type(value).__module__}.{type(value).__name__}; a checkpoint holds "
                        "only tensors and plain Python values")
