"""Data folders from official sources: small files of the real formats, once, twice, damaged, and none of them."""

import io
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from skimage.morphology import thin

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from scripts import prepare_data
from scripts.nyu_labelled import CENTRE, CROP, FOCAL, boundaries_of, normals_of, once
from utils.engine.tasks import label_rules

RNG = np.random.default_rng(0)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = prepare_data.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def stamps(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def picture(size=(6, 8), ending="PNG", channels=3) -> bytes:
    buffer = io.BytesIO()
    shape = size if channels == 1 else (*size, channels)
    Image.fromarray(RNG.integers(0, 20, shape, np.uint8)).save(buffer, ending)
    return buffer.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


# NYU -----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def container(tmp_path):
    """Three frames as Matlab 7.3 stores them, axes reversed."""
    folder = tmp_path / "nyu"
    folder.mkdir()
    frames = {"images": RNG.integers(0, 256, (3, 3, 640, 480), np.uint8),
              "depths": RNG.uniform(1, 5, (3, 640, 480)).astype(np.float32),
              "labels": np.zeros((3, 640, 480), np.uint16), "instances": np.zeros((3, 640, 480), np.uint8)}
    frames["labels"][:, 300:] = 894
    frames["instances"][:, :, 200:] = 2
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        for key, value in frames.items():
            file[key] = value
    savemat(folder / "splits.mat", {"trainNdxs": np.array([[3], [1]]), "testNdxs": np.array([[2]])})
    savemat(folder / "classMapping40.mat", {"mapClass": np.concatenate([np.full(893, 5), [7]])[None]})
    return folder, frames


def test_nyu_from_its_container(container, tmp_path, capsys):
    source, frames = container
    status, printed, _ = run(capsys, "NYUD", "--source", source, "--out", tmp_path)
    assert status == 0 and "nyu_depth_v2_labeled.mat: 17 files written, 0 were there" in printed
    assert f"{tmp_path / 'NYUDv2'} is complete" in printed
    spec = DATASETS.load("NYUD")
    train = MultiTaskDataset(spec, tmp_path, "train", label_rules(spec.tasks))
    assert train.ids == ["0001", "0003"] and MultiTaskDataset(spec, tmp_path, "val", {}).ids == ["0002"]
    sample = train[1]
    assert np.array_equal(sample["image"], frames["images"][2].transpose(2, 1, 0)[CROP])
    assert np.array_equal(sample["depth"][..., 0], frames["depths"][2].T[CROP])
    assert (sample["semseg"][:, :260] == 255).all() and (sample["semseg"][:, 260:] == 6).all()
    assert np.abs(np.linalg.norm(sample["normals"], axis=-1) - 1).max() < 0.01
    edge = sample["edge"][..., 0]
    assert edge[300, 250:270].sum() == 1 and edge[150:160, 100].sum() == 1 and edge[:100, :200].sum() == 0


def test_what_is_there_stays_and_what_is_missing_is_made(container, tmp_path, capsys):
    source, _ = container
    run(capsys, "NYUD", "--source", source, "--out", tmp_path)
    folder = tmp_path / "NYUDv2"
    before = stamps(folder)
    (folder / "edge" / "0002.png").unlink()
    (folder / "images" / "0001.png").write_bytes(b"mine")
    mine = (folder / "images" / "0001.png").stat().st_mtime_ns
    _, printed, _ = run(capsys, "NYUD", "--source", source, "--out", tmp_path)
    after = stamps(folder)
    assert "1 files written, 16 were there" in printed and after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"edge/0002.png", "images/0001.png"}
    assert after["images/0001.png"] == mine and (folder / "images" / "0001.png").read_bytes() == b"mine"


def test_a_container_alone_is_not_enough(container, tmp_path, capsys):
    (container[0] / "splits.mat").unlink()
    status, _, error = run(capsys, "NYUD", "--source", container[0], "--out", tmp_path)
    assert status == 1 and "splits.mat must lie beside nyu_depth_v2_labeled.mat" in error


def test_normals_of_planes_are_exact():
    """A floor, a wall to the left and one straight ahead, as the camera sees them."""
    v, u = np.indices((425, 560))
    rays = np.stack([(u - CENTRE[0]) / FOCAL[0], (v - CENTRE[1]) / FOCAL[1], np.ones(u.shape)], axis=-1)    # y down
    for normal, distance in (((0, -1, -0.2), -1.5), ((1, 0, -1), -3.0), ((0, 0, -1), -2.5)):
        depth = distance / (rays @ np.array(normal, float))
        good = (depth > 0.5) & (depth < 6)
        good[:20], good[-20:], good[:, :20], good[:, -20:] = False, False, False, False
        inside = np.stack([np.roll(good, s, axis) for s in (-12, 12) for axis in (0, 1)]).all(axis=0) & good
        want = np.array([normal[0], -normal[1], -normal[2]]) / np.linalg.norm(normal)                    # y up, z back
        angle = np.degrees(np.arccos(np.clip(normals_of(np.where(good, depth, 3.0)) @ want, -1, 1)))
        assert inside.sum() > 5000 and angle[inside].max() < 1.5


def test_boundaries_lie_between_regions_and_are_thin():
    regions = np.zeros((9, 9), int)
    regions[3:6, 3:6] = 4
    edge = boundaries_of(regions)
    assert edge.any() and np.array_equal(thin(edge), edge) and not edge[:2].any() and not edge[4, 4]
    assert not boundaries_of(np.ones((4, 4), int)).any()


# Archives ------------------------------------------------------------------------------------------------------------

def test_cityscapes_from_its_zips(tmp_path, capsys):
    stem = "train/aachen/aachen_000000_000019"
    write_zip(tmp_path / "leftImg8bit_trainvaltest.zip", {f"leftImg8bit/{stem}_leftImg8bit.png": picture(),
              "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png": b"not needed", "README": b"no"})
    write_zip(tmp_path / "gtFine_trainvaltest.zip", {f"gtFine/{stem}_gtFine_labelIds.png": picture(channels=1),
              f"gtFine/{stem}_gtFine_color.png": b"not needed"})
    status, printed, _ = run(capsys, "Cityscapes", "--source", tmp_path, "--out", tmp_path / "data")
    folder = tmp_path / "data" / "cityscapes"
    assert set(stamps(folder)) == {f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"}
    assert status == 1 and "train: 1 of 1 images lack depth (disparity/{id}_disparity.png" in printed
    assert "leftImg8bit_trainvaltest.zip: 1 files written, 0 were there" in printed and "val: " in printed


def test_pascal_from_four_sources(tmp_path, capsys):
    name, folder = "2008_000002", tmp_path / "PASCALContext"
    (tmp_path / "Annotations_Part").mkdir()
    savemat(tmp_path / "Annotations_Part" / f"{name}.mat", {"anno": {"objects": []}})
    write_tar(tmp_path / "VOCtrainval.tar.gz", {f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg": picture(ending="JPEG"),
              f"VOCdevkit/VOC2010/SegmentationClass/{name}.png": picture(channels=1),
              "VOCdevkit/VOC2010/ImageSets/Main/train.txt": b"not the list"})
    write_tar(tmp_path / "archive.tgz", {f"PASCAL_MT/normals_distill/{name}.png": picture(),
              f"PASCAL_MT/sal_distill/{name}.png": picture(channels=1), f"x/trainval/{name}.mat": b"mat",
              "PASCAL_MT/ImageSets/Context/train.txt": b"2008_000002\n", "PASCAL_MT/ImageSets/Context/val.txt": b"a\n"})
    run(capsys, "PASCALContext", "--source", tmp_path, "--out", tmp_path)
    assert set(stamps(folder)) == {
        f"JPEGImages/{name}.jpg", f"semseg/VOC12/{name}.png", f"human_parts/{name}.mat", f"normals_distill/{name}.png",
        f"sal_distill/{name}.png", f"pascal-context/trainval/{name}.mat", "ImageSets/Context/train.txt",
        "ImageSets/Context/val.txt"}
    assert (folder / "ImageSets/Context/train.txt").read_text() == f"{name}\n"


def test_a_damaged_archive_is_named_and_the_rest_comes_later(tmp_path, capsys):
    files = {f"NYUDv2/images/{i:04d}.png": RNG.bytes(3000) for i in range(20)}
    write_tar(tmp_path / "NYUDv2.tar.gz", files)
    whole = (tmp_path / "NYUDv2.tar.gz").read_bytes()
    (tmp_path / "NYUDv2.tar.gz").write_bytes(whole[:len(whole) // 2])
    status, _, error = run(capsys, "NYUD", "--source", tmp_path / "NYUDv2.tar.gz", "--out", tmp_path)
    there = len(stamps(tmp_path / "NYUDv2"))
    assert status == 1 and "NYUDv2.tar.gz is damaged or not all of it is there" in error and 0 < there < 20
    (tmp_path / "NYUDv2.tar.gz").write_bytes(whole)
    _, printed, _ = run(capsys, "NYUD", "--source", tmp_path / "NYUDv2.tar.gz", "--out", tmp_path)
    assert f"{20 - there} files written, {there} were there" in printed
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_a_name_never_leads_out_of_the_folder(tmp_path, capsys):
    write_zip(tmp_path / "evil.zip", {"NYUDv2/images/..": b"x", "NYUDv2/images/../../../evil": b"x"})
    status, _, error = run(capsys, "NYUD", "--source", tmp_path / "evil.zip", "--out", tmp_path)
    assert status == 1 and "belongs to NYUD" in error and set(stamps(tmp_path)) == {"evil.zip"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["KITTI"], "unknown data set 'KITTI'"), (["NYUD", "--source", "/nowhere"], "source not found: /nowhere"),
    (["NYUD"], "belongs to NYUD; these do: nyu_depth_v2_labeled.mat")])
def test_mistakes_say_what_would_be_right(arguments, words, tmp_path, capsys):
    status, _, error = run(capsys, *arguments, "--out", tmp_path)
    assert status == 1 and words in error


def test_the_list_names_sources_and_terms(capsys):
    status, printed, _ = run(capsys, "list")
    assert status == 0 and all(f"{name}:" in printed for name in ("NYUD", "PASCALContext", "Cityscapes"))
    assert "no licence stated" in printed and "non-commercial" in printed


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def breaks(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "a", breaks)
    assert list(tmp_path.iterdir()) == []
    assert once(tmp_path / "a", lambda path: path.write_bytes(b"1")) and (tmp_path / "a").read_bytes() == b"1"
    assert not once(tmp_path / "a", lambda path: path.write_bytes(b"2")) and (tmp_path / "a").read_bytes() == b"1"
