"""Loaders equal the published ones on tiny data sets; every broken data folder gives one clear sentence."""

import itertools
import json
import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.morphology import thin as skimage_thin

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.datasets.pascal_context import NORMALS_IDS, has_people
from data.labels import MapLabel
from data.loader import EvalSampler, TrainBatchSampler, build_eval_loader, build_train_loader
from data.transforms import build_transform, fixed_transform
from evaluation.boundary.thinning import thin
from tests.shared import golden, real_data
from utils.engine.tasks import TASKS, label_rules
from utils.files import read_depth, read_rgb


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Recorded loaders ------------------------------------------------------------------------------------------

@pytest.fixture
def db_root(tmp_path):
    for spec in (DATASETS.load(name) for name in DATASETS):
        shutil.copytree(golden("metrics") / f"fixture_{spec.folder}", tmp_path / spec.folder, dirs_exist_ok=True)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)      # the reference numbers may be read-only
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["NYUD", "PASCALContext"])
def test_equals_recorded_loader(name, split, db_root):
    spec = DATASETS.load(name)
    before = tree(db_root)
    dataset = MultiTaskDataset(DATASETS.load(name), db_root, split, label_rules(spec.tasks))
    with np.load(golden("metrics") / f"fixture_{spec.folder}_expected.npz") as file:
        expected = {key: file[key] for key in file.files if key.startswith(f"{split}/")}
    assert {key.split("/")[1] for key in expected} == set(dataset.ids)
    for index, image_id in enumerate(dataset.ids):
        sample = dataset[index]
        assert sample["meta"] == {"name": image_id, "size": sample["image"].shape[:2]}
        for key in ("image", *spec.tasks):
            want = expected[f"{split}/{image_id}/{key}"]
            tolerance = 1 if name == "PASCALContext" and key == "image" else 0     # JPEG decoders may differ
            assert sample[key].shape == want.shape
            assert sample[key].dtype == (np.uint8 if key == "image" else np.float32)
            np.testing.assert_allclose(sample[key], want, rtol=0, atol=tolerance, err_msg=f"{image_id} {key}")
        if name == "PASCALContext":
            people = has_people(*dataset.paths("human_parts", image_id))
            assert people == expected[f"{split}/{image_id}/has_human_parts"]
    assert tree(db_root) == before, "loading must not write into the data folder"


@pytest.mark.parametrize(("name", "void"), [("Cityscapes", 255), ("CityscapesMTMamba", -1)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_equals_recorded_cityscapes(split, name, void, db_root):
    tasks = label_rules(("semseg", "depth"))
    dataset = MultiTaskDataset(DATASETS.load(name), db_root, split, tasks, fixed_transform((16, 32), tasks))
    with np.load(golden("metrics") / "fixture_cityscapes_expected.npz") as file:
        for index in range(len(dataset)):
            sample = dataset[index]
            want = {key: file[f"{split}/{index}/{key}"] for key in ("image", "semseg", "depth")}
            assert sample["meta"] == {"name": str(file[f"{split}/{index}/name"]), "size": (32, 64)}
            np.testing.assert_array_equal(sample["image"], want["image"])
            np.testing.assert_array_equal(sample["semseg"][0], want["semseg"])
            np.testing.assert_array_equal(sample["depth"], np.where(want["depth"] == -1, void, want["depth"]))


def test_pascal_normals_classes_equal_recorded_list():
    recorded = json.loads((golden("metrics") / "pascal_normals_valid_ids.json").read_text())
    assert list(NORMALS_IDS) == recorded and len(recorded) == 170


def test_parts_alone_leave_out_images_without_people(db_root):
    alone = MultiTaskDataset(DATASETS.load("PASCALContext"), db_root, "train", label_rules(("human_parts",)))
    assert alone.ids == ["2008_000001", "2009_000002"]
    both = MultiTaskDataset(DATASETS.load("PASCALContext"), db_root, "train", label_rules(("human_parts", "sal")))
    assert len(both) == 3


def test_specs_list_tasks_in_table_order_with_names_for_every_class():
    for spec in (DATASETS.load(name) for name in DATASETS):
        assert list(spec.tasks) == [task for task in TASKS if task in spec.tasks]
        for label in spec.labels.values():
            assert not label.classes or len(label.classes) == label.channels == len(set(label.classes))


# A made-up NYUD --------------------------------------------------------------------------------------------

def write_nyud(root: Path, num_train: int = 6, num_val: int = 5, size: tuple[int, int] = (20, 24)) -> Path:
    folder = root / "NYUDv2"
    for name in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = [f"{i:04d}" for i in range(num_train + num_val)]
    for image_id in ids:
        pictures = {"images": rng.integers(0, 256, (*size, 3)), "normals": rng.integers(0, 256, (*size, 3)),
                    "segmentation": rng.integers(0, 41, size), "edge": rng.choice([0, 255], size)}
        for name, picture in pictures.items():
            cv2.imwrite(str(folder / name / f"{image_id}.png"), picture.astype(np.uint8))
        np.save(folder / "depth" / f"{image_id}.npy", rng.uniform(1, 5, size).astype(np.float32))
    (folder / "gt_sets" / "train.txt").write_text("\n".join(ids[:num_train]) + "\n")
    (folder / "gt_sets" / "val.txt").write_text("\n".join(ids[num_train:]) + "\n")
    return folder


@pytest.fixture
def nyud(tmp_path):
    return write_nyud(tmp_path)


NYUD_LABELS = label_rules(DATASETS.load("NYUD").tasks)


def open_nyud(folder, split="train", labels=NYUD_LABELS, transform=None):
    return MultiTaskDataset(DATASETS.load("NYUD"), folder.parent, split, labels, transform)


def test_the_data_set_folder_itself_is_accepted_as_root(nyud):
    assert MultiTaskDataset(DATASETS.load("NYUD"), nyud, "val", NYUD_LABELS).ids == open_nyud(nyud, "val").ids


def test_only_the_files_of_the_tasks_in_use_are_needed(nyud):
    shutil.rmtree(nyud / "normals")
    shutil.rmtree(nyud / "edge")
    dataset = open_nyud(nyud, labels=label_rules(("depth", "semseg")))
    assert set(dataset[0]) == {"image", "semseg", "depth", "meta"}


def break_missing_root(folder):
    shutil.rmtree(folder)


def break_split_file(folder):
    (folder / "gt_sets" / "train.txt").unlink()


def break_empty_split(folder):
    (folder / "gt_sets" / "train.txt").write_text("\n")


def break_label_files(folder):
    for path in sorted((folder / "depth").iterdir()):
        path.unlink()


@pytest.mark.parametrize(("damage", "error", "message"), [
    (break_missing_root, FileNotFoundError, r"data folder not found: .*NYUDv2 \(set db_root .*\$DB_ROOT"),
    (break_split_file, FileNotFoundError, r"split file not found: .*train\.txt"),
    (break_empty_split, ValueError, r"split 'train' of NYUD in .* lists no images"),
    (break_label_files, FileNotFoundError,
     r"6 file\(s\) of split 'train' \(6 images\) missing in .*: depth/0000\.npy, .*/0004\.npy and 1 more"),
])
def test_a_broken_folder_is_refused_at_the_start(damage, error, message, nyud):
    damage(nyud)
    with pytest.raises(error, match=message):
        open_nyud(nyud)


def test_unknown_names_list_the_valid_ones(nyud):
    with pytest.raises(ValueError, match="unknown data set 'KITTI'; known: NYUD, PASCALContext, Cityscapes"):
        MultiTaskDataset(DATASETS.load("KITTI"), nyud.parent, "train", NYUD_LABELS)
    with pytest.raises(ValueError, match="NYUD has no split 'test'; valid: train, val"):
        open_nyud(nyud, "test")
    with pytest.raises(ValueError, match="no labels for sal; its tasks: semseg, depth, normals, edge"):
        open_nyud(nyud, labels=label_rules(("sal", "depth")))


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def write_values(path, array):
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)


FULL = np.ones((20, 24), np.float32)


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("images/0000.png", halve, r"cannot read .*images/0000\.png: .*damaged"),
    ("depth/0000.npy", halve, r"cannot read .*depth/0000\.npy: .*damaged"),
    ("edge/0000.png", lambda p: p.write_bytes(b""), r"cannot read .*edge/0000\.png"),
    ("segmentation/0000.png", lambda p: write_values(p, np.full((20, 24), 41, np.uint8)),
     r"segmentation/0000\.png: label value\(s\) 41 out of range; valid: 0\.\.40"),
    ("segmentation/0000.png", lambda p: write_values(p, np.zeros((20, 24, 3), np.uint8)),
     r"segmentation/0000\.png: expected 1 channel\(s\) of 8 bits, found 3"),
    ("normals/0000.png", lambda p: write_values(p, np.zeros((20, 24), np.uint8)), r"expected 3 channel\(s\)"),
    ("depth/0000.npy", lambda p: write_values(p, FULL * 2500), r"0000\.npy: depth 2500\.\.2500 m is outside"),
    ("depth/0000.npy", lambda p: write_values(p, FULL * -1), r"depth -1\.\.-1 m is outside"),
    ("depth/0000.npy", lambda p: write_values(p, FULL * np.nan), r"depth nan\.\.nan m is outside"),
    ("depth/0000.npy", lambda p: write_values(p, np.ones((20, 24, 2))), r"one channel .*\(20, 24, 2\)"),
])
def test_a_bad_file_is_named(file, damage, message, nyud):
    damage(nyud / file)
    dataset = open_nyud(nyud)
    dataset[1]
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_labels_of_another_size_are_brought_to_the_image(nyud):
    quarters = np.kron([[1, 2], [3, 4]], np.ones((5, 6)))
    write_values(nyud / "segmentation" / "0000.png", quarters.astype(np.uint8))
    small = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    write_values(nyud / "normals" / "0000.png", small)
    sample = open_nyud(nyud)[0]
    np.testing.assert_array_equal(sample["semseg"][..., 0], np.kron([[0, 1], [2, 3]], np.ones((10, 12))))
    cubic = cv2.resize((2 * small.astype(np.float32) / 255 - 1), (24, 20), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(sample["normals"], cubic, atol=1e-6)
    assert MapLabel().fit(np.zeros((4, 5, 1), np.float32), (8, 3)).shape == (8, 3, 1)
    assert MapLabel().fit(np.zeros((4, 5, 1), np.float32), (2, 3)).shape == (2, 3, 1)     # a larger one too


def test_augmentation_depends_on_the_given_seed_only(nyud):
    transform = build_transform((16, 16), None, True, NYUD_LABELS)
    first, again = open_nyud(nyud, transform=transform), open_nyud(nyud, transform=transform)
    random.seed(1)
    a = first[(2, 77)]
    random.seed(2)
    again[(1, 5)]
    assert torch.equal(a["image"], again[(2, 77)]["image"])
    assert not torch.equal(a["image"], again[(2, 78)]["image"])


# Single files ----------------------------------------------------------------------------------------------

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK"])
def test_read_rgb_accepts_every_kind_of_picture(mode, tmp_path):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    grey = Image.fromarray(GREY)
    (Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)).save(path)
    want = np.where(GREY >= 128, 255, 0) if mode == "1" else GREY
    got = read_rgb(path)
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8
    if mode == "1":
        assert set(np.unique(got)) == {0, 255}             # dithered
    else:
        np.testing.assert_array_equal(got, np.repeat(want[..., None], 3, axis=2))


def test_read_rgb_turns_photographs_upright_unless_told(tmp_path):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6                                       # orientation: turn 90 degrees clockwise to view
    Image.fromarray(GREY).convert("RGB").save(path, exif=exif)
    np.testing.assert_array_equal(read_rgb(path)[..., 0], np.rot90(GREY, -1))
    np.testing.assert_array_equal(read_rgb(path, apply_exif=False)[..., 0], GREY)


def test_a_truncated_photograph_is_an_error(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)
    halve(path)
    with pytest.raises(ValueError, match="cannot read .*photo.jpg"):
        read_rgb(path)


def test_read_depth_units(tmp_path):
    stored = np.array([[0, 1500], [2000, 65535]], np.uint16)
    Image.fromarray(stored).save(tmp_path / "depth.png")
    np.save(tmp_path / "depth.npy", stored.astype(np.float64) / 1000)
    for depth in (read_depth(tmp_path / "depth.png", "mm"), read_depth(tmp_path / "depth.npy", "m")):
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth[..., 0], [[0, 1.5], [2, 65.535]], rtol=1e-6)
    with pytest.raises(ValueError, match="unknown depth unit 'inch'; valid: m, cm, mm"):
        read_depth(tmp_path / "depth.png", "inch")
    with pytest.raises(ValueError, match="read in the unit 'm'"):
        read_depth(tmp_path / "depth.png", "m")


def test_real_capture():
    depth, rgb = read_depth(real_data() / "sample_depth.png", "mm"), read_rgb(real_data() / "sample_rgb.png")
    assert rgb.shape == (1080, 1440, 3) and depth.shape == (1080, 1440, 1)
    assert 2 < np.median(depth[depth > 0]) < 5             # a room, seen by a sensor that reaches 4.5 m
    assert 0.05 < (depth == 0).mean() < 0.06


def test_thinning_equals_scikit_image():
    rng = np.random.default_rng(0)
    for trial in range(60):
        noise = rng.random(rng.integers(1, 50, 2))
        smooth = cv2.blur(noise, (3, 3)).reshape(noise.shape) if trial % 2 else noise
        mask = smooth < rng.choice([0.2, 0.5, 0.8])
        np.testing.assert_array_equal(thin(mask), skimage_thin(mask))


# Samplers and loaders --------------------------------------------------------------------------------------

def updates(num, world_size, accumulate, start=0, count=9):
    """Images of each update, over all ranks and passes, as sets."""
    per_rank = [iter(TrainBatchSampler(num, 8 // world_size // accumulate, rank, world_size, seed=3,
                                       accumulate=accumulate, start_update=start))
                for rank in range(world_size)]
    return [list(itertools.chain.from_iterable(next(it) for _ in range(accumulate) for it in per_rank))
            for _ in range(count)]


def test_an_update_sees_the_same_images_however_it_is_shared_out():
    single = updates(35, 1, 1)
    assert all(len(set(update)) == 8 for update in single)
    for world_size, accumulate in ((2, 1), (4, 1), (1, 4), (2, 2), (8, 1)):
        assert [sorted(u) for u in updates(35, world_size, accumulate)] == [sorted(u) for u in single]


def test_epochs_visit_an_image_once_in_a_new_order_with_new_seeds():
    four = updates(35, 1, 1, count=8)                      # 4 updates an epoch, 3 images dropped
    first, second = (list(itertools.chain.from_iterable(part)) for part in (four[:4], four[4:]))
    assert len({index for index, _ in first}) == 32 == len({index for index, _ in second})
    assert [index for index, _ in first] != [index for index, _ in second]
    seeds = dict(first)
    assert all(seeds.get(index) != seed for index, seed in second)


@pytest.mark.parametrize("start", [1, 4, 6])
def test_resume_continues_the_order(start):
    assert updates(35, 2, 2, start=start, count=4) == updates(35, 2, 2, count=start + 4)[start:]


def test_a_data_set_smaller_than_an_update_is_refused():
    with pytest.raises(ValueError, match=r"7 training images do not fill .* 8 \(4 per process x 2 process"):
        TrainBatchSampler(7, 4, 0, 2)


@pytest.mark.parametrize(("num", "world_size"), [(10, 3), (4, 4), (2, 3), (7, 1)])
def test_eval_shards_lose_and_repeat_nothing(num, world_size):
    shards = [list(EvalSampler(num, rank, world_size)) for rank in range(world_size)]
    assert sorted(itertools.chain.from_iterable(shards)) == list(range(num))
    assert [len(EvalSampler(num, rank, world_size)) for rank in range(world_size)] == [len(s) for s in shards]


def test_train_batches_do_not_depend_on_workers(nyud):
    transform = build_transform((16, 16), None, True, NYUD_LABELS)
    dataset = open_nyud(nyud, transform=transform)
    here, workers = (itertools.islice(build_train_loader(dataset, 2, n, seed=5), 5) for n in (0, 2))
    for a, b in zip(here, workers, strict=True):
        assert a["image"].shape == (2, 3, 16, 16) and a["normals"].shape == (2, 3, 16, 16)
        assert [m["name"] for m in a["meta"]] == [m["name"] for m in b["meta"]]
        assert all(torch.equal(a[key], b[key]) for key in ("image", *NYUD_LABELS))


def test_eval_loader_covers_the_split_with_original_sizes(nyud):
    transform = build_transform((32, 32), None, False, NYUD_LABELS)
    dataset = open_nyud(nyud, "val", transform=transform)
    batches = list(build_eval_loader(dataset, 2))
    assert [len(batch["meta"]) for batch in batches] == [2, 2, 1]
    assert [m["name"] for batch in batches for m in batch["meta"]] == dataset.ids
    assert all(m["size"] == (20, 24) for batch in batches for m in batch["meta"])
