"""Which weights a number stands for: the held-out part of the training split, words beside scores, several seeds."""

import json

import pytest
import yaml

from data.splits import PartOfSplit, SplitList
from scripts.compare import main as compare
from tests.shared import ROOT
from utils.engine import selection
from utils.engine.build import build_split
from utils.engine.config import load_config
from utils.engine.predict import infer
from utils.engine.results import read_results, save_results
from utils.engine.train import train
from utils.options import ConfigError

NYUD = str(ROOT / "configs" / "bim_nyud.yml")


def test_what_is_held_out_depends_on_the_ids_alone(tmp_path):
    names = [f"im{i:03d}" for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(names))
    (tmp_path / "b.txt").write_text("\n".join(reversed(names)))
    parts = {}
    for file in ("a.txt", "b.txt"):
        held, rest = (PartOfSplit(SplitList(file), 0.1, held_out).ids(tmp_path, "{id}") for held_out in (True, False))
        assert len(held) == 5 and len(rest) == 45 and not set(held) & set(rest)
        assert rest == [name for name in (names if file == "a.txt" else names[::-1]) if name not in held]
        parts[file] = set(held)
    assert parts["a.txt"] == parts["b.txt"]
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match=r"val_from_train 0\.1 leaves nothing to train on: .* has 1 image"):
        PartOfSplit(SplitList("one.txt"), 0.1, True).ids(tmp_path, "{id}")


def test_a_training_selects_on_images_that_it_neither_trains_on_nor_is_tested_on(tiny):
    config = load_config(NYUD, [*tiny, "val_from_train=0.25"])
    train_ids, selecting, test = (set(build_split(config, split).ids) for split in ("train", "selects", "val"))
    assert (len(train_ids), len(selecting), len(test)) == (9, 3, 5)
    assert not train_ids & selecting and not (train_ids | selecting) & test
    plain = load_config(NYUD, tiny)
    assert build_split(plain, "selects").ids == build_split(plain, "val").ids
    assert set(build_split(plain, "train").ids) == train_ids | selecting
    for value in (-0.1, 0.6, 1):
        with pytest.raises(ConfigError, match="val_from_train"):
            load_config(NYUD, [*tiny, f"val_from_train={value}"])


def test_every_number_says_how_its_weights_were_chosen(tiny, tmp_path, capsys):
    for fraction, words in ((0.0, "best on the test split"),
                            (0.25, "best on 25% of the training split, held out")):
        config = load_config(NYUD, [*tiny, "max_iter=2", "val_interval=1", f"val_from_train={fraction}",
                                    f"version_name=part{fraction}", "boundary_infer=off"])
        train(config, resume=False)
        log = (config.run_dir / "log.txt").read_text()
        assert f"best.pt: {words}; last.pt: last update" in log
        split = "NYUD train, 25% held out" if fraction else "NYUD test"
        assert f"evaluation at step 2 on {split}" in log
        (_, early), (scores, late) = (read_results(config.run_dir / "results" / f"step_{n}.json") for n in (1, 2))
        assert (early["selection"], late["selection"]) == ("update 1 of 2", "last update") and late["split"] == split
        for name, said in (("best.pt", words), ("last.pt", "last update")):
            infer(config, config.run_dir / name, tmp_path / name)
            about = json.loads((tmp_path / name / "results.json").read_text())
            assert about["selection"] == said and about["dataset"] == "NYUD"
            if fraction:                                   # the test split has 5 images, 3 are held out
                assert about["scores"]["depth"]["valid_pixels"] > scores["depth"]["valid_pixels"]
    compare([f"a={tmp_path / 'best.pt' / 'results.json'}"])
    assert f"| {words} |" in capsys.readouterr().out


def test_a_checkpoint_of_another_program_is_not_known(tmp_path):
    assert selection.of_checkpoint(tmp_path / "best.pt", {"model": {}}) == "not known"


def make_run(tmp_path, name: str, rmse: float, chosen: str = "last update", **changes) -> str:
    folder = tmp_path / name
    save_results(folder / "results" / "step_9.json", {"depth": {"rmse": rmse, "valid_pixels": 9}}, selection=chosen)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": "bim", "version_name": name, **changes}))
    return str(folder)


def test_seeds_of_one_experiment_are_one_row(tmp_path, capsys):
    runs = [make_run(tmp_path, f"bim_seed{seed}", rmse, seed=seed) for seed, rmse in enumerate((0.5, 0.6, 0.7))]
    runs.append(make_run(tmp_path, "other", 0.55, optimizer="sgd"))
    assert compare(runs) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["", "n", "depth RMSE m v", "weights"]
    assert lines[2] == ["bim", "3", "0.6000 +- 0.1000", "last update"]       # by hand: sqrt((0.01 + 0 + 0.01) / 2)
    assert lines[3] == ["other", "1", "0.5500", "last update"]
    assert compare([*runs, "--format", "latex"]) == 0
    out = capsys.readouterr().out
    assert r"bim & 3 & 0.6000 $\pm$ 0.1000 & last update \\" in out and r"depth RMSE m $\downarrow$" in out
    assert compare([*runs, "--format", "csv"]) == 0
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["name", "n", "depth/rmse mean", "depth/rmse spread", "weights"]
    assert float(rows[1][2]) == pytest.approx(0.6) and float(rows[1][3]) == pytest.approx(0.1) and rows[2][3] == ""


def test_runs_that_chose_their_weights_differently_are_no_row(tmp_path, capsys):
    runs = [make_run(tmp_path, "a", 0.5), make_run(tmp_path, "b", 0.6, "best on the test split")]
    assert compare(runs) == 1
    assert "must have chosen their weights alike" in capsys.readouterr().err
    assert compare([f"x={runs[0]}", f"y={runs[1]}"]) == 0
    assert "| y | 1 | 0.6000 | best on the test split |" in capsys.readouterr().out
