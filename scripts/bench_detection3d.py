"""What 3-D detection costs beside the network: targets of an image of 1024 x 2048, decoding and suppression.

    OMP_NUM_THREADS=1 python scripts/bench_detection3d.py [--device cuda]

The scene has `--boxes` vehicles and a network that finds each of them at several points. The noise has all its points
above the threshold in every class: the worst that a network can say. Medians of `--repeats`, in milliseconds.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from evaluation.detection3d.decoding import decode
from losses.detection3d.options import Detection3DOptions
from losses.detection3d.points import Grid, Output, grid_of
from losses.detection3d.targets import targets_of
from scripts.command_line import Command
from scripts.measuring import markdown, measure
from utils.batches import to_device
from utils.boxes3d import Boxes3D, view_to_image

SIZE, NUM_CLASSES = (1024, 2048), 6
GRID = Grid(((96, 192), (48, 96), (24, 48), (24, 48), (12, 24)),
            torch.tensor([8, 16, 32, 32, 64], dtype=torch.float64) / 0.75)
OPTIONS = Detection3DOptions()
SURE, UNSURE = 3.0, -7.0


def street(number: int) -> Boxes3D:
    """Cars from 6 to 66 m away, before a camera like that of Cityscapes."""
    draw = torch.Generator().manual_seed(0)
    z = torch.rand(number, generator=draw, dtype=torch.float64) * 60 + 6
    x = (torch.rand(number, generator=draw, dtype=torch.float64) - 0.5) * 0.8 * z
    centers = torch.stack([x, torch.full_like(x, 1.3), z], dim=1)
    intrinsics = torch.tensor([[2262.0, 0, 1097], [0, 2265, 513], [0, 0, 1]], dtype=torch.float64)
    projected = view_to_image(centers, intrinsics)
    half = 2262 / z[:, None] * torch.tensor([1.0, 0.8], dtype=torch.float64)
    modal = torch.cat([projected[:, :2] - half, projected[:, :2] + half], dim=1)
    angles = (torch.rand(number, 3, generator=draw, dtype=torch.float64) * 2 - 1) * math.pi
    sizes = torch.tensor([[4.2, 1.8, 1.5]], dtype=torch.float64).repeat(number, 1)
    return Boxes3D(torch.arange(number) % NUM_CLASSES, centers, projected, sizes, angles, modal, modal, intrinsics,
                   torch.eye(3, 4, dtype=torch.float64), torch.tensor(SIZE))


def said(boxes: Boxes3D, background: float) -> Output:
    """The output of a network that nearly knows these boxes, with such a logit for all other points."""
    draw, targets = torch.Generator().manual_seed(1), targets_of(GRID, boxes, OPTIONS.ranges, OPTIONS.direction_offset,
                                                                 NUM_CLASSES)
    points = len(targets.labels)
    classes = torch.randn(points, NUM_CLASSES, generator=draw) * 0.3 + background
    classes[targets.positive, targets.labels[targets.positive]] = SURE
    regression = torch.rand(points, 13, generator=draw) * 60
    regression[:, 3:6] = torch.tensor([4.2, 1.8, 1.5])
    noise = torch.randn(len(targets.code), 13, generator=draw) * 0.05
    regression[targets.positive] = targets.code.float() + noise
    direction, centerness = torch.randn(points, 6, generator=draw), torch.ones(points, 1)
    levels, start = {}, 0
    for index, ((height, width), stride) in enumerate(zip(GRID.shapes, GRID.strides, strict=True)):
        here = slice(start, start := start + height * width)
        maps = {"classes": classes, "regression": regression, "direction": direction, "centerness": centerness}
        levels[f"level{index}"] = {name: value[here].T.reshape(1, -1, height, width) for name, value in maps.items()}
        levels[f"level{index}"]["stride"] = stride.reshape(1)
    return {"levels": levels, "width": torch.tensor([SIZE[1]], dtype=torch.float64),
            "direction_offset": torch.tensor([OPTIONS.direction_offset], dtype=torch.float64)}


def bench(device: str, boxes: int, repeats: int) -> None:
    """Prints a table in Markdown."""
    place, rows = torch.device(device), []
    scene = to_device(street(boxes), place)
    for name, background in (("scene", UNSURE), ("noise", SURE)):
        output = to_device(said(street(boxes), background), place)
        costs = measure({
            "targets": lambda output=output: targets_of(grid_of(output, 0, scene.image_size[1]), scene, OPTIONS.ranges,
                                                        OPTIONS.direction_offset, NUM_CLASSES),
            "decoding and suppression": lambda output=output: decode(output, [scene])}, repeats, place)
        kept = len(decode(output, [scene])[0].scores)
        rows += [{"network": name, "vehicles found": kept, "part": part, "ms": cost.ms, "processor ms": cost.cpu_ms}
                 for part, cost in costs.items()]
    print(f"{torch.get_num_threads()} thread(s), {device}, {boxes} vehicles, {repeats} repeats\n\n{markdown(rows)}")


main = Command(__doc__, bench, {
    "--device": dict(default="cpu", help="cpu or cuda"),
    "--boxes": dict(type=int, default=30, help="vehicles of the scene"),
    "--repeats": dict(type=int, default=21, help="of every part"),
})

if __name__ == "__main__":
    sys.exit(main())
