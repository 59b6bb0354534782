"""Experiment files of the original programs, and older ones of this program, in this program's words.

The programs of InvPT, TaskPrompter, MLoRE, BridgeNet, TaskDiffusion and MTMamba read experiment files of one family,
which is ours too; BIM's has MTMamba's form. Such a file runs here unchanged: `translate` puts its own spellings into
ours, and writes down what its program does without being told where that is not our default. Nothing else in this
program knows a foreign or an older spelling.
"""

import copy
import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from utils.options import ConfigError, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Original:
    """What files of one original spell differently from ours.

    options: decoder options at the top level of the file, here in `model_kwargs`; signs: those that tell this original
    from the others; heads: what `head` says where the decoder has one kind of head, so that it means nothing.
    """

    options: frozenset[str]
    signs: frozenset[str]
    heads: tuple[str, ...] = ()


INVPT = frozenset({"embed_dim", "PRED_OUT_NUM_CONSTANT", "mtt_resolution_downsample_rate"})
BRIDGENET = frozenset({"REFINE_DEPTH", "DILATED_RATIO", "SQUEEZE_RATIO"})
TASKPROMPTER = frozenset({"prompt_len", "chan_nheads", "use_ctr", "level_embed_dim", "chan_embed_dim"})
MLORE = frozenset({"topk", "spe_rank", "pre_softmax", "rank_list"})
TASKDIFFUSION = frozenset({"timesteps", "randsteps", "module_layer", "with_aux", "aux_weight", "bit_scales",
                           "pseudo_start"})
ORIGINALS = {
    "InvPT": Original(INVPT, INVPT - {"embed_dim"}, heads=("mlp",)),
    "TaskPrompter": Original(TASKPROMPTER | {"embed_dim", "final_embed_dim", "img_ds_ratio", "fea_ds_ratio",
                                             "dd_label_map_size", "ignore_invalid_area_depth"}, TASKPROMPTER),
    "MLoRE": Original(MLORE | {"final_embed_dim", "with_feat", "ignore_invalid_area_depth"}, MLORE, ("conv", "mlp")),
    "BridgeNet": Original(INVPT | BRIDGENET, BRIDGENET | {"refine_depth"}, heads=("mlp",)),
    "TaskDiffusion": Original(TASKDIFFUSION | {"topk", "rank_list", "final_embed_dim", "spatial_size",
                                               "ignore_invalid_area_depth"}, TASKDIFFUSION,
                              ("TaskDiffusion_head", "TaskDiffusion_mlore_head")),
}
WITH_EXPERTS = "taskdiffusion_mlore"
SHARED_NAME = "transformernet"      # `model` of InvPT's and of BridgeNet's files; in older files of ours of all four

# The backbone's name may begin with the system and end with the form in which MLoRE stores folded weights.
BACKBONE = re.compile(r"(?:(taskprompter|mlore|taskdiffusion)_)?(vit[sbl]|swin[tsbl]|intern_[tsbl])(_repara)?", re.I)
SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}

# Every original program reads these keys and has no default for any: a file with all of them is one of theirs, unless
# it has those of RESOLVED too. Then it is a resolved configuration of ours, to which nothing may be added.
REQUIRED = frozenset({
    "version_name", "out_dir", "train_db_name", "val_db_name", "trBatch", "valBatch", "nworkers", "ignore_index",
    "val_interval", "epochs", "max_iter", "optimizer", "optimizer_kwargs", "scheduler", "model", "backbone",
    "task_dictionary", "loss_kwargs"})
RESOLVED = frozenset({"augmentation", "boundary_kwargs", "pretrained_allow_missing"})
SEEDS = {"BridgeNet": 42}           # written in the programs; all others have 0
TORCH_DEFAULTS = {                  # the programs hand `optimizer_kwargs` to torch.optim, whose defaults these are
    "adam": {"weight_decay": 0.0}, "adamw": {"weight_decay": 0.01}, "sgd": {"weight_decay": 0.0, "momentum": 0.0}}
NOT_OF = {"adam": ("momentum", "nesterov"), "adamw": ("momentum", "nesterov"), "sgd": ("betas", "eps")}


def translate(values: Mapping, source: str) -> dict:
    """The values of an experiment file (merged, not parsed) with our keys; those of a file of ours as they are.

    The argument is left alone. `source` is the file's name for messages. A value that cannot be expressed here is a
    ConfigError. Keys and types that are merely wrong stay: the parser refuses them.
    """
    values = copy.deepcopy(dict(values))
    published = values.keys() >= REQUIRED and not values.keys() >= RESOLVED
    _translate_names(values, source)
    _translate_detection(values, published)
    _translate_decoder_options(values, source)
    _translate_head(values, published, source)
    _translate_losses(values)
    _translate_optimizer(values)
    for key in ("out_dir", "version_name"):
        if isinstance(values.get(key), str) and values[key].strip("/"):
            values[key] = values[key].rstrip("/")
    if published:
        _add_what_goes_without_saying(values, source)
    return values


def _refuse(source: str, message: str) -> NoReturn:
    raise ConfigError(f"{source}: {message}")


def _group(values: Mapping, key: str) -> dict:
    """The group of keys `key`, made if absent or empty; a stand-in where the file has something else there."""
    if values.get(key) is None:
        values[key] = {}
    return values[key] if isinstance(values[key], dict) else {}


def _original(values: Mapping) -> str | None:
    """The row of ORIGINALS that the model belongs to."""
    return next((name for name in ORIGINALS if name.lower() == str(values.get("model")).lower()), None)


def _translate_names(values: dict, source: str) -> None:
    model = str(values.get("model"))
    if model.lower() == WITH_EXPERTS:
        values["model"] = "taskdiffusion"
        _group(values, "model_kwargs").setdefault("experts", True)
    match = BACKBONE.fullmatch(str(values.get("backbone")))
    system, short, folded = match.groups() if match else (None, None, None)
    if match:
        values["backbone"] = _backbone(short)
    if model.lower() == SHARED_NAME:
        values["model"] = _meaning_of_shared_name(values, system, source)
        logger.info("%s: model '%s' with these options on this backbone is %s", source, model, values["model"])
    elif system and not model.lower().startswith(system.lower()):
        _refuse(source, f"backbone '{match[0]}' belongs to {system}, but the model is '{model}'; "
                        f"write backbone: {values['backbone']}")
    if folded:      # here `infer` folds, and the weights of both forms load
        _group(values, "model_kwargs").setdefault("fold", True)


def _backbone(short: str) -> str:
    """vitL -> vit_large, swinB -> swin_base, intern_b -> internimage_b."""
    kind, size = short[:-1].lower(), short[-1].lower()
    return f"internimage_{size}" if kind == "intern_" else f"{kind}_{SIZES[size]}"


def _meaning_of_shared_name(values: dict, system: str | None, source: str) -> str:
    given = values.keys() | _options(values).keys()
    meant = {name for name, original in ORIGINALS.items()
             if original.signs & given or name.lower() == str(system).lower()}
    if str(values.get("backbone")).startswith("internimage"):   # which only BridgeNet has
        meant.add("BridgeNet")
    if "BridgeNet" in meant:                                    # its files have all of InvPT's options as well
        meant.discard("InvPT")
    if len(meant) != 1:
        found = f"those of {' and '.join(sorted(meant))} are there" if meant else "none of theirs is there"
        _refuse(source, f"model '{values['model']}' is InvPT, TaskPrompter, MLoRE or BridgeNet, depending on its "
                        f"options, and {found}; name the decoder itself, e.g. model: InvPT")
    return meant.pop()


def _options(values: Mapping) -> dict:
    options = values.get("model_kwargs")
    return options if isinstance(options, dict) else {}


def _translate_detection(values: dict, published: bool) -> None:
    """TaskPrompter's name of 3-D detection; its program's data set and angles are those that its weights need."""
    losses = values.get("loss_kwargs")
    weights = losses.get("loss_weights") if isinstance(losses, dict) else None
    for group, theirs, ours in ((values.get("task_dictionary"), "include_3ddet", "include_det3d"),
                                (weights, "3ddet", "det3d")):
        if isinstance(group, dict) and theirs in group:
            group[ours] = group.pop(theirs)
    if not published or "Cityscapes3D" not in (values["train_db_name"], values["val_db_name"]):
        return
    for name in ("train_db_name", "val_db_name"):
        if values[name] == "Cityscapes3D":
            values[name] = "Cityscapes3DTaskPrompter"
    _group(values, "det3d_kwargs").setdefault("direction_offset", 0)


def _translate_decoder_options(values: dict, source: str) -> None:
    name = _original(values)
    if name is None:
        return
    known = ORIGINALS[name].options
    for key in values.keys() - known:
        if near := difflib.get_close_matches(str(key), known, n=1, cutoff=0.8):
            _refuse(source, f"unknown key '{key}'; did you mean '{near[0]}'?")
    moved = {key: values.pop(key) for key in list(values) if key in known}
    if not moved and not _options(values):
        return
    options = _group(values, "model_kwargs")
    options.update({**moved, **options})        # what `model_kwargs` says itself goes first
    # options that no program reads, or that have only one valid value
    options.pop("fea_ds_ratio", None)                                # TaskPrompter
    if options.pop("with_feat", False):                              # MLoRE
        _refuse(source, "'with_feat' must be false: the published models have no such path")
    masked = options.pop("ignore_invalid_area_depth", True)          # TaskPrompter, MLoRE
    if not masked and _group(values, "task_dictionary").get("include_depth"):
        _refuse(source, "'ignore_invalid_area_depth' must be true: depth pixels without a value are never trained on")
    if name == "BridgeNet":
        _translate_stages(options, source)
    if name == "TaskDiffusion":
        _translate_diffusion(values, options, source)


def _translate_diffusion(values: dict, options: dict, source: str) -> None:
    """Its auxiliary predictions are our preliminary ones; one scale for all codes; two keys that say nothing."""
    for key in ("spatial_size", "pseudo_start"):
        options.pop(key, None)
    options.setdefault("mask_void", False)
    scales = options.pop("bit_scales", None)
    if scales is not None:
        if not isinstance(scales, dict) or scales.keys() != {"all"}:
            _refuse(source, f"'bit_scales' must be one scale for all tasks, {{all: 0.01}}, got {scales!r}")
        options.setdefault("bit_scale", scales["all"])
    if (auxiliary := options.pop("with_aux", None)) is not None:
        values["intermediate_supervision"] = auxiliary
    if (weight := options.pop("aux_weight", None)) is not None:
        _group(values, "loss_kwargs").setdefault("intermediate_weight", weight)


def _translate_stages(options: dict, source: str) -> None:
    """BridgeNet's lists, one number per block of each stage, to one pattern that the blocks of every stage repeat."""
    depths = options.pop("REFINE_DEPTH", None)
    if depths is not None:
        options.setdefault("refine_depth", depths)
    for key, ours in (("DILATED_RATIO", "dilations"), ("SQUEEZE_RATIO", "squeeze_ratio")):
        if key not in options:
            continue
        rows = options.pop(key)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            _refuse(source, f"'{key}' must hold one list of numbers per stage, got {shown(rows)}")
        if depths is not None and [len(row) for row in rows] != depths:
            _refuse(source, f"'{key}' must hold one number per block, {depths} of them by REFINE_DEPTH; got "
                            f"{[len(row) for row in rows]}")
        pattern = _pattern(rows)
        if pattern is None or (key == "SQUEEZE_RATIO" and len(pattern) > 1):
            _refuse(source, f"'{key}' must be {'one number' if key == 'SQUEEZE_RATIO' else 'one repeated pattern'} "
                            f"for all stages, as in the published files; got {shown(rows)}")
        options.setdefault(ours, pattern[0] if key == "SQUEEZE_RATIO" else pattern)


def _pattern(rows: list[list]) -> list | None:
    """The shortest list that every row repeats from its start; None where rows differ."""
    longest = max(rows, key=len)
    if any(row != longest[:len(row)] for row in rows):
        return None
    repeats = (n for n in range(1, len(longest) + 1) if all(x == longest[i % n] for i, x in enumerate(longest)))
    return longest[:next(repeats)]


def _translate_head(values: dict, published: bool, source: str) -> None:
    """Only TaskPrompter has two kinds of head; "default" stands in older files of ours.

    The programs without a row in ORIGINALS (MTMamba, BIM) do not read the key.
    """
    head = values.pop("head", None)
    if head in (None, "default"):
        return
    name = _original(values)
    if name == "TaskPrompter":
        _group(values, "model_kwargs")["head"] = head       # also where that has one: `head=conv` is an argument
    elif not published if name is None else head not in ORIGINALS[name].heads:
        _refuse(source, f"head '{head}' is not available for model '{values.get('model')}', which has one kind of "
                        "head; leave `head` out")


def _translate_losses(values: dict) -> None:
    loss = values.get("loss_kwargs")
    if not isinstance(loss, dict):
        return
    if str(loss.get("loss_scheme")).lower() == "none":      # MTMamba: whatever is not `log` is the weighted sum
        loss["loss_scheme"] = "weighted_sum"
    weights = loss.get("loss_weights")
    if _original(values) in ("MLoRE", "TaskDiffusion") and isinstance(weights, dict) and "load_balancing" in weights:
        _group(values, "model_kwargs").setdefault("load_balancing_weight", weights.pop("load_balancing"))


def _translate_optimizer(values: dict) -> None:
    name, options = values.get("optimizer"), values.get("optimizer_kwargs")
    if str(name).lower() in NOT_OF:                         # BridgeNet: adamW
        values["optimizer"] = name = name.lower()
    if not isinstance(options, dict):
        return
    if isinstance(options.get("betas"), dict):              # BridgeNet: {a: 0.9, b: 0.999}
        options["betas"] = list(options["betas"].values())
    if options.keys() >= {"betas", "eps", "momentum", "nesterov"}:      # older files of ours: of all optimizers
        for key in NOT_OF.get(name, ()):
            del options[key]


def _add_what_goes_without_saying(values: dict, source: str) -> None:
    """What an original program does although its file does not say so, where our default is another.

    Not among it, because our defaults are the same: losses over the mini-batch of a process, decay to 0 with power
    0.9, no warm-up, no accumulation, no gradient clipping, single precision, weights of preliminary predictions.
    """
    name, added = _original(values), {}
    if "pretrained" not in values:                          # all programs start from the backbone's ImageNet weights
        values["pretrained"] = added["pretrained"] = True
    if "seed" not in values and name in SEEDS:
        values["seed"] = added["seed"] = SEEDS[name]
    options = _group(values, "optimizer_kwargs")
    for key, value in TORCH_DEFAULTS.get(str(values["optimizer"]), {}).items():
        if key not in options:
            options[key] = added[f"optimizer_kwargs.{key}"] = value
    if name == "TaskPrompter" and str(values["backbone"]).startswith("swin"):
        rates = _group(values, "backbone_kwargs")           # of the whole family only its Swin has this rate
        if "drop_path_rate" not in rates:
            rates["drop_path_rate"] = added["backbone_kwargs.drop_path_rate"] = 0.15
    if added:
        logger.info("%s is a file of an original program; added what that does without being told: %s", source,
                    ", ".join(f"{key}={str(value).lower()}" for key, value in added.items()))
