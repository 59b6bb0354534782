"""Which parts of each decoder its figure shows, and in what order the data passes them.

A part is named by its path in the built model, which says what it is made of, how many parameters it has and which maps
leave it; only the words beside these stand here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.docs_site.figure import Arrow


@dataclass(frozen=True)
class Step:
    """A line of a box: what happens, and the part that does it."""

    words: str
    path: str


@dataclass(frozen=True)
class Box:
    """A box of the decoder.

    shape: the part whose map is written below, with the letters of its axes; `<` in front: the map that enters it,
    `<1`: what else does. of: whose map that is, in words. every_task: a box for each task, whose name is {task}.
    colour: "all": tasks meet; "own": each task alone; "map": before there are tasks.
    """

    name: str
    row: int
    column: float
    title: str
    steps: Sequence[Step | str]
    shape: tuple[str, str] | None = None
    of: str = ""
    span: int = 1
    every_task: bool = False
    colour: str = "all"


@dataclass(frozen=True)
class Figure:
    """One decoder: the experiment that is built, its boxes below the maps (rows from 3 on), and the arrows."""

    experiment: str
    boxes: Sequence[Box]
    arrows: Sequence[Arrow | tuple[str, str]]
    maps_note: str = ""                 # what a map of this backbone is
    unread: Sequence[int] = ()
    heads_from: Sequence[str] = ()
    notes: Sequence[tuple[int, float, int, Sequence[str]]] = field(default=())      # row, column, span, lines


def stages(prefix: Sequence[tuple[str, str]], shape: str) -> tuple[list[Box], list[tuple[str, str]]]:
    """Three stages from coarse to fine, each below the map that joins it."""
    boxes, arrows = [], []
    for index in range(3):
        steps = [Step(words, path.format(index)) for words, path in prefix]
        boxes.append(Box(f"stage{index}", 3 + index, 2 - index, f"stage {index + 1}", steps,
                         (shape.format(index), "t b h w c"), "each: "))
        arrows += [(f"stage{index - 1}" if index else "map3", f"stage{index}"), (f"map{2 - index}", f"stage{index}")]
    return boxes, arrows


BIM_BOXES, BIM_ARROWS = stages([("up, to half the width:", "decoder.stages.{}.expand"),
                                ("join the map:", "decoder.stages.{}.fuse"),
                                ("each task alone:", "decoder.stages.{}.msst"),
                                ("all tasks at once:", "decoder.stages.{}.bcfr")], "decoder.stages.{}")
MTMAMBA_BOXES, MTMAMBA_ARROWS = stages([("up, to half the width:", "decoder.stm.{}.expand"),
                                        ("join the map:", "decoder.stm.{}.fuse"),
                                        ("each task alone:", "decoder.stm.{}.stm"),
                                        ("all tasks:", "decoder.ctm.{}")], "decoder.ctm.{}")
TAPS = "one width and stride: taps of the ViT"

FIGURES = {
    "bim": Figure("configs/bim_nyud.yml", BIM_BOXES, BIM_ARROWS, heads_from=("stage2",), notes=[
        (4, 2, 2, ["MSSTLayer: MS-Scan, four routes over the task's map, groups of channels at the granularities "
                   "1, 2, 4.",
                   "BCFRBlock: BI-Scan, one sequence of all pixels of all tasks, task by task and pixel by pixel, "
                   "half of the channels forward, half backward."])]),
    "mtmamba": Figure("configs/mtmamba_nyud.yml", MTMAMBA_BOXES, MTMAMBA_ARROWS, heads_from=("stage2",), notes=[
        (4, 2, 2, ["STMLayer: gated SS2D, four scans over the task's map.",
                   "CTMBlock: one SS2D over the channels of all tasks, one over each task's own; a gate per pixel and "
                   "channel chooses between the two."])]),
    "mtmamba_plus": Figure("configs/mtmamba_plus_nyud.yml", MTMAMBA_BOXES, MTMAMBA_ARROWS, heads_from=("stage2",),
                           notes=[
        (4, 2, 2, ["STMLayer: gated SS2D, four scans over the task's map.",
                   "SCTMBlock: all tasks fused to one map, which gives every task's scan its step sizes and its input "
                   "and output maps."])]),
    "invpt": Figure("configs/invpt_nyud.yml", [
        Box("preliminary", 3, 3, "preliminary, each task", [
            Step("feature:", "decoder.preliminary.{task}"), Step("rough prediction:", "decoder.intermediate.{task}"),
            Step("joined:", "decoder.mix.{task}")], ("decoder.mix.{task}", "b c h w"), "each: ", colour="own"),
        Box("stage0", 4, 3, "stage 1", [Step("all tasks and pixels:", "decoder.stages.0.attention"),
                                        Step("", "decoder.stages.0.mlp")], ("decoder.stages.0", "b c h w"), "each: "),
        Box("stage1", 5, 1, "stage 2", [Step("up:", "decoder.stages.1.up"), Step("skip:", "decoder.skip_middle"),
                                        Step("all tasks and pixels:", "decoder.stages.1.attention"),
                                        Step("", "decoder.stages.1.mlp")], ("decoder.stages.1", "b c h w"), "each: "),
        Box("stage2", 6, 0, "stage 3", [Step("up:", "decoder.stages.2.up"), Step("skip:", "decoder.skip_fine"),
                                        Step("all tasks and pixels:", "decoder.stages.2.attention"),
                                        Step("", "decoder.stages.2.mlp")], ("decoder.stages.2", "b c h w"), "each: "),
        Box("sum", 7, 0, "sum of the stages at the finest grid", [
            Step("", "decoder.aggregate"), Step("each task:", "decoder.project.{task}")],
            ("decoder.project.{task}", "b c h w"), "each: ", span=4)],
        [("map3", "preliminary"), ("preliminary", "stage0"), ("stage0", "stage1"), ("stage1", "stage2"),
         ("map1", "stage1"), ("map0", "stage2"), ("stage0", "sum"), ("stage1", "sum"), ("stage2", "sum")],
        TAPS, unread=(2,), heads_from=("sum",), notes=[
            (5, 2, 1, ["Each stage hands its attention scores, before the softmax, to the next one."])]),
    "taskprompter": Figure("configs/taskprompter_nyud.yml", [
        *(Box(f"level{i}", 3, i, f"level {i + 1}, each task", [
            Step("its prompt's scores times the map:", f"decoder.levels.{i}.{{task}}")],
            (f"decoder.levels.{i}.{{task}}", "b c h w"), "each: ", colour="own") for i in range(4)),
        Box("sum", 4, 0, "sum of the levels, enlarged four times, each task", [], ("<heads.{task}", "b c h w"),
            "each: ", span=4, colour="own")],
        [*((f"map{i}", f"level{i}") for i in range(4)), *((f"level{i}", "sum") for i in range(4))],
        "with one prompt per task: its scores towards positions and channels", heads_from=("sum",)),
    "mlore": Figure("configs/mlore_nyud.yml", [
        *(Box(f"tap{i}", 3, i, f"tap {i + 1}", [Step("", f"decoder.tap_proj.{i}"),
                                                 Step("each task:", f"decoder.first.{i}"),
                                                 Step("each task:", f"decoder.second.{i}")],
              (f"decoder.tap_proj.{i}", "b c h w"), "each: ") for i in range(4)),
        Box("mix", 4, 0, "taps weighted per pixel, each task", [Step("weights:", "decoder.mix")],
            ("<heads.{task}", "b c h w"), "each: ", span=4, colour="own")],
        [*((f"map{i}", f"tap{i}") for i in range(4)), *((f"tap{i}", "mix") for i in range(4))],
        TAPS, heads_from=("mix",), notes=[
            (6, 0, 4, ["MLoREModule: the gated sum of low-rank experts that all tasks share + the task's own expert + "
                       "one convolution common to all tasks. The gates depend on the image and the task; for inference "
                       "all of it is one 3 x 3 convolution per image and task."])]),
    "taskdiffusion": Figure("configs/taskdiffusion_nyud.yml", [
        *(Box(f"tap{i}", 3, i, f"tap {i + 1}, once per image", [Step("", f"decoder.tap_proj.{i}"),
                                                 Step("each task:", f"decoder.features.{i}")],
              (f"decoder.tap_proj.{i}", "b c h w"), "each: ", colour="own") for i in range(4)),
        *(Box(f"level{i}", 4, i, f"level {i + 1}", [Step("latent joins; gates mix the tasks:", f"decoder.levels.{i}")],
              (f"decoder.levels.{i}", "b c h w"), "each: ") for i in range(4)),
        Box("bus", 5, 0, "", ["every task takes its maps of all levels, weighted per pixel"], span=4,
            colour="own"),
        Box("stage", 6, 0, "{task}", [
            Step("weights:", "decoder.stages.{task}.levels"), Step("", "decoder.stages.{task}.blocks"),
            Step("", "decoder.stages.{task}.predict"), Step("in training also:", "decoder.preliminary.{task}")],
            ("decoder.stages.{task}", "b c h w"), "", every_task=True, colour="own"),
        Box("codes", 7, 0, "predictions, coded: the next latent", [
            Step("", "decoder.codes"), Step("how noisy it is:", "decoder.noise_level")],
            ("<1decoder.levels.0", "b c h w"), "latent: ", span=4)],
        [*((f"map{i}", f"tap{i}") for i in range(4)), *((f"tap{i}", f"level{i}") for i in range(4)),
         *((f"level{i}", "bus") for i in range(4)), *(("bus", f"stage{i}") for i in range(4)),
         *((f"stage{i}", "codes") for i in range(4)), Arrow("codes", "level3", around=True)], TAPS),
    "bridgenet": Figure("configs/backbones/bridgenet_nyud_vit_large.yml", [
        Box("preliminary", 3, 3, "preliminary, each task", [
            Step("feature:", "decoder.preliminary.{task}"),
            Step("its pattern:", "decoder.produce.{task}"), Step("all patterns:", "decoder.fuse.{task}"),
            Step("rough prediction:", "decoder.intermediate.{task}"), Step("joined:", "decoder.mix.{task}")],
            ("decoder.mix.{task}", "b c h w"), "each: "),
        *(Box(f"stage{i}", 4 + i, 3 - i, f"stage {i + 1}", [
            *([Step("up:", f"decoder.stages.{i}.up"), Step("lateral:", f"decoder.lateral_{name}")] if i else []),
            Step("bridge: the map asks all tasks:", f"decoder.stages.{i}.extract"),
            Step("each task, with the bridge:", f"decoder.stages.{i}.refine")],
              (f"decoder.stages.{i}", "b c h w"), "each: ")
          for i, name in enumerate(("", "middle", "fine"))),
        Box("sum", 7, 0, "sum of the stages at the finest grid", [
            Step("", "decoder.aggregate"), Step("each task:", "decoder.project.{task}")],
            ("decoder.project.{task}", "b c h w"), "each: ", span=4)],
        [("map3", "preliminary"), ("preliminary", "stage0"), Arrow("map3", "stage0", around=True), ("stage0", "stage1"),
         ("stage1", "stage2"), ("map2", "stage1"), ("map1", "stage2"), ("stage0", "sum"), ("stage1", "sum"),
         ("stage2", "sum")], TAPS, unread=(0,), heads_from=("sum",)),
    "demt": Figure("configs/demt_nyud.yml", [
        Box("fuse", 3, 0, "all maps at the finest size, joined and reduced", [Step("", "decoder.fuse")],
            ("decoder.fuse", "b h w c"), span=4, colour="map"),
        Box("mixer", 4, 0, "{task}", [Step("resampled:", "decoder.mixers.{task}")],
            ("decoder.mixers.{task}.0", "b c h w"), "each: ", every_task=True, colour="own"),
        Box("interaction", 5, 0, "tokens of all tasks", [Step("", "decoder.interaction")], span=4),
        Box("query", 6, 0, "{task}", [
            Step("own tokens ask those of all tasks, pixel by pixel:", "decoder.queries.{task}"),
            Step("", "decoder.project.{task}")],
            ("decoder.project.{task}", "b c h w"), "each: ", every_task=True)],
        [*((f"map{i}", "fuse") for i in range(4)), *(("fuse", f"mixer{i}") for i in range(4)),
         *((f"mixer{i}", "interaction") for i in range(4)), *(("interaction", f"query{i}") for i in range(4))],
        heads_from=("query",)),
    "fcn": Figure("configs/baselines/fcn_nyud_swin_tiny.yml", [
        Box("join", 3, 0, "all maps at the finest size, joined", [], ("<decoder.project.{task}", "b c h w"), span=4,
            colour="map"),
        Box("project", 4, 0, "{task}", [Step("", "decoder.project.{task}")], ("decoder.project.{task}", "b c h w"),
            "each: ", every_task=True, colour="own")],
        [*((f"map{i}", "join") for i in range(4)), *(("join", f"project{i}") for i in range(4))],
        heads_from=("project",)),
    "multi_scale": Figure("configs/baselines/multi_scale_nyud_swin_tiny.yml", [
        Box("bus", 3, 0, "", ["every task takes all maps"], span=4, colour="map"),
        Box("pyramid", 4, 0, "{task}", [
            Step("to one width:", "decoder.pyramid.{task}.lateral"),
            Step("coarse to fine:", "decoder.pyramid.{task}.smooth"), "summed at the finest"],
            ("decoder.pyramid.{task}", "b c h w"), "each: ", every_task=True, colour="own")],
        [*((f"map{i}", "bus") for i in range(4)), *(("bus", f"pyramid{i}") for i in range(4))],
        heads_from=("pyramid",)),
}

