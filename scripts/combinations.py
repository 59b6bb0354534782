"""What can be combined with what: the tables of docs/combinations.md, made by asking.

    python scripts/combinations.py

Decoders are built on backbones and necks on the meta device; what is refused there is refused in an experiment, with
the reason. Every loss balancing makes an update of a small model. Data sets, tasks and arguments say themselves what
they have. `--write` puts the tables into the page.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DATASETS
from data.spec import LabelSpec
from losses.balancing import BALANCING
from losses.balancing.gradients import GradientBalancing
from models.build import build_model
from models.decoders import DECODERS
from models.necks import NECKS
from scripts.benchmark import Step
from scripts.command_line import Command
from scripts.docs_site.parts import with_part
from scripts.measuring import Row, markdown
from utils.engine.arguments import FLAGS, MODES
from utils.engine.config import load_config
from utils.engine.tasks import TASKS, label_kinds
from utils.meta import meta_device

ROOT = Path(__file__).resolve().parents[1]
PAGE, PART = ROOT / "docs" / "combinations.md", "combinations"

# One small backbone of every kind of map: its name, and options that make it quick to build.
SMALL_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
BACKBONE_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "`swin_*`": ("swin", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}),
    "`vit_*`": ("vit", SMALL_VIT),
    "`hrnet_*`": ("hrnet", {"width": 8, "num_blocks": 1, "num_modules": (1, 1, 1), "stem_blocks": 1}),
    "`internimage_*`": ("internimage", {"embed_dim": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8)}),
    "timm's pyramids": ("timm:test_efficientnet", {}),
    "timm's transformers": ("timm:vit_tiny_patch16_224", {"timm_args": SMALL_VIT}),
}
SMALL_STEP = ["model=fcn", "backbone=swin", "task_dictionary={include_semseg: true, include_depth: true}",
              "backbone_kwargs={embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], window_size: 4}",
              "image_size=[64, 64]", "trBatch=1", "device=cpu", "pretrained=false", "precision=fp16"]


def decoders() -> list[Row]:
    """A row per decoder: on each kind of backbone as it is, with a neck, or not at all."""
    return [{"`model`": f"`{name}`"} | {kind: _pair(name, *backbone) for kind, backbone in BACKBONE_KINDS.items()}
            for name in DECODERS]


def _pair(decoder: str, backbone: str, options: Mapping[str, Any]) -> str:
    for neck in NECKS:
        wide = {"embed_dim": 24} if "embed_dim" in {f.name for f in fields(NECKS.options(neck))} else {}
        try:
            with meta_device():
                build_model(decoder, backbone, {"semseg": 5, "depth": 1}, (64, 64), backbone_kwargs=options, neck=neck,
                            neck_kwargs=wide)
        except ValueError:
            continue
        return "yes" if neck == "none" else f"`{neck}`"
    return "-"


def balancing() -> list[Row]:
    """A row for all schemes that answer alike."""
    rows: dict[tuple, list[str]] = {}
    with _alone():
        for scheme in BALANCING:
            kind = BALANCING.load(scheme)
            answers = {"backward passes": "one per task" if issubclass(kind, GradientBalancing) else "1",
                       "`precision: fp16`, two passes per update, DDP": _yes(_updates(scheme)),
                       "`cuda_graph`": _yes(not kind.reads_values)}
            rows.setdefault(tuple(answers.items()), []).append(scheme)
    return [{"`loss_scheme`": ", ".join(f"`{scheme}`" for scheme in schemes), **dict(row)}
            for row, schemes in rows.items()]


def _updates(scheme: str) -> bool:
    """Whether an update in float16, of two passes, under DDP is finite and moves the backbone."""
    step = Step(load_config(ROOT / "configs" / "bim_nyud.yml", [*SMALL_STEP, f"loss_kwargs.loss_scheme={scheme}"]))
    step.wrapped, step.accumulate = DistributedDataParallel(step.model), 2
    weight = next(step.model.encoder.parameters())
    before = weight.detach().clone()
    step.model.train()
    outcome = step.update([step.batch, step.batch])
    return bool(outcome.sound) and not torch.equal(weight, before)


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def data_sets() -> list[Row]:
    """A row per data set, its tasks in columns; last, which tasks' predictions can be averaged at test time."""
    rows = [{"`train_db_name`": f"`{name}`"} | {task: _label(DATASETS.load(name).labels.get(task)) for task in TASKS}
            for name in DATASETS]
    rows.append({"`train_db_name`": "`{folder: DIR}`"} | {task: _yes(bool(kind)) for task, kind in
                                                          label_kinds().items()})
    rows.append({"`train_db_name`": "averaged by `test_time`"} | {task: _yes(TASKS.load(task).average is not None)
                                                                 for task in TASKS})
    return rows


def _label(label: LabelSpec | None) -> str:
    if label is None:
        return "-"
    return f"{len(label.classes)} classes" if label.classes else label.unit or "yes"


def modes() -> list[Row]:
    """A row per argument of the command line, run modes in columns."""
    rows = [{"argument": f"`{flag}`"} | {f"`{mode}`": _yes(mode in readers) for mode in MODES}
            for flag, (readers, _) in FLAGS.items()]
    rows.append({"argument": "`key=value` that says how a network is trained"}
                | {f"`{mode}`": _yes(mode == "train") for mode in MODES})
    rows.append({"argument": "`key=value` of all else"} | {f"`{mode}`": "yes" for mode in MODES})
    return rows


def _yes(answer: bool) -> str:
    return "yes" if answer else "-"


def text() -> str:
    """The tables, with a line above each."""
    parts = [("Decoders on backbones: as they are, with a `neck`, or not:", decoders()),
             ("Loss balancing:", balancing()),
             ("Data sets and tasks:", data_sets()), ("Arguments and run modes:", modes())]
    return "\n".join(f"{words}\n\n{markdown(rows)}\n" for words, rows in parts)


def combinations(write: bool) -> None:
    """Prints the tables, or puts them into the page."""
    if write:
        PAGE.write_text(with_part(PAGE.read_text(encoding="utf-8"), PART, text()), encoding="utf-8")
    else:
        print(text())


main = Command(__doc__, combinations, {
    "--write": dict(action="store_true", help="put the tables into docs/combinations.md"),
})

if __name__ == "__main__":
    sys.exit(main())
