"""Released checkpoints of MLoRE (Yang et al., CVPR 2024): their keys, and ours.

The original keeps every expert in a module of its own; here the experts of a mixture share tensors. Its position
embedding has a row for a class token that the ViT does not have.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models.released.renaming import rename_table

# Both modules of a tap; the second names are those of the code before its release.
MODULE = r"backbone\.(?:(?P<first>MLoRE_1|q_generate)|MLoRE_2|feat_decode_increa)\.(?P<tap>\d+)\."
TASK = r"(?P<task>[a-z_]+)\."

# `{stage}` is that of MODULE.
RENAMES = rename_table(
    (MODULE + r"lora_list_1\.(?P<expert>\d+)\.", "decoder.{stage}.{tap}.experts."),
    (MODULE + r"conv1\." + TASK, "decoder.{stage}.{tap}.proj_in.{task}."),
    (MODULE + r"conv2\." + TASK, "decoder.{stage}.{tap}.own_expert.{task}."),
    (MODULE + r"conv3\." + TASK, "decoder.{stage}.{tap}.proj_out.{task}."),
    (MODULE + r"share_conv\.", "decoder.{stage}.{tap}.generic."),
    (MODULE + r"bn_all\." + TASK, "decoder.{stage}.{tap}.mixture_norm.{task}."),
    (MODULE + r"bn\." + TASK, "decoder.{stage}.{tap}.norm.{task}."),
    (MODULE + r"router_1\." + TASK + r"0\.conv1\.", "decoder.{stage}.{tap}.router.{task}.pixel_in."),
    (MODULE + r"router_1\." + TASK + r"0\.ln\.", "decoder.{stage}.{tap}.router.{task}.pixel_norm."),
    (MODULE + r"router_1\." + TASK + r"0\.conv3\.", "decoder.{stage}.{tap}.router.{task}.pixel_out."),
    (MODULE + r"router_1\." + TASK + r"0\.convsp\.", "decoder.{stage}.{tap}.router.{task}.pool."),
    (MODULE + r"router_1\." + TASK + r"0\.ln_sp\.", "decoder.{stage}.{tap}.router.{task}.pool_norm."),
    (MODULE + r"router_1\." + TASK + r"0\.conv2\.", "decoder.{stage}.{tap}.router.{task}.pool_out."),
    (MODULE + r"router_1\." + TASK + r"1\.", "decoder.{stage}.{tap}.router.{task}.logits."),
    (r"backbone\.fea_fuse\.", "decoder.tap_proj."),
    (r"backbone\.task_mask\.", "decoder.mix."),
    (r"backbone\.", "encoder."),
    (r"heads\." + TASK + r"mt_proj\.0\.", "heads.{task}.conv."),
    (r"heads\." + TASK + r"mt_proj\.1\.", "heads.{task}.norm."),
    (r"heads\." + TASK + r"linear_pred\.", "heads.{task}.proj."),
)

# The two convolutions of an expert.
PAIR = {"W.weight": "down.weight", "W.bias": "down.bias", "M.weight": "up", "M.bias": "up_bias"}

# Unused layers of the ViT-B model, and kernels that its files store after folding, which follow from the factors.
DEAD = re.compile(r"backbone\.q_fuse\.|backbone\.classify_route_\d\.|aux_heads\.|.*\.virt_conv\.")


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of an MLoRE."""
    return any(key.startswith(("backbone.MLoRE_1.", "backbone.q_generate.")) for key in keys)


def is_dead(key: str) -> bool:
    """Whether the key belongs to a layer without influence of its own on any output."""
    return DEAD.match(key) is not None


def locate(key: str) -> tuple[str, int]:
    """Our name of a key, and the place of its expert in that tensor (0 where there is no list of experts)."""
    for pattern, target in RENAMES:
        if match := pattern.match(key):
            parts = match.groupdict()
            rest = key[match.end():]
            if "experts." in target or "own_expert." in target:
                rest = PAIR.get(rest, rest)
            stage = "first" if parts.get("first") else "second"
            return target.format(**parts, stage=stage) + rest, int(parts.get("expert", 0))
    return key, 0


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The same weights under our keys and in our shapes, without the dead layers.

    `tasks` plays no part, as the file's keys name the tasks.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if not is_dead(key):
            name, place = locate(key)
            found.setdefault(name, {})[place] = reshaped(name, value)
    return {name: _joined(name, [parts[place] for place in sorted(parts)]) for name, parts in found.items()}


def reshaped(name: str, value: Tensor) -> Tensor:
    """A tensor of the original in the shape it has here, an expert's as the slice it becomes."""
    if name == "encoder.pos_embed":
        return value[:, 1:]  # the row of the class token that is not there
    if name.endswith(".up_bias"):
        return value[None]  # (C,) -> (1, C)
    is_linear = name.endswith(".up") or (".router." in name and value.ndim == 4)
    return value[:, :, 0, 0] if is_linear else value  # a 1 x 1 convolution is a linear layer


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if name.endswith(".up") else 0)
