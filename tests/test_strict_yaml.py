"""Experiment files that YAML would read and an experiment should not: each is refused with its file and line."""

import time

import pytest
import yaml

from scripts.faults.fuzz import campaign
from tests.test_config import MINIMAL
from utils.engine.config import load_config
from utils.engine.strict_yaml import MAX_BYTES, read_strictly
from utils.options import ConfigError

SOUND = yaml.safe_dump(MINIMAL)


def refusal(tmp_path, text: str) -> str:
    """What the loader says to a sound experiment with this text below it; it must say so at once, in one line."""
    path = tmp_path / "exp.yml"
    path.write_text(SOUND + text, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(ConfigError) as stop:
        load_config(path)
    assert time.process_time() - start < 2
    message = str(stop.value)
    assert "\n" not in message and len(message) < 600 and message.startswith(str(path)), message
    return message


def line_of(text: str) -> int:
    """Of the last line of the sound experiment with this text below it."""
    return len((SOUND + text).splitlines())


def test_a_key_that_stands_twice_is_told_with_both_lines(tmp_path):
    text = "max_iter: 5\nseed: 1\nmax_iter: 50\n"
    assert (f"line {line_of(text)}: the key 'max_iter' stands twice, here and on line {line_of(text) - 2}"
            in refusal(tmp_path, text))
    assert "the key 'lr' stands twice" in refusal(tmp_path, "optimizer_kwargs: {lr: 1.0e-3, lr: 1.0e-2}\n")


def test_a_merge_may_repeat_a_key(tmp_path):
    path = tmp_path / "exp.yml"
    path.write_text(SOUND + "optimizer_kwargs: {<<: {lr: 1.0, eps: 0.5}, lr: 2.0}\n", encoding="utf-8")
    assert (load_config(path).optimizer_kwargs.lr, load_config(path).optimizer_kwargs.eps) == (2.0, 0.5)


BOMB = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else 1}]\n" for i in range(20))


@pytest.mark.parametrize(("text", "words"), [
    (BOMB, "more than 5,000 values"),
    ("single_task_scores: &a {b: *a}\n", "holds itself"),
    ("seed: " + "[" * 2000 + "\n", "more than 16 groups or lists in each other"),
    ("seed: " + "9" * 5000 + "\n", "cannot be read as int"),
    ("seed: !!int x\n", "'x' cannot be read as int"),
    ("seed: !!python/object/apply:os.getpid []\n", "has no meaning here"),
    ("seed: !!binary aGk=\n", "the tag !!binary has no meaning here"),
    ("1: 2\n", "a key must be a name; '1' is no name"),
    ("? [a]\n: 1\n", "a list or group is no name"),
    ("on: 1\n", "'on' is no name"),
    ('version_name: "a\\0b"\n', "holds the character '\\x00'"),
    ('version_name: "a\\ud800b"\n', "holds the character"),
    ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    ("seed: " + "1" * MAX_BYTES + "\n", "too many for an experiment file"),
])
def test_what_yaml_allows_and_an_experiment_does_not(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


def test_dates_and_clock_times_are_text(tmp_path):
    path = tmp_path / "exp.yml"
    path.write_text(SOUND + "version_name: 2026-11-26\nout_dir: 12:30\n", encoding="utf-8")
    config = load_config(path)
    assert (config.version_name, config.out_dir) == ("2026-11-26", "12:30")
    assert read_strictly("[1, 1.5, yes, null, x]", "here") == [1, 1.5, True, None, "x"]


def test_an_empty_group_does_not_wipe_that_of_its_base(tmp_path):
    (tmp_path / "base.yml").write_text(SOUND + "optimizer_kwargs: {lr: 0.5}\n", encoding="utf-8")
    path = tmp_path / "exp.yml"
    path.write_text("_base_: base.yml\noptimizer_kwargs:\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"exp\.yml: 'optimizer_kwargs' is empty, which would drop .*\(lr\).*: null'"):
        load_config(path)
    path.write_text("_base_: base.yml\noptimizer_kwargs: null\n", encoding="utf-8")        # said aloud
    assert load_config(path).optimizer_kwargs.lr != 0.5
    path.write_text("_base_: base.yml\noptimizer_kwargs: {}\n", encoding="utf-8")          # nothing to add
    assert load_config(path).optimizer_kwargs.lr == 0.5
    path.write_text(SOUND + "optimizer_kwargs:\n", encoding="utf-8")                       # nothing to drop
    assert load_config(path).optimizer_kwargs.lr > 0


def test_base_files_that_multiply_or_are_missing(tmp_path):
    (tmp_path / "b0.yml").write_text(SOUND, encoding="utf-8")
    for i in range(1, 15):
        (tmp_path / f"b{i}.yml").write_text(f"_base_: [b{i - 1}.yml, b{i - 1}.yml, b{i - 1}.yml]\n", encoding="utf-8")
    start = time.process_time()
    load_config(tmp_path / "b14.yml")                          # 3^14 readings, were each file read anew
    assert time.process_time() - start < 2
    (tmp_path / "b0.yml").unlink()
    with pytest.raises(FileNotFoundError, match=r"not found: .*b0\.yml.*, the _base_ of .*b1\.yml"):
        load_config(tmp_path / "b3.yml")


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../x", "''", ".", "x" * 300])
def test_a_run_does_not_leave_its_folder(tmp_path, name):
    assert "'version_name' must name a folder below out_dir" in refusal(tmp_path, f"version_name: {name}\n")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "exp.yml"
    path.write_text(SOUND + "out_dir: ~/runs\ndb_root: ~/data\nversion_name: group/one\n", encoding="utf-8")
    config = load_config(path)
    assert config.run_dir == tmp_path / "runs" / "group" / "one"
    for name in ("~nobody_of_this_name/runs", "$UNKNOWN/runs"):
        with pytest.raises(ConfigError, match="begins with a user or variable that is unknown here"):
            load_config(path, [f"out_dir={name}"])


@pytest.mark.parametrize("override", [
    "grad_clip_param.max_norm=0", "grad_clip_param.max_norm=-1", "grad_clip_param.max_norm=.nan", "seed=1e300",
    "nworkers=100000", "max_iter=99999999999999999999", "a." * 50 + "b=1", "seed={a: {",
    "optimizer_kwargs={lr: 1, lr: 2}"])
def test_arguments_are_read_as_strictly(tmp_path, override):
    path = tmp_path / "exp.yml"
    path.write_text(SOUND, encoding="utf-8")
    with pytest.raises(ConfigError, match="the command line|argument '"):
        load_config(path, [override])


def test_files_made_wrong_at_random(capsys):
    """A short form of the campaign: none ends in a traceback, none takes two seconds."""
    assert campaign(files=100, train=0, seed=1, first=0) == 0, capsys.readouterr().out
