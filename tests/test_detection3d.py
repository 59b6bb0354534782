"""3-D detection: reference numbers, targets and losses, decoding, suppression, the head on every decoder's maps."""

import dataclasses
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluation.detection3d import rotated_nms as nms_module
from evaluation.detection3d.decoding import Limits, decode
from evaluation.detection3d.rotated_nms import rotated_iou, rotated_nms, shared_area
from losses.detection3d.loss import Detection3DLoss
from losses.detection3d.options import Detection3DOptions
from losses.detection3d.points import REGRESSION, Grid, grid_of
from losses.detection3d.targets import targets_of
from losses.multi_task import images_of
from models.blocks.deformable_conv import ModulatedDeformableConv
from models.build import build_model
from models.decoders import DECODERS
from models.heads import FeatureLevels
from models.heads.detection3d import Detection3DHead
from scripts import bench_detection3d as bench
from scripts.check_parity import main as check_parity
from scripts.measuring import seconds
from tests.shared import golden
from tests.test_pairs import BACKBONES, REFUSED, SMALL
from utils.batches import to_device
from utils.boxes3d import Boxes3D, image_to_view
from utils.options import ConfigError, parse

OPTIONS = Detection3DOptions(channels=8, class_channels=(8, 4), norm_groups=2, ranges=(384, 768, 1536, 3072))
SHAPES, STRIDES = ((8, 16), (4, 8), (2, 4), (2, 4), (1, 2)), (8.0, 16.0, 32.0, 32.0, 64.0)  # an image of 64 x 128
SIZE = (64, 128)
NUM_POINTS = sum(height * width for height, width in SHAPES)


def some_boxes(number: int, dtype=torch.float32) -> Boxes3D:
    """Vehicles side by side, the widest of 60 pixels, before a camera that looks along the street."""
    generator = torch.Generator().manual_seed(number)
    intrinsics = torch.tensor([[100.0, 0, 64], [0, 100.0, 32], [0, 0, 1]], dtype=dtype)
    u = torch.linspace(8, 120, max(number, 1), dtype=dtype)[:number]
    depth = torch.linspace(5, 40, max(number, 1), dtype=dtype)[:number]
    projected = torch.stack([u, torch.full_like(u, 40), depth], dim=1)
    half = torch.rand(number, 2, generator=generator, dtype=dtype) * 20 + 2
    modal = torch.cat([projected[:, :2] - half, projected[:, :2] + half], dim=1)
    angles = torch.rand(number, 3, generator=generator, dtype=dtype) * 2 * math.pi - math.pi
    sizes = torch.rand(number, 3, generator=generator, dtype=dtype) + 1
    centers = image_to_view(projected, intrinsics)
    return Boxes3D(torch.arange(number) % 6, centers, projected, sizes, angles, modal, modal, intrinsics,
                   torch.eye(3, 4, dtype=dtype), torch.tensor(SIZE))


def some_output(batch: int, dtype=torch.float32) -> dict:
    """What an untrained head says, as leaves."""
    torch.manual_seed(0)
    channels = {"classes": 6, "regression": 13, "direction": 6, "centerness": 1}
    levels = {f"level{index}": {name: torch.randn(batch, number, *shape, dtype=dtype).requires_grad_()
                                for name, number in channels.items()} | {"stride": told(batch, stride)}
              for index, (shape, stride) in enumerate(zip(SHAPES, STRIDES, strict=True))}
    return {"levels": levels, "width": told(batch, SIZE[1]), "direction_offset": told(batch, OPTIONS.direction_offset)}


def told(batch: int, value: float) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def leaves(output: dict) -> list[Tensor]:
    return [value for level in output["levels"].values() for value in level.values() if value.requires_grad]


# ------------------------------------------------------------ reference numbers


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_everything_agrees_with_the_original(dtype, capsys):
    """Head, targets, losses, decoding, the whole model, the keys of full size; files, loader and score."""
    code = check_parity(["--golden", str(golden("cityscapes3d")), "--dtype", dtype])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    for part, cases in (("head", 2), ("keys", 1), ("targets", 6), ("losses", 4), ("decoding", 2), ("outputs", 1),
                        ("training", 1), ("gradient norms", 1), ("annotations", 7), ("prediction files", 2)):
        assert len(re.findall(rf"/{part} .* pass ", out)) == cases
    assert len(re.findall(r"metric_\w+: results .* pass ", out)) == 7 and " 0 not covered" in out


@pytest.mark.parametrize("file, key, failing", [
    ("head_odd.state", "cls_convs.2.conv.conv_offset.weight", ["head_odd/head"]),
    ("loss_two_images", "gt.0.bbox_modal", ["loss_two_images/annotations", "loss_two_images/losses",
                                            "loss_two_images/targets"]),
    ("decode_limits", "result.0.boxes", ["decode_limits/decoding"])])
def test_one_changed_array_fails(tmp_path, capsys, file, key, failing):
    folder = golden("cityscapes3d")
    for path in [*folder.glob(f"{file.partition('.')[0]}*"), folder / "annotations", folder / "predictions"]:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    path = tmp_path / f"{file}.safetensors"
    path.chmod(0o600)
    save_file({name: x * (1 + 3e-5) if name == key else x for name, x in load_file(path).items()}, path)
    assert check_parity(["--golden", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert sorted(re.findall(r": (\S+) .*FAIL", out)) == failing, out


# ------------------------------------------------------------ targets and losses


def test_a_point_learns_the_nearest_of_the_boxes_in_its_range():
    """By hand: the points of stride 32 near u = 48, v = 16 are (48, 16) and its neighbours 32 pixels away."""
    boxes = some_boxes(2, torch.float64)
    centre = torch.tensor([[48.0, 16, 9], [60, 16, 7]], dtype=torch.float64)
    modal = torch.tensor([[40.0, 10, 100, 30], [20, 10, 70, 30]], dtype=torch.float64)
    boxes = boxes._replace(projected=centre, modal=modal)
    targets = targets_of(Grid(SHAPES, told(5, 0) + torch.tensor(STRIDES)), boxes, OPTIONS.ranges, 0.0, 6)
    level2 = targets.labels[160:168].reshape(2, 4).tolist()  # columns 16, 48, 80, 112; rows 16, 48
    # Of the range 48 to 96: column 16 is 84 and 54 pixels from the right sides, column 48 is 52 from that of the first
    # box, column 80 is 60 from the left side of the second; column 112 is farther from both centres than 48.
    assert level2 == [[0, 0, 1, 6], [0, 0, 1, 6]]
    inside = targets.positive[(targets.positive >= 160) & (targets.positive < 168)].tolist()
    code = targets.code[targets.positive.tolist().index(161)]
    assert inside == [160, 161, 162, 164, 165, 166]
    assert code[:3].tolist() == [0, 0, 9] and (code[9:] * 32).tolist() == [8, 6, 52, 14]
    assert targets.centerness[targets.positive.tolist().index(161)] == 1


def test_no_boxes_give_a_zero_loss_and_zero_gradients():
    output = some_output(2)
    loss = Detection3DLoss(OPTIONS, 6)
    parts = loss.parts(output, [some_boxes(0), some_boxes(0)])
    assert all(value.item() == 0 for value in parts.values())
    loss(output, [some_boxes(0), some_boxes(0)]).backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves(output))


def test_images_without_boxes_do_not_count_even_where_their_output_is_not_finite():
    output, loss = some_output(3), Detection3DLoss(OPTIONS, 6)
    with torch.no_grad():
        for leaf in leaves(output):
            leaf[1] = torch.inf
    value = loss(output, [some_boxes(2), some_boxes(0), some_boxes(5)])
    alone = loss({**{key: output[key][::2] for key in ("width", "direction_offset")},
                  "levels": {name: {key: part[::2] for key, part in level.items()}
                             for name, level in output["levels"].items()}}, [some_boxes(2), some_boxes(5)])
    assert value.isfinite() and value.item() == alone.item()
    value.backward()
    assert all(torch.equal(leaf.grad[1], torch.zeros_like(leaf[1])) for leaf in leaves(output))


def test_the_loss_of_a_batch_can_be_taken_image_by_image():
    output, loss, boxes = some_output(2, torch.float64), Detection3DLoss(OPTIONS, 6), [some_boxes(3), some_boxes(1)]
    parts = [loss(*unit) for unit in zip(images_of(output), images_of(boxes), strict=True)]
    single = [loss(images_of(output)[0], [boxes[0]]), loss(images_of(output)[1], [boxes[1]])]
    assert parts == single and parts[0] != parts[1]
    with pytest.raises(ValueError, match="predictions of 2 images, boxes of 1"):
        loss(output, boxes[:1])


def test_gradients_are_those_of_differences():
    """Of the whole loss, in float64, along a random direction."""
    output, loss, boxes = some_output(1, torch.float64), Detection3DLoss(OPTIONS, 6), [some_boxes(4, torch.float64)]
    loss(output, boxes).backward()
    values, step = leaves(output), 1e-6
    ways = [torch.randn_like(value) for value in values]
    slope = sum((value.grad * way).sum().item() for value, way in zip(values, ways, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for value, way in zip(values, ways, strict=True):
                value += by * way
        return loss(output, boxes).item()
    ahead, behind = moved(step), moved(-2 * step)
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-5)


# ------------------------------------------------------------ decoding


@pytest.mark.parametrize("offset", [0.0, math.pi / 4])
@pytest.mark.parametrize("number", [0, 1, 6])
def test_what_a_perfect_network_says_becomes_the_boxes_again(offset, number):
    boxes, grid = some_boxes(number, torch.float64), Grid(SHAPES, torch.tensor(STRIDES, dtype=torch.float64))
    output = some_output(1, torch.float64)
    output["direction_offset"] = told(1, offset)
    targets = targets_of(grid, boxes, OPTIONS.ranges, offset, 6)
    flat = {name: torch.zeros(NUM_POINTS, count, dtype=torch.float64) for name, count in (
        ("regression", 13), ("classes", 6), ("direction", 6), ("centerness", 1))}
    flat["classes"] -= 9
    flat["regression"][targets.positive] = targets.code
    flat["classes"][targets.positive, targets.labels[targets.positive]] = 5
    flat["centerness"][targets.positive, 0] = 9 * targets.centerness
    flat["direction"].view(-1, 3, 2)[targets.positive] += nn.functional.one_hot(targets.direction, 2)
    start = 0
    for (height, width), level in zip(SHAPES, output["levels"].values(), strict=True):
        for name, values in flat.items():
            level[name] = values[start:start + height * width].T.reshape(1, -1, height, width)
        start += height * width
    [found] = decode(output, [boxes])
    assert found.labels.tolist() == sorted(boxes.labels.tolist())
    place = [boxes.labels.tolist().index(label) for label in found.labels.tolist()]
    torch.testing.assert_close(found.boxes[:, :6], torch.cat([boxes.centers, boxes.sizes], dim=1)[place])
    turned = found.boxes[:, 6:] - boxes.angles[place]
    torch.testing.assert_close(turned.cos(), torch.ones_like(turned))
    torch.testing.assert_close(found.projected, boxes.projected[place])
    limit = torch.tensor([*SIZE[::-1]] * 2, dtype=torch.float64)
    torch.testing.assert_close(found.boxes2d, boxes.modal[place].clamp(min=0).minimum(limit))
    assert torch.all(found.scores > 0.5)


def test_the_surest_are_kept_and_labels_do_not_suppress_each_other():
    output = some_output(2)
    with torch.no_grad():
        for level in output["levels"].values():
            level["regression"][:, :6] = torch.tensor([0, 0, 9, 4, 2, 1.5])[:, None, None]
            level["regression"][:, 9:] = 1
    everything, few = (decode(output, [some_boxes(0)] * 2, Limits(score=0.2, per_image=most)) for most in (1000, 9))
    for found, best in zip(everything, few, strict=True):
        assert len(found.labels.unique()) == 6 and found.labels.tolist() == sorted(found.labels.tolist())
        assert len(best.scores) == 9 < len(found.scores)
        assert best.scores.tolist() == found.scores.sort(descending=True).values[:9].tolist()
    with pytest.raises(ValueError, match="predictions of 2 images, cameras of 1"):
        decode(output, [some_boxes(0)])


def test_an_image_of_full_size_takes_little_time(capsys):
    """Targets, decoding and suppression under 60 ms of one core, also where every point is a candidate everywhere."""
    boxes = bench.street(30)
    for background in (bench.UNSURE, bench.SURE):
        output = bench.said(boxes, background)

        def run(output=output):
            grid = grid_of(output, 0, boxes.image_size[1])
            targets_of(grid, boxes, bench.OPTIONS.ranges, bench.OPTIONS.direction_offset, 6)
            return decode(output, [boxes])
        assert min(seconds(run, torch.device("cpu"))[1] for _ in range(5)) < 0.06
        found = run()[0]
        assert len(found.scores) == (30 if background == bench.UNSURE else 200)
    assert bench.main(["--repeats", "1"]) == 0 and "| noise | 200 | decoding" in capsys.readouterr().out


# ------------------------------------------------------------ suppression


def rectangles(number: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.column_stack([random.uniform(-3, 3, (number, 2)), random.uniform(0.5, 4, (number, 2)),
                            random.uniform(-7, 7, number)])


def clipped_area(first: np.ndarray, second: np.ndarray) -> float:
    """Sutherland and Hodgman: the first polygon is cut by every side of the second."""
    polygon, other = ([(x + c * dx + s * dy, y - s * dx + c * dy) for dx, dy in
                       ((w / 2, h / 2), (-w / 2, h / 2), (-w / 2, -h / 2), (w / 2, -h / 2))]
                      for x, y, w, h, a in (first, second) for s, c in [(math.sin(a), math.cos(a))])
    for (ax, ay), (bx, by) in zip(other, other[1:] + other[:1], strict=True):
        def side(point, ax=ax, ay=ay, bx=bx, by=by):
            return (bx - ax) * (point[1] - ay) - (by - ay) * (point[0] - ax)
        cut = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            if side(p) >= 0:
                cut.append(p)
            if (side(p) > 0) != (side(q) > 0) and side(p) != side(q):
                t = side(p) / (side(p) - side(q))
                cut.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = cut
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2


@pytest.mark.parametrize("second, area", [
    ([0, 0, 2, 2, 0.0], 4), ([0, 0, 2, 2, math.pi / 2], 4), ([0.5, 0, 1, 4, 0], 2), ([2, 0, 2, 2, 0], 0),
    ([0, 0, 1, 1, 0.7], 1), ([0, 0, 9, 9, 0.7], 4), ([1, 1, 2, 2, 0], 1), ([5, 0, 2, 2, 1], 0), ([0, 0, 0, 2, 0.3], 0),
    ([0, 0, 2, 2, math.pi / 4], 8 * (math.sqrt(2) - 1))])
def test_areas_by_hand(second, area):
    """A square of 2 x 2 with others: equal, turned, crossed, touching, inside, around, at a corner, apart, a line."""
    square, other = np.array([[0, 0, 2, 2, 0.0]]), np.array([second], dtype=float)
    assert shared_area(square, other)[0] == pytest.approx(area, abs=1e-12)
    assert shared_area(other, square)[0] == pytest.approx(area, abs=1e-12)
    assert rotated_iou(square, other)[0] == pytest.approx(area / (4 + second[2] * second[3] - area), abs=1e-12)


def test_areas_are_those_of_cut_polygons():
    first, second = rectangles(300, 0), rectangles(300, 1)
    want = [clipped_area(*pair) for pair in zip(first, second, strict=True)]
    np.testing.assert_allclose(shared_area(first, second), want, atol=1e-12)
    assert np.count_nonzero(want) > 100
    np.testing.assert_allclose(rotated_iou(first, first), 1, atol=1e-12)
    assert rotated_iou(np.zeros((1, 5)), np.zeros((1, 5)))[0] == 0


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_suppression_is_the_greedy_one(chunk, monkeypatch):
    monkeypatch.setattr(nms_module, "CHUNK", chunk)
    boxes, generator = rectangles(120, 2), torch.Generator().manual_seed(0)
    scores, groups = torch.rand(120, generator=generator), torch.randint(0, 3, (120,), generator=generator)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        over = (groups[index] == groups[other] and rotated_iou(boxes[None, index], boxes[None, other])[0] > 0.1
                for other in kept)
        if not any(over):
            kept.append(index)
    assert rotated_nms(torch.from_numpy(boxes), scores, groups, 0.1, 999).tolist() == kept
    assert rotated_nms(torch.from_numpy(boxes), scores, groups, 0.1, 5).tolist() == kept[:5]
    nothing = torch.zeros(0)
    assert len(rotated_nms(torch.zeros(0, 5), nothing, nothing, 0.1, 5)) == 0


# ------------------------------------------------------------ the head


def test_the_deformable_convolution_starts_as_half_an_ordinary_one():
    torch.manual_seed(0)
    layer, feat = ModulatedDeformableConv(3, 4), torch.randn(2, 3, 7, 9)
    nn.init.normal_(layer.bias)
    want = nn.functional.conv2d(feat, layer.weight, None, padding=1) / 2 + layer.bias[:, None, None]
    torch.testing.assert_close(layer(feat), want)


@pytest.mark.parametrize("stride, finest", [(4, 8), (8, 8), (16, 16), (1, 8), (16 / 3, 32 / 3)])
def test_one_map_becomes_a_pyramid(stride, finest):
    head = Detection3DHead(FeatureLevels((3,), (stride,), 256), 6, OPTIONS)
    assert head.strides == tuple(pytest.approx(finest * factor) for factor in (1, 2, 4, 8, 16))
    size = (round(64 / stride) + 1, round(256 / stride))
    levels = list(head(torch.randn(2, 3, *size))["levels"].values())
    assert [level["classes"].shape[-1] for level in levels] == [math.ceil(size[1] * stride / s) for s in head.strides]
    with pytest.raises(ValueError, match="needs one map or 4, got 2 of strides"):
        Detection3DHead(FeatureLevels((3, 3), (4, 8), 256), 6, OPTIONS)


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "taskdiffusion"])
def test_the_head_learns_on_every_decoder(decoder):
    torch.manual_seed(0)
    name, arguments = BACKBONES["vit" if "swin" in REFUSED.get(decoder, {}) else "swin"]
    model = build_model(decoder, name, {"depth": 1, "det3d": 6}, SIZE, model_kwargs=SMALL.get(decoder),
                        heads={"det3d": partial(Detection3DHead, options=OPTIONS)}, **arguments)
    out = model(torch.randn(2, 3, *SIZE))
    assert "det3d" not in out.intermediate
    loss = Detection3DLoss(OPTIONS, 6)(out.final["det3d"], [some_boxes(0), some_boxes(3)])
    (loss + sum(part.float().mean() for group in (out.intermediate, out.extra) for part in group.values())
     + out.final["depth"].mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []
    # TaskPrompter's Swin gives the pyramid, with the strides of its levels; the others one map.
    finest, *_, last, _ = model.heads["det3d"].strides
    assert (finest, last) == (8, 32) if decoder == "taskprompter" else last == 8 * finest >= 64


def test_an_image_can_be_learnt_by_heart():
    torch.manual_seed(0)
    head = Detection3DHead(FeatureLevels((16,), (4,), SIZE[1]), 6, dataclasses.replace(
        OPTIONS, channels=32, class_channels=(32, 16), norm_groups=8))
    feat, boxes, loss = torch.randn(1, 16, 16, 32), some_boxes(3), Detection3DLoss(OPTIONS, 6)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    values = []
    for _ in range(110):
        optimizer.zero_grad()
        values.append(loss(head(feat), [boxes]))
        values[-1].backward()
        nn.utils.clip_grad_norm_(head.parameters(), 10.0)
        optimizer.step()
    assert values[-1] < 0.1 * values[0]
    [found] = decode(head(feat), [boxes], Limits(score=0.25))
    assert found.labels.unique().tolist() == [0, 1, 2]
    best = found.boxes[[found.labels.tolist().index(label) for label in (0, 1, 2)]]
    assert torch.all((best[:, 2] / boxes.centers[:, 2] - 1).abs() < 0.25)
    assert torch.all((best[:, 3:6] - boxes.sizes).abs() < 0.25)
    assert torch.all((best[:, 6:] - boxes.angles).cos() > 0.9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_gives_the_same():
    """Head, loss, gradients and decoding, in float64."""
    torch.manual_seed(0)
    head = Detection3DHead(FeatureLevels((3,) * 4, (8, 16, 32, 32), 128), 6, OPTIONS).double()
    feats = [torch.randn(2, 3, *shape, dtype=torch.float64) for shape in SHAPES[:4]]
    results = []
    for device in ("cpu", "cuda"):
        head.to(device).zero_grad()
        boxes = [to_device(some_boxes(number, torch.float64), torch.device(device)) for number in (0, 4)]
        output = head([feat.to(device) for feat in feats])
        loss = Detection3DLoss(OPTIONS, 6)(output, boxes)
        loss.backward()
        cameras = [some_boxes(0, torch.float64)] * 2  # which stay on the host
        found = decode(output, cameras, Limits(score=0.0))
        results.append([loss.detach().cpu(), *(p.grad.to("cpu", copy=True) for p in head.parameters()),
                        *(value.cpu() for image in found for value in image)])
    for cpu, card in zip(*results, strict=True):
        torch.testing.assert_close(card, cpu, rtol=1e-8, atol=1e-10)


def test_options_are_checked():
    for options, message in (({"norm_groups": 5}, "norm_groups' must be a divisor of channels"),
                             ({"ranges": [96, 192, 384]}, "ranges' must be 4 growing positive numbers"),
                             ({"ranges": [192, 96, 384, 768]}, "4 growing"),
                             ({"class_channels": []}, "one or more widths"),
                             ({"direction_offset": 3.2}, r"an angle in \[0, pi\)"), ({"channels": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            parse(Detection3DOptions, options)
    assert sum(REGRESSION.values()) == 13
