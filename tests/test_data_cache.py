"""The cache of decoded files: what comes out is what went in, and a changed, damaged or full one never misleads."""

import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from data.base import MultiTaskDataset
from data.cache import DecodedCache
from data.datasets import DATASETS
from utils.engine.tasks import label_rules

RNG = np.random.default_rng(0)
MAPS = {
    "image": RNG.integers(0, 256, (6, 7, 3), np.uint8),
    "codes": np.linspace(-1, 1, 256, dtype=np.float32)[RNG.integers(0, 256, (40, 50, 3))],
    "rare": np.where(np.arange(3000) == 5, np.float32(0.3), np.float32(7)).reshape(50, 60, 1),      # beside the guess
    "signs": np.array([[[0.0], [-0.0]]], np.float32),
    "many": RNG.random((30, 20, 1), np.float32),
    "holes": np.full((3, 3, 1), np.nan, np.float32),
    "double": RNG.random((2, 2, 1)),
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    return path


def fetch(cache, source, maps=MAPS, name="a"):
    """(maps, whether they were read from the files)."""
    asked = []
    found = cache.fetch(name, [source], lambda: asked.append(1) or dict(maps))
    return found, bool(asked)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[key].dtype == wanted[key].dtype and found[key].tobytes() == wanted[key].tobytes()
        and found[key].shape == wanted[key].shape and found[key].flags.writeable for key in wanted)


def test_every_bit_comes_back_in_this_and_in_another_process(source, tmp_path):
    cache = DecodedCache(tmp_path / "cache", 1e6)
    assert fetch(cache, source)[1]
    for again in (cache, pickle.loads(pickle.dumps(cache)), DecodedCache(tmp_path / "cache", 1e6)):
        found, was_read = fetch(again, source)
        assert not was_read and same(found, MAPS)
    [entry] = (tmp_path / "cache").iterdir()
    plain = sum(value.nbytes for value in MAPS.values())
    assert entry.stat().st_size < plain - 3 * MAPS["codes"].size - 3 * MAPS["rare"].size + 10_000    # 8 bits, not 32


def test_a_changed_file_is_read_anew(source, tmp_path):
    cache = DecodedCache(tmp_path / "cache", 1e6)
    fetch(cache, source)
    time = source.stat().st_mtime_ns
    os.utime(source, ns=(time, time + 1000))
    changed = {"image": MAPS["image"] + 1}
    found, was_read = fetch(cache, source, changed)
    assert was_read and same(found, changed)
    found, was_read = fetch(cache, source, MAPS)
    assert not was_read and same(found, changed)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: content[:-40], lambda content: b"",
    lambda content: b"x" + content[1:], lambda content: content[:16] + b"\xff" * 8 + content[24:],
    lambda content: content[:8] + b"\xff" * 8 + content[16:], lambda content: content[:20]])
def test_a_damaged_entry_is_written_anew(damage, source, tmp_path):
    fetch(DecodedCache(tmp_path / "cache", 1e6), source)
    [entry] = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    found, was_read = fetch(DecodedCache(tmp_path / "cache", 1e6), source)
    assert was_read and same(found, MAPS) and entry.read_bytes() == whole


def test_the_folder_stays_within_its_bound_and_says_so(source, tmp_path, caplog):
    cache = DecodedCache(tmp_path / "cache", 30_000)
    one = {"image": np.zeros((100, 120), np.uint8)}
    with caplog.at_level(logging.WARNING):
        for name in "abcdef":
            fetch(cache, source, one, name)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [record.message for record in caplog.records] == [
        f"data cache {tmp_path / 'cache'} takes no more images (its bound of 3e-05 GB is reached): the others are read "
        "from their files"]
    assert not fetch(cache, source, one, "a")[1] and fetch(cache, source, one, "f")[1]


def test_a_data_set_gives_the_same_samples(example_root, tmp_path):
    for name in ("NYUD", "PASCALContext"):
        spec = DATASETS.load(name)
        labels = label_rules(spec.tasks)
        plain = MultiTaskDataset(spec, example_root, "val", labels)
        for _ in range(2):
            cached = MultiTaskDataset(spec, example_root, "val", labels, cache=DecodedCache(tmp_path / "cache", 1e8))
            for i in range(len(plain)):
                a, b = plain[i], cached[i]
                assert a["meta"] == b["meta"]
                for key in ("image", *labels):
                    assert a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]), key
    assert len(list((tmp_path / "cache").iterdir())) == 10


def test_a_corrected_label_is_seen(example_root, tmp_path):
    folder = tmp_path / "NYUDv2"
    (folder / "gt_sets").mkdir(parents=True)
    for kind in ("images", "segmentation"):
        (folder / kind).mkdir()
        Image.fromarray(np.ones((4, 5, 3) if kind == "images" else (4, 5), np.uint8)).save(folder / kind / "1.png")
    (folder / "gt_sets" / "train.txt").write_text("1\n")
    dataset = MultiTaskDataset(DATASETS.load("NYUD"), tmp_path, "train", label_rules(["semseg"]),
                               cache=DecodedCache(tmp_path / "c", 1e6))
    assert dataset[0]["semseg"].max() == 0
    Image.fromarray(np.full((4, 5), 3, np.uint8)).save(folder / "segmentation" / "1.png")
    assert dataset[0]["semseg"].min() == 2
