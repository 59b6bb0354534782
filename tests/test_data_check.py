"""The data doctor: damaged and strange files are found by name before the first step, sound ones are read once."""

import itertools
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data import check
from data.base import MultiTaskDataset
from data.check import SoundFiles, examine, repeated, summary, survey
from data.datasets import DATASETS
from data.labels import DepthLabel, EdgeLabel, MapLabel, NormalsLabel
from scripts import check_data
from scripts.damages import CLASSES, HANDLED, LISTS, REFUSED, change, pick
from scripts.data_report import recognise
from scripts.example_data.write import write_example
from tests.conftest import launch
from tests.shared import ROOT
from utils.engine import data_check
from utils.engine.arguments import parse_arguments
from utils.engine.config import load_config
from utils.engine.data_check import require_sound
from utils.engine.folder import RunFolder
from utils.engine.prepare import prepare
from utils.engine.tasks import label_rules

LAYOUTS = {"NYUDv2": DATASETS.load("NYUD"), "PASCALContext": DATASETS.load("PASCALContext")}


@pytest.fixture
def root(example_root, tmp_path):
    return shutil.copytree(example_root, tmp_path / "copy")


def opened(root, split="train", name="NYUDv2", tasks=()):
    spec = LAYOUTS[name]
    return MultiTaskDataset(spec, root, split, label_rules(tasks or spec.tasks))


def doctor(capsys, *arguments):
    status = check_data.main([*map(str, arguments), "--workers", "1"])
    return status, capsys.readouterr().out


# What is wrong with a file -------------------------------------------------------------------------------------------

def test_every_kind_of_damage_is_named_by_the_doctor_and_stops_a_training(tmp_path, capsys):
    """Each on an image of its own, all at once; scripts/damaged_files.py has them one by one, at random."""
    rng, hit, root = np.random.default_rng(0), {}, tmp_path
    write_example(root, 30, 2, (32, 48), workers=1, progress=False)
    alone = {name for name, kind in REFUSED.items() if kind.files == LISTS or kind.named or name == "missing"}
    for name, kind in REFUSED.items():
        if name in alone:
            continue
        path = next(path for path in (pick(root, kind.files, rng) for _ in range(500))
                    if path.stem not in {other.stem for other in hit})
        hit[path] = name
        kind.damage(path, rng)
    status, printed = doctor(capsys, root)
    assert status == 1 and {name for path, name in hit.items() if str(path) not in printed} == set()
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=rf"^the data check found \d+ problem\(s\): .*{layout}.*; and \d+ more\. "
                                             rf"`python scripts/check_data.py .*{layout}` lists all of them; --skip"):
            require_sound({split: opened(root, split, layout) for split in ("train", "val")}, 0)


@pytest.mark.parametrize("name", [name for name, kind in REFUSED.items() if kind.files == LISTS or kind.named])
def test_damaged_lists_and_leaks_are_named(name, root, capsys):
    kind = REFUSED[name]
    path = pick(root, kind.files, np.random.default_rng(1))
    kind.damage(path, np.random.default_rng(1))
    status, printed = doctor(capsys, root)
    named = kind.named or path.name
    assert status == 1 and named in printed
    layout = path.relative_to(root).parts[0]
    with pytest.raises((ValueError, OSError), match=named):
        require_sound({split: opened(root, split, layout) for split in ("train", "val")}, 0)


def test_the_same_in_another_form_is_the_same(root):
    rng = np.random.default_rng(0)
    pairs = [(form, pick(root, form.files, rng)) for form in HANDLED.values()]
    for form, path in pairs:
        if form.few:
            change(path, lambda a, few=form.few: a % few)

    def samples():
        return [opened(root, split, name)[i] for name in LAYOUTS for split in ("train", "val") for i in range(5)]

    before, done = samples(), set()
    for form, path in pairs:
        if path not in done:
            form.rewrite(path)
        done.add(path)
    for a, b in zip(before, samples(), strict=True):
        for key in set(a) - {"meta"}:
            assert np.array_equal(a[key], b[key]), (a["meta"], key)
    assert len(done) > 10 and CLASSES


@pytest.mark.parametrize(("rules", "label", "words"), [
    (NormalsLabel(), np.full((2, 2, 3), 0.9), "100% of its vectors are not of unit length (mean length 1.56)"),
    (NormalsLabel(), np.zeros((2, 2, 3)), ""), (NormalsLabel(), np.full((2, 2, 3), np.nan), "100% of its vectors"),
    (NormalsLabel(), np.array([[[0, 0, 1], [0, 0.6, 0.8], [0, 0, 0], [0.5, 0, 0]]]), ""),
    (EdgeLabel(), np.array([[[1.0], [1], [0]]]), "67% of its pixels are boundaries: is it inverted?"),
    (EdgeLabel(), np.array([[[1.0], [0], [255]]]), ""), (EdgeLabel(), np.full((1, 1, 1), 255.0), ""),
    (MapLabel(), np.ones((2, 2, 1)), ""), (DepthLabel(), np.zeros((2, 2, 1)), "")])
def test_what_looks_like_something_else(rules, label, words):
    assert rules.doubts(label.astype(np.float32)).startswith(words) and bool(rules.doubts(label)) == bool(words)


def test_a_label_that_supervises_nothing_is_a_note(root, caplog):
    folder = root / "NYUDv2" / "segmentation"
    change(folder / "0001.png", np.zeros_like)
    found = examine(opened(root), "0001")
    assert not found.problems and found.notes == (f"{folder / '0001.png'}: void everywhere, it supervises nothing",)
    assert not any(examine(opened(root, name="PASCALContext"), name).notes for name in
                   opened(root, name="PASCALContext").ids)           # no people: nothing strange
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            require_sound({"train": opened(root), "val": opened(root, "val")}, 0)
    warned, told = (record.message for record in caplog.records[:2])
    assert warned.startswith("data check, 1 note(s): ") and "0001.png: void everywhere" in warned
    assert told.startswith("data check: all files of 17 images are sound (17 read now")
    assert [record.message for record in caplog.records[2:]] == [warned]               # remembered, too


def test_what_a_reader_does_not_expect_is_a_problem_too(root, monkeypatch):
    dataset = opened(root, tasks=("depth",))
    monkeypatch.setattr(MultiTaskDataset, "read", lambda self, key, name: {}["key"])
    assert examine(dataset, "0001").problems == tuple(
        f"{path}: cannot be read (KeyError: 'key')" for path in (dataset.folder / "images" / "0001.png",
                                                                 dataset.folder / "depth" / "0001.npy"))


# What is known already -----------------------------------------------------------------------------------------------

def test_sound_files_are_read_once(root, monkeypatch):
    splits = {"train": opened(root, tasks=("semseg",)), "val": opened(root, "val", tasks=("semseg",))}
    read = []
    monkeypatch.setattr(data_check, "survey", lambda dataset, names, workers: read.append(list(names)) or survey(
        dataset, names, workers))
    require_sound(splits, 0)
    require_sound(splits, 0)
    path = root / "NYUDv2" / "segmentation" / "0003.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    require_sound(splits, 0)
    require_sound({"train": opened(root, tasks=("semseg", "edge"))}, 0)                # other files
    assert read == [splits["train"].ids, splits["val"].ids, [], [], ["0003"], [], splits["train"].ids]


def test_what_is_damaged_is_not_remembered(root):
    path = root / "NYUDv2" / "segmentation" / "0003.png"
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="0003.png"):
            require_sound({"train": opened(root)}, 0)


@pytest.mark.parametrize("content", ["", "[", '{"0001": 3}', '{"0001": ["digest", [], [[1, 2]]]}'])
def test_a_damaged_memory_is_none(content, root):
    dataset = opened(root)
    sound = SoundFiles(dataset)
    sound.file.write_text(content)
    assert SoundFiles(dataset).find("0001") is None
    sound.add([examine(dataset, "0001")])
    assert SoundFiles(dataset).find("0001") == examine(dataset, "0001")


def test_nothing_is_remembered_where_nothing_can_be_written(root, monkeypatch):
    monkeypatch.setenv("DATA_CHECK_CACHE", str(root / "example.json" / "below a file"))
    require_sound({"train": opened(root)}, 0)


def test_ranks_share_the_work(root, monkeypatch):
    """Rank 1 of 2 reads the odd images and hears of the even ones."""
    dataset = opened(root)
    others = [[examine(dataset, name) for name in dataset.ids[::2]]]
    monkeypatch.setattr(data_check.distributed, "rank", lambda: 1)
    monkeypatch.setattr(data_check.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(data_check.distributed, "gather_objects", lambda mine: (
        [*others, mine] if [e.name for e in mine] == dataset.ids[1::2] else [[]]))
    require_sound({"train": dataset}, 0)


def test_many_images_are_read_in_other_processes(root, monkeypatch):
    monkeypatch.setattr(check, "INLINE", 2)
    dataset = opened(root)
    assert list(survey(dataset, dataset.ids, 2)) == [examine(dataset, name) for name in dataset.ids]


def test_leaks_and_twins():
    splits = {"train": {"a": "1", "b": "2", "c": "2", "x": ""}, "val": {"d": "1", "e": "3", "y": ""}}
    assert repeated(splits) == (["d of val is a of train"], ["c of train is b, too"])
    assert repeated({"train": {"a": "1"}, "val": {"b": "2"}}) == ([], [])
    assert summary(list("abcdefg")) == "a; b; c; d; e; and 2 more" and summary(["a"]) == "a"


# The command line ----------------------------------------------------------------------------------------------------

def test_a_good_folder(root, capsys, tmp_path):
    status, printed = doctor(capsys, root, "--sheet", tmp_path / "sheet.png")
    assert status == 0 and "no problems found" in printed
    assert "NYUD train: 12 ids, 0 missing files, 12 images examined" in printed
    assert "PASCALContext val: 5 ids" in printed and "human_parts" in printed
    labels = np.stack([np.asarray(Image.open(p)) for p in sorted((root / "NYUDv2" / "segmentation").iterdir())[:12]])
    assert f"wall {(labels == 1).mean():.2%} ({(labels == 1).any((1, 2)).sum()})" in printed
    assert "NYUD: no copy that is known here: 12 train, 5 val images; the usual one has 795 train, 654 val" in printed
    assert f"24 samples with their labels: {tmp_path / 'sheet.png'}" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * 244 and sheet.height == 24 * (160 + 18 + 4)


def test_a_folder_of_ones_own(root, capsys):
    folder = root / "NYUDv2"
    (folder / "dataset.yml").write_text("image_size: [64, 96]\nsplits: {train: gt_sets/train.txt}\n"
                                        "tasks: {depth: {unit: mm}}\n")
    status, printed = doctor(capsys, folder, "--split", "train")
    assert status == 0 and "NYUDv2 train: 12 ids" in printed and "values 0.00" in printed


def test_only_a_part_and_nothing_at_all(root, capsys, tmp_path):
    status, printed = doctor(capsys, root, "--dataset", "NYUD", "--split", "val", "--tasks", "depth", "--limit", "2")
    assert status == 0 and "5 ids" in printed and "3 images examined" in printed and "semseg" not in printed
    assert check_data.main([str(tmp_path / "nowhere")]) == 1
    assert "holds none of NYUDv2/, PASCALContext/, cityscapes/, and no dataset.yml" in capsys.readouterr().err


def test_lists_are_mended(root, capsys, tmp_path):
    lists = root / "NYUDv2" / "gt_sets"
    (root / "NYUDv2" / "edge" / "0002.png").unlink()
    (root / "NYUDv2" / "images" / "0004.png").write_bytes(b"")
    (lists / "val.txt").write_bytes("0013 1\n\u200b0014\n0013\n\n0015 \u2013\n".encode("cp1252", "ignore"))
    target = tmp_path / "lists"
    status, printed = doctor(capsys, root, "--dataset", "NYUD", "--fix-list", target)
    assert status == 1 and "repaired, run this check with it again" in printed
    assert (target / "NYUDv2/gt_sets/train.txt").read_text().split() == [
        f"{i:04d}" for i in range(1, 13) if i not in (2, 4)]
    assert (target / "NYUDv2/gt_sets/val.txt").read_text().split() == ["0013", "0014", "0015"]
    assert check_data.main([str(root), "--dataset", "NYUD", "--fix-list", str(target)]) == 1
    assert "exists and is left alone" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "numbers", "sizes", "words"), [
    ("NYUD", {"train": 795, "val": 654}, {(425, 560)}, "this is the archive of InvPT"),
    ("NYUD", {"train": 795, "val": 654}, {(480, 640)}, "this is full frames"),
    ("NYUD", {"train": 795, "val": 654}, {(480, 640), (425, 560)}, "no copy that is known here: 795 train, 654 val"),
    ("PASCALContext", {"train": 4998, "val": 5105}, {(375, 500), (500, 333)}, "this is the archive of InvPT"),
    ("Cityscapes", {"train": 2975, "val": 500}, {(512, 1024)}, "no copy that is known here"),
    ("Cityscapes", {"train": 2975, "val": 500}, {(1024, 2048)}, "this is the official packages")])
def test_known_copies(name, numbers, sizes, words):
    assert recognise(DATASETS.load(name), numbers, sizes).startswith(words)


def test_a_damaged_file_stops_main_before_the_first_step_unless_told(root, tiny):
    path = root / "NYUDv2" / "edge" / "0005.png"
    path.write_bytes(path.read_bytes()[:60])
    command = ["--config_exp", str(ROOT / "configs" / "bim_nyud.yml"), *tiny, f"db_root={root}", "max_iter=2"]
    ended = launch(command)
    assert ended.returncode == 1 and "step 1/" not in ended.stdout + ended.stderr
    assert "error: the data check found 1 problem(s): cannot read" in ended.stderr and "0005.png" in ended.stderr
    asked = parse_arguments([*command, "--skip_data_check"], None)
    assert asked.overrides[-1] == "skip_data_check=true"
    config = load_config(asked.config_exp, asked.overrides)
    with RunFolder(config) as folder, pytest.raises(ValueError, match=r"0005\.png"):
        list(itertools.islice(prepare(config, torch.device("cpu"), False, folder).train_loader, 12))
