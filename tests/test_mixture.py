"""Several data sets in one training: what they share, what is named apart, how often each is drawn."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.base import MultiTaskDataset
from data.labels import VOID
from data.loader import TrainBatchSampler, build_train_loader, sample_seed
from tests.conftest import TINY
from tests.shared import ROOT
from tests.test_batch_colours import same_batch
from utils.engine.build import build_split
from utils.engine.config import config_from_dict, load_config
from utils.engine.predict import infer
from utils.engine.results import check_reference, delta_m_against, format_table
from utils.engine.tasks import TASKS
from utils.engine.train import train
from utils.options import ConfigError

SIZE = (60, 90)
TREES = "image_size: [64, 96]\nsplits: {train: 'images/t*', val: 'images/v*'}\ntasks:\n"


def write(root: Path, name: str, classes: list[str], others: str, number: int = 4) -> Path:
    """A folder with `number` images of each split, classes and more tasks."""
    rng, folder = np.random.default_rng(len(name)), root / name
    (folder / "images").mkdir(parents=True)
    for i, split in itertools.product(range(number), "tv"):
        pictures = {"images": rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8),
                    "semseg": rng.integers(0, len(classes), SIZE).astype(np.uint8),
                    "depth": rng.integers(500, 9000, SIZE).astype(np.uint16),
                    "edge": rng.choice([0] * 9 + [255], SIZE).astype(np.uint8)}
        for kind, pixels in pictures.items():
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{split}{i}.png")
    (folder / "dataset.yml").write_text(f"{TREES}  semseg: {{classes: [{', '.join(classes)}]}}\n{others}")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mix")
    write(root, "rooms", ["wall", "floor", "bed"], "  depth: {unit: mm}\n  edge: {}\n")
    write(root, "street", ["sky", "road"], "  edge: {}\n", 8)
    return root


ON = "{include_semseg: true, include_semseg@street: true, include_depth: true, include_edge: true}"
APART = "rename: {semseg: semseg@street}"


def experiment(root: Path, street: str = APART, rooms: str = "weight: 3", tasks: str = ON, *more: str):
    weight = ", weight: 1" if "weight" in rooms else ""
    data = (f"train_db_name=[{{folder: {root / 'rooms'}, {rooms}}}, "
            f"{{folder: {root / 'street'}, {street or 'exif: stored'}{weight}}}]")
    return load_config(ROOT / "configs" / "_base_" / "bim.yml", [
        *TINY, data, f"task_dictionary={tasks}", f"out_dir={root / 'runs'}", "version_name=mix", "max_iter=2",
        "val_interval=2", "boundary_kwargs.workers=0", *more])


def test_a_mixture_has_the_tasks_of_all(root):
    config = experiment(root)
    assert config.tasks == ("semseg", "semseg@street", "depth", "edge")
    assert str(config.train_db_name) == "rooms + street"
    assert config.dataset.tasks == {"semseg": 3, "semseg@street": 2, "depth": 1, "edge": 1}
    data = build_split(config, "train")
    assert len(data) == 12 and list(data.labels) == list(config.tasks)
    assert data.labelled("semseg@street") == [f"street/t{i}" for i in range(8)] == data.ids[4:]
    assert data.present.tolist() == [[True, False, True, True]] * 4 + [[False, True, False, True]] * 8
    for index in (0, 11):
        sample = data[(index, 5)]
        has = [bool((sample[task] != VOID).any()) for task in config.tasks]
        assert has == data.present[index].tolist() and sample["meta"]["name"] == data.ids[index]
    again = config_from_dict(config.to_dict(), "last.pt")
    assert again.train_db_name == config.train_db_name and again.tasks == config.tasks


def test_training_scoring_and_files(root):
    config = experiment(root)
    results = train(config, resume=False)
    assert set(results) == set(config.tasks) and results["semseg@street"]["valid_pixels"] == 8 * 60 * 90
    assert results["depth"]["valid_pixels"] == 4 * 60 * 90
    table = format_table({"x": results})
    assert table.index("semseg mIoU") < table.index("semseg@street mIoU") < table.index("depth RMSE")
    scores = infer(config, config.run_dir / "last.pt", root / "out")
    assert scores["edge"]["images"] == 12
    written = {path.relative_to(root / "out" / "edge").as_posix() for path in (root / "out" / "edge").rglob("*.png")}
    assert written == {f"rooms/v{i}.png" for i in range(4)} | {f"street/v{i}.png" for i in range(8)}
    one = config_from_dict(config.to_dict(), "last.pt", [f"val_db_name={{folder: {root / 'street'}, {APART}}}"])
    alone = infer(one, config.run_dir / "last.pt", root / "street_out")
    assert set(alone) == {"semseg@street", "edge"}
    assert alone["semseg@street"]["mIoU"] == pytest.approx(scores["semseg@street"]["mIoU"])


def test_colours_are_changed_on_the_device_too(root):
    parts = [build_split(experiment(root, APART, "weight: 3", ON, f"augmentation.photometric_on_device={on}"), "train")
             for on in ("true", "false")]
    left, plain = (next(iter(build_train_loader(data, 12, seed=2))) for data in parts)
    assert len({meta["name"].partition("/")[0] for meta in left["meta"]}) == 2
    same_batch(left, plain, share=0.1)


def test_weights_say_how_often_each_is_drawn(root):
    data = build_split(experiment(root), "train")
    assert data.draws == [(4, 9), (8, 3)]                  # 3 : 1 of 12
    sampler = TrainBatchSampler(12, 4, seed=3, draws=data.draws)
    assert sampler.updates_per_epoch == 3
    epoch = list(itertools.chain.from_iterable(itertools.islice(sampler, 3)))
    rooms = [index for index, _ in epoch if index < 4]
    assert len(rooms) == 9 and sorted(rooms.count(i) for i in range(4)) == [2, 2, 2, 3]
    assert len({index for index, _ in epoch if index >= 4}) == 3       # street: none twice
    assert len({seed for _, seed in epoch}) == 12                      # a repetition is augmented anew
    first = dict(reversed(epoch))
    assert sum(first[i] == sample_seed(3, 0, i) for i in range(4)) + sum(
        seed == sample_seed(3, 0, index) for index, seed in epoch) >= 7
    assert list(itertools.islice(sampler, 5))[4] == next(iter(TrainBatchSampler(12, 4, seed=3, start_update=4,
                                                                                 draws=data.draws)))
    assert build_split(experiment(root, rooms="exif: stored"), "train").draws is None
    with pytest.raises(ValueError, match="11 training images do not fill one update of 12"):
        TrainBatchSampler(12, 12, draws=[(4, 8), (8, 3)])


@pytest.mark.parametrize(("street", "rooms", "tasks", "words"), [
    ("", "weight: 3", ON, r"semseg of street is not that of the data sets before it: 2 outputs against 3; name it "
                          r"apart \(rename: \{semseg: semseg@street\}\)"),
    (APART, "name: street", ON, r"two of the data sets are called 'street'; give one of them another name"),
    (APART, "weight: 0", ON, r"'train_db_name\.weight' must be a finite number above 0"),
    ("rename: {sal: sal@x}", "weight: 3", ON, r"rename' names 'sal', which street has no labels for; its tasks: sem"),
    ("rename: {semseg: edge@x}", "weight: 3", ON, r"rename\.semseg' must be semseg@ and a name, got 'edge@x'"),
    ("rename: {semseg: semseg@a b}", "weight: 3", ON, r"must be semseg@ and a name"),
    (APART, "image_size: [64, 64]", ON.replace("}", "}"), None),
    (APART, "weight: 3", "{include_depth: true}", r"street has labels for none of the tasks \(depth\)"),
    (APART, "weight: 3", "{include_sal: true}", r"rooms \+ street has no labels for sal; its tasks: semseg, sem"),
    (APART, "weight: 3", "{include_semseg@: true}", r"unknown key 'task_dictionary\.include_semseg@'")])
def test_mistakes(root, street, rooms, tasks, words):
    if words is None:
        experiment(root, street, rooms, tasks)             # the experiment says an image size itself
        with pytest.raises(ConfigError, match=r"'image_size' must be given: the data sets of rooms \+ street have"):
            experiment(root, street, rooms, tasks, "image_size=null")
        return
    with pytest.raises(ConfigError, match=words):
        experiment(root, street, rooms, tasks)


def test_only_some_have_a_weight_and_one_that_is_never_augmented(root):
    base = ROOT / "configs" / "bim_nyud.yml"
    with pytest.raises(ConfigError, match="either every data set has a weight, or none has"):
        load_config(base, ["train_db_name=[{name: NYUD, weight: 1}, PASCALContext]"])
    with pytest.raises(ConfigError, match="Cityscapes cannot be mixed: its labels have a size of their own$"):
        load_config(base, ["train_db_name=[NYUD, {name: Cityscapes}]"])
    with pytest.raises(ConfigError, match="unknown data set 'NYU'; did you mean 'NYUD'"):
        load_config(base, ["train_db_name=[{name: NYU}]"])
    apart = "{name: PASCALContext, rename: {semseg: semseg@pascal, normals: normals@pascal, edge: edge@pascal}}"
    both = load_config(base, [f"train_db_name=[NYUD, {apart}]", "image_size=[512, 576]", "task_dictionary={"
                              "include_semseg: true, include_semseg@pascal: true, include_sal: true}"])
    assert both.dataset.tasks["semseg@pascal"] == 21 and both.dataset.tasks["semseg"] == 40
    disparity = "rename: {depth: depth@x}"
    assert "depth@x" in load_config(base, [f"train_db_name={{name: NYUD, {disparity}}}", "val_db_name=null",
                                           "task_dictionary={include_depth@x: true}"]).dataset.labels


def test_ground_truths_of_different_kinds_are_not_pooled(root):
    config = experiment(root, rooms="tasks: {semseg: {classes: [a, b, c]}, depth: {unit: mm}, edge: {max_dist: 0.02}}, "
                                    "image_size: [64, 96], splits: {train: 'images/t*', val: 'images/v*'}, name: r")
    split = build_split(config, "val").scored("edge")
    assert split.boundary is None and split.dataset == "r + street (whose ground truths differ)"


def test_tasks_named_apart():
    assert TASKS.find("SEMSEG@a_1") == "semseg@a_1" and TASKS.load("depth@x") is TASKS.load("depth")
    assert TASKS.in_order(["edge", "semseg@b", "depth", "semseg@a", "semseg"]) == [
        "semseg", "semseg@a", "semseg@b", "depth", "edge"]
    assert TASKS.is_name("edge@b") and not any(map(TASKS.is_name, ("edge@", "egde@b", "edge@a-b", "Edge", "@b")))
    with pytest.raises(KeyError):
        TASKS["albedo"]
    with pytest.raises(ValueError, match="behind @ stands a name of letters"):
        TASKS.find("semseg@a.b")
    check_reference({"semseg@a": 0.5, "edge@b/odsF": 0.7})
    with pytest.raises(ConfigError, match=r"unknown score 'edge@b/odsf'; did you mean 'edge@b/odsF'"):
        check_reference({"edge@b/odsf": 0.7})
    assert delta_m_against({"depth@x": {"rmse": 0.9}}, {"depth@x": 1.0}) == pytest.approx(10)


def test_disparities_of_a_folder_are_augmented_as_such(root):
    from data.labels import DisparityLabel
    config = load_config(ROOT / "configs" / "_base_" / "bim.yml", [
        *TINY, f"train_db_name={{folder: {root / 'rooms'}, image_size: [64, 96], splits: {{train: 'images/t*', val: "
               "'images/v*'}, tasks: {depth: {unit: disparity, scale: 0.01}}}",
        "task_dictionary={include_depth: true}"])
    data = build_split(config, "train")
    assert isinstance(data.labels["depth"], DisparityLabel) and isinstance(data, MultiTaskDataset)
    assert all(isinstance(rules, DisparityLabel) for step in data.transform.steps if hasattr(step, "labels")
               for rules in step.labels.values())
