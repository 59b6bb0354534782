"""From a checkpoint back to a run: what must fit, and what becomes of every key that has changed since.

`RULES` is the table of docs/reliability.md; every key of an experiment file has a row, itself or by its group.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils import distributed
from utils.engine.checkpoint import load_model
from utils.engine.config import Config, config_from_dict
from utils.engine.first_weights import require_whole
from utils.engine.run import Run
from utils.sharded import parted_like

logger = logging.getLogger(__name__)

NEEDED = ("ema", "optimizer", "scaler", "rng", "step", "best", "metrics", "config")


class Rule(NamedTuple):
    """What happens to a key that has another value than in the checkpoint."""

    kind: str           # "applied", "harmless" or "refused"
    words: str


def _rules(kind: str, words: str, keys: str) -> dict[str, Rule]:
    return {key: Rule(kind, words) for key in keys.split()}


RULES: Mapping[str, Rule] = {
    **_rules("applied", "where the weights fit, otherwise the run is refused",
             "model backbone backbone_kwargs neck neck_kwargs model_kwargs image_size label_size task_dictionary "
             "det3d_kwargs"),
    **_rules("refused", "the order of the images depends on it", "seed train_db_name val_from_train partial_labels"),
    **_rules("refused", "the best score so far would be compared with another one", "val_db_name test_time"),
    **_rules("refused", "the state in the file is that of another one", "optimizer loss_kwargs.loss_scheme"),
    **_rules("refused", "the optimizer's state is ordered by these groups",
             "freeze lr_scale layer_decay weight_decay_on"),
    **_rules("refused", "the adapters in the file are others", "lora"),
    **_rules("refused", "the labels would mean something else", "ignore_index"),
    **_rules("applied", "the images of an update must stay as many: accumulation makes up for other numbers",
             "trBatch global_batch"),
    **_rules("applied", "another decay; switching the average on or off is refused", "ema_decay"),
    **_rules("applied", "from the next update on", "max_iter epochs optimizer_kwargs scheduler scheduler_kwargs "
             "loss_kwargs grad_clip_param augmentation intermediate_supervision precision task_dictionary.edge_w "
             "lora.dropout on_nonfinite nonfinite_limit watchdog loader_timeout"),
    **_rules("applied", "from the next time on", "val_interval checkpoint_interval save_interval log_interval "
             "boundary_eval boundary_infer boundary_kwargs"),
    **_rules("harmless", "the weights come from the checkpoint", "pretrained pretrained_allow_missing init_from"),
    **_rules("harmless", "the weights must be the same, wherever they lie", "lora.base"),
    **_rules("harmless", "where things lie",
             "out_dir version_name db_root resume train_db_name.folder val_db_name.folder data_cache skip_data_check"),
    **_rules("harmless", "how it is computed, up to rounding", "nworkers valBatch device compile "
             "activation_checkpointing channels_last scan_backend find_unused_parameters cuda_graph parallel "
             "deterministic worker_start augmentation.photometric_on_device"),
    **_rules("harmless", "what is shown", "tensorboard progress report eval_at_start single_task_scores "
             "camera_file"),
}


def rule_of(key: str) -> Rule:
    """The rule of a dotted key: its own, or that of the nearest group around it."""
    names = [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]
    return next(RULES[name] for name in names if name in RULES)


def table_of_rules() -> str:
    """The rules in Markdown: one row for the keys that share one."""
    keys: dict[Rule, list[str]] = {}
    for key, rule in RULES.items():
        keys.setdefault(rule, []).append(f"`{key}`")
    rows = [f"| {', '.join(names)} | {rule.kind} | {rule.words} |" for rule, names in keys.items()]
    return "\n".join(["| keys | what happens | why, or how |", "| --- | --- | --- |", *rows])


def restore(run: Run, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Sets the run to a checkpoint; a ValueError that names the file and the key where it does not fit."""
    if lacking := [key for key in NEEDED if key not in checkpoint]:
        raise ValueError(f"{path} holds no {', '.join(lacking)}: a run cannot go on from it; its weights serve for "
                         "--trained_model")
    _tell_changes(run.config, checkpoint["config"], path)
    if run.base is None:
        require_whole(checkpoint, path)
    else:
        checkpoint = run.base.completed(checkpoint, run.model, path)
    load_model(run.model, checkpoint["model"], path, file_config=checkpoint["config"], yaml_config=run.config.to_dict())
    if (run.ema is None) != (checkpoint["ema"] is None):
        raise ValueError(f"{path} was trained {'without' if checkpoint['ema'] is None else 'with'} a moving average; "
                         f"ema_decay is {run.config.ema_decay}")
    balancing, asked = checkpoint.get("criterion", {}), run.criterion.state_dict()
    if balancing.keys() != asked.keys():
        raise ValueError(f"{path} holds the state of another loss balancing ({', '.join(balancing) or 'none'}) than "
                         f"loss_kwargs asks for ({', '.join(asked) or 'none'}); resume with the loss_scheme it was "
                         "trained with")
    if run.ema is not None:
        own = run.ema.state_dict()
        run.ema.load_state_dict({key: parted_like(tensor, own[key]) for key, tensor in checkpoint["ema"].items()})
    run.criterion.load_state_dict(balancing)
    _restore_optimizer(run.optimizer, checkpoint["optimizer"], path)
    if checkpoint["scaler"]:                          # empty unless it was fp16; then a fresh one starts
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.step, run.best, run.metrics, run.rng = (checkpoint[key] for key in ("step", "best", "metrics", "rng"))
    run.scored = checkpoint.get("scored", run.step)
    run.sums = checkpoint.get("sums", [])
    if run.step > run.total_steps:
        raise ValueError(f"{path} holds step {run.step}, but the run ends after {run.total_steps} updates (max_iter, "
                         "epochs): there is nothing to train; set max_iter higher")


def changed_keys(now: Mapping[str, Any], then: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (then, now)."""
    changed = {}
    for key in {**then, **now}:
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= changed_keys(new, old, f"{prefix}{key}.")
        elif old != new:
            changed[f"{prefix}{key}"] = (old, new)
    return changed


def _tell_changes(config: Config, stored: Mapping[str, Any], path: Path) -> None:
    changed = changed_keys(config.to_dict(), config_from_dict(stored, str(path)).to_dict())
    words = {key: f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()}
    if refused := [f"{words[key]} ({rule_of(key).words})" for key in changed if rule_of(key).kind == "refused"]:
        raise ValueError(f"{path} cannot be resumed with {'; '.join(refused)}; set this back, or begin another run")
    if words:
        logger.warning("resumed with another configuration: %s",
                       "; ".join(f"{text} ({rule_of(key).kind})" for key, text in words.items()))


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Its state from the checkpoint, its options from the experiment file; the rate is that of the schedule."""
    options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]   # 0, 1, ... there
    parted = {number: {name: parted_like(value, parameters[number]) if isinstance(value, torch.Tensor) else value
                       for name, value in of_one.items()}
              for number, of_one in state["state"].items() if number < len(parameters)}
    try:
        optimizer.load_state_dict({**state, "state": parted})
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds the state of another optimizer than this run's "
                         f"{type(optimizer).__name__}: {error}") from error
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def restore_rng(run: Run) -> None:
    """Sets this rank's generators as they were when the checkpoint was written; does nothing in a fresh run.

    A run resumed on another number of processes keeps its fresh generators: there is no state for the new ranks.
    """
    if len(run.rng) != distributed.world_size():
        if run.rng:
            logger.warning("the checkpoint holds the random state of %d process(es), this run has %d: stochastic depth "
                           "is drawn afresh", len(run.rng), distributed.world_size())
        return
    state = run.rng[distributed.rank()]
    torch.set_rng_state(state["torch"])
    if run.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], run.device)
