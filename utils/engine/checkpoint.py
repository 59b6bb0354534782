"""Weights on disk: pretrained backbones coming in, run checkpoints going out and coming back.

Two habits shape this file. Loading never skips silently: each load logs one line of counts, and anything that
would leave a layer at its random values is an error with names. Saving never harms what is there: a file is
complete under its final name or it is not there at all. Every read uses `weights_only=True`, so a file cannot
run code.
"""

import logging
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from models.released import RELEASED, describe, recognise, tasks_in
from utils.durable import atomic_path
from utils.engine.tasks import tasks_named
from utils.seals import check_whole, save_sealed

PRETRAINED_DIR = Path(__file__).resolve().parents[2] / "pretrained_ckpts"
SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors", ".npz")
PLAIN_TYPES = (int, float, str, bool, type(None), torch.Size)
# Files of Lightning 1.x name a callback by its class; an empty class stands for it, so none of its code is run.
LIGHTNING_CLASSES = [(type("Unread", (), {}), "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]

logger = logging.getLogger(__name__)


# ------------------------------------------------------------ pretrained backbones


def load_pretrained(backbone: nn.Module, source: bool | str | Path,
                    allow_missing: Collection[str] = ()) -> None:
    """Fills a backbone with published weights and logs `loaded 327 / missing 0 / unexpected 2 (head.*)`.

    Args:
        backbone: see the contract in `models.backbones`.
        source: True = the backbone's own ImageNet weights (a file in pretrained_ckpts/ if there, else
            downloaded); a timm model name = those weights; a path = .pth/.pt/.pth.tar/.safetensors in timm,
            official Swin or InternImage, or OpenMMLab keys, with or without wrappers and `module.`/`backbone.`
            prefixes, or an AugReg .npz for a ViT.
        allow_missing: names of submodules or parameters that the file need not hold.
    Raises:
        ValueError: a layer the file lacks or holds in another shape, or a file of a deeper model.
        FileNotFoundError: no such file, or no way to download.
    """
    raw, origin = _pretrained_weights(backbone, source)
    part = {key.removeprefix("backbone."): value for key, value in raw.items() if key.startswith("backbone.")}
    outside = [key for key in raw if not key.startswith("backbone.")] if part else []
    state = backbone.convert_state_dict(part or raw)
    own = backbone.state_dict()
    missing, unexpected, mismatched = compare_states(own, state)
    allowed = tuple(f"{name}." for name in (*backbone.never_pretrained, *allow_missing))
    new = [key for key in missing if f"{key}.".startswith(allowed)]
    missing = [key for key in missing if key not in new]
    # Extra blocks mean a deeper model of equal width, whose first blocks would load without any other sign.
    tops = {key.split(".")[0] for key in own}
    foreign = [key for key in unexpected if key.split(".")[0] in tops]
    if missing or mismatched or foreign:
        raise ValueError(f"{origin} does not fit this {type(backbone).__name__}: "
                         + _differences(missing, foreign, mismatched))
    fitting = {key: value for key, value in state.items() if key in own}
    backbone.load_state_dict(fitting, strict=False)
    line = f"{origin}: loaded {len(fitting)} / missing 0 / unexpected " + _grouped(unexpected + outside)
    logger.info(line + (f" / starting fresh {_grouped(new)}" if new else ""))


def download_weights(tag: str) -> dict[str, Tensor]:
    """State dict of a timm model name (with weight tag) from the Hugging Face hub or its local cache."""
    if tag not in timm.list_pretrained():
        raise ValueError(f"pretrained '{tag}' is neither a file nor a timm model with weights; give true, "
                         "a path, or a name such as swin_large_patch4_window12_384.ms_in22k_ft_in1k")
    try:
        return load_state_dict_from_hf(timm.get_pretrained_cfg(tag).hf_hub_id, weights_only=True)
    except (OSError, RuntimeError) as error:  # the hub client raises a family of both when it cannot connect
        raise FileNotFoundError(
            f"could not download '{tag}' ({type(error).__name__}): on a machine with a network run `python "
            f"scripts/download_pretrained.py {tag}` and put {tag}.safetensors in {PRETRAINED_DIR}") from error


def _pretrained_weights(backbone: nn.Module, source: bool | str | Path) -> tuple[dict[str, Tensor], str]:
    """Weights under their published keys and the words that name their origin in messages."""
    if source is True:
        tag, file = backbone.pretrained_tag, backbone.pretrained_file
        if tag is None and file is not None and not (PRETRAINED_DIR / file).is_file():
            raise FileNotFoundError(f"no {file} in {PRETRAINED_DIR}: fetch it from {backbone.pretrained_home}, or set "
                                    "pretrained to a file or false")
        if tag is None and file is None:
            raise ValueError(f"this {type(backbone).__name__} has no ImageNet weights of its own; set "
                             "pretrained to a file, a timm name or false")
        names = (f"{tag}.safetensors", file)
        source = next((PRETRAINED_DIR / name for name in names if (PRETRAINED_DIR / name).is_file()), tag)
    path = Path(source)
    if not path.is_file() and path.suffix not in SUFFIXES and os.sep not in str(source):
        return download_weights(str(source)), str(source)
    if path.suffix != ".npz":
        return find_weights(read_file(path), path), str(path)
    if not hasattr(backbone, "read_npz"):
        raise ValueError(f"{path}: an .npz file holds AugReg ViT weights, which do not fit a "
                         f"{type(backbone).__name__}")
    _require_file(path)
    try:
        return backbone.read_npz(path), str(path)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(_damaged(path)) from error


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


def stored_config(path: str | Path) -> Mapping:
    """The configuration that a checkpoint holds (`Config.to_dict()`); a ValueError where there is none."""
    stored = read_checkpoint(path).get("config")
    if stored is None:
        raise ValueError(f"{path} does not hold its configuration; name it with --config_exp")
    return stored


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
                         + _differences(missing, unexpected, mismatched))
    model.load_state_dict(state)
    logger.info(f"{path}: loaded {len(own)} / missing 0 / unexpected 0{ignored}")


def convert_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A recognised state dict under our keys, and the keys it loses: layers that no output depends on."""
    kind = RELEASED[recognise(state)]
    dead = kind.dead_keys(state)
    return (kind.convert(state, tuple(tasks_named(tasks_in(state)))),
            [key for key in state if kind.is_dead(key) or key in dead])


# ------------------------------------------------------------ file reading


def read_file(path: Path) -> Any:
    """Content of a .safetensors or torch file; one sentence for a missing, truncated, damaged or foreign file."""
    _require_file(path)
    check_whole(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(LIGHTNING_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error):
            raise ValueError(_damaged(path)) from error
        raise ValueError(f"{path} holds Python objects besides tensors and is not read for safety; if you "
                         "trust it, save its weights alone: torch.save({'model': torch.load(path, "
                         "weights_only=False)['model']}, new_path)") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(_damaged(path)) from error


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


def _require_file(path: Path) -> None:
    if path.is_file():
        return
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}: the folder {folder} does not exist")
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES)
    raise FileNotFoundError(f"no checkpoint {path}; the folder holds {', '.join(found) or 'no checkpoint'}")


def _damaged(path: Path) -> str:
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


def _differences(missing: list[str], unexpected: list[str], mismatched: list[str]) -> str:
    parts = []
    for words, entries in (("missing in the file", missing), ("unknown to the model", unexpected),
                           ("of another shape", mismatched)):
        if entries:
            more = ", ..." if len(entries) > 2 else ""
            parts.append(f"{len(entries)} {words} ({', '.join(entries[:2])}{more})")
    return "; ".join(parts)


def _grouped(keys: list[str]) -> str:
    """`0`, or the count with the first components of the keys: `2 (head.*)`."""
    groups = dict.fromkeys(f"{key.split('.')[0]}.*" if "." in key else key for key in keys)
    return f"{len(keys)} ({', '.join(groups)})" if keys else "0"


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
