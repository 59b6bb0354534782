"""Checkpoints that authors released, recognised by their keys and renamed to ours.

A new kind is a file with a `models.released.kind.Released` and a row of RELEASED.
"""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from models.released import bridgenet, demt, invpt, mlore, mtmamba, taskdiffusion, taskprompter
from models.released.kind import Released

_LAST_LAYER = re.compile(r"(?:heads\.(?P<a>\w+)\.linear_pred|final_project\.(?P<b>\w+)"
                         r"|head\.final_logits\.(?P<c>\w+)|heads\.pred_heads\.(?P<d>\w+)"
                         r"|heads\.(?P<e>\w+)\.conv_cls)\.weight")


RELEASED: dict[str, Released] = {
    "InvPT": invpt.INVPT,
    "MLoRE": mlore.MLORE,
    "BridgeNet": bridgenet.BRIDGENET,
    "MTMamba": mtmamba.MTMAMBA,  # and MTMamba++
    "DeMT": demt.DEMT,
    "FCN": demt.BASELINE,  # the baselines of ATRC and DeMT
    "TaskDiffusion": taskdiffusion.TASKDIFFUSION,
    "TaskPrompter": taskprompter.TASKPROMPTER,
}


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """The row that a state dict belongs to, or None."""
    return next((name for name, kind in RELEASED.items() if kind.recognises(state)), None)


def tasks_in(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Our name of each task -> number of output channels, in the file's order, from the weights of the last layers."""
    found = ((_LAST_LAYER.fullmatch(key), value) for key, value in state.items())
    kind = recognise(state)
    names = RELEASED[kind].tasks if kind else {}
    return {names.get(match[match.lastgroup], match[match.lastgroup]): len(value) for match, value in found if match}


def describe(state: Mapping[str, Tensor]) -> str:
    """What a released checkpoint holds, for messages: tasks with their channels, size of the backbone."""
    words = ["tasks " + ", ".join(f"{task} {channels}" for task, channels in tasks_in(state).items())]
    if "backbone.pos_embed" in state:
        blocks = {key.split(".")[2] for key in state if key.startswith("backbone.blocks.")}
        _, entries, width = state["backbone.pos_embed"].shape
        words.append(f"ViT of {len(blocks)} blocks and {width} channels for {entries - 1} patches")
    if "backbone.patch_embed.conv2.weight" in state:
        blocks = {tuple(key.split(".")[2:5:2]) for key in state if key.startswith("backbone.levels.")
                  and ".blocks." in key}
        depths = Counter(level for level, _ in sorted(blocks))
        width = len(state["backbone.patch_embed.conv2.weight"])
        words.append(f"InternImage of {' + '.join(map(str, depths.values()))} blocks and {width} channels")
    return "; ".join(words)
