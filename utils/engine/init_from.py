"""Starting from a trained model, ours or a released one, whatever is different about the new one.

Tasks, classes, decoder, image size may differ: a tensor is taken where name and shape agree (heads by their task's
name), position tables are resized, and everything that is not taken is listed.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from models.released import recognise
from utils.engine.checkpoint import convert_released, read_checkpoint, weights_of

logger = logging.getLogger(__name__)

MOST_SHOWN = 12


def init_from(model: nn.Module, path: Path) -> set[str]:
    """Fills what fits and returns its keys. A file of which nothing fits is a ValueError."""
    checkpoint = read_checkpoint(path)
    if checkpoint.get("base"):
        raise ValueError(f"init_from {path}: it holds adapters for {checkpoint['base']['source']} and no whole model")
    state = weights_of(checkpoint)
    if recognise(state):
        state, _ = convert_released(state)
    own = model.state_dict()
    state = _with_fitted_tables(model, state, own)
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise ValueError(f"init_from {path}: no tensor has the name and shape of one of this model's")
    model.load_state_dict({**own, **fitting})
    fresh = [key for key in own if key not in fitting]
    logger.info("init_from %s: %d of the model's %d tensors start from it\n  starting fresh: %s\n"
                "  of another shape: %s\n  in the file only: %s", path, len(fitting), len(own), _grouped(fresh),
                _grouped(key for key in fresh if key in state), _grouped(key for key in state if key not in own))
    return set(fitting)


def _with_fitted_tables(model: nn.Module, state: dict, own: dict) -> dict:
    """Position tables of the same backbone for another image size or window, as the backbone itself fits them."""
    prefix = "encoder."
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    mine = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    if part.keys() != mine.keys() or all(part[key].shape == value.shape for key, value in mine.items()):
        return state
    return {**state, **{prefix + key: value for key, value in model.encoder.convert_state_dict(part).items()}}


def _grouped(keys: Iterable[str]) -> str:
    """Counts by the first two words of the keys: `4 (heads.depth.*, neck.levels.*)`."""
    counts: dict[str, int] = {}
    for key in keys:
        group = ".".join(key.split(".")[:2])
        counts[group] = counts.get(group, 0) + 1
    shown = [f"{group}.* {count}" for group, count in list(counts.items())[:MOST_SHOWN]]
    return ", ".join(shown) + (", ..." if len(counts) > MOST_SHOWN else "") if counts else "nothing"
