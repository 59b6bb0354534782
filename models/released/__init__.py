"""Checkpoints that authors released, recognised by their keys and renamed to ours.

A new kind is a module with these functions and a row of RELEASED. State dicts come without `module.` prefix.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from models.released import bridgenet, demt, invpt, mlore, mtmamba, taskprompter

_LAST_LAYER = re.compile(r"(?:heads\.(?P<a>\w+)\.linear_pred|final_project\.(?P<b>\w+)"
                         r"|head\.final_logits\.(?P<c>\w+))\.weight")


class Released(NamedTuple):
    """One kind. `convert(state, tasks)`: the weights under our keys, `tasks` in the order of the task table.

    `is_dead(key)`: whether the layer never influenced an output of the original, so that `convert` leaves it
    out; `dead_keys(keys)`: those among all keys, where one key alone does not tell. A key that is neither known
    nor dead keeps its name, and the strict load reports it.
    """

    recognises: Callable[[Iterable[str]], bool]
    convert: Callable[[Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]
    is_dead: Callable[[str], bool] = lambda key: False
    dead_keys: Callable[[Collection[str]], Collection[str]] = lambda keys: ()


RELEASED: dict[str, Released] = {
    "InvPT": Released(invpt.recognises, invpt.convert, invpt.is_dead),
    "MLoRE": Released(mlore.recognises, mlore.convert, mlore.is_dead),
    "BridgeNet": Released(bridgenet.recognises, bridgenet.convert, bridgenet.is_dead),
    "MTMamba": Released(mtmamba.recognises, mtmamba.convert),     # and MTMamba++
    "DeMT": Released(demt.recognises, demt.convert_demt, demt.is_dead),
    "FCN": Released(demt.recognises_baseline, demt.convert),      # the baselines of ATRC and DeMT
    "TaskPrompter": Released(taskprompter.recognises, taskprompter.convert, dead_keys=taskprompter.dead_keys),
}


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """The row that a state dict belongs to, or None."""
    return next((name for name, kind in RELEASED.items() if kind.recognises(state)), None)


def tasks_in(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Task -> number of output channels, in the file's order, from the weights of the last layers."""
    found = ((_LAST_LAYER.fullmatch(key), value) for key, value in state.items())
    return {match[match.lastgroup]: len(value) for match, value in found if match}


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
