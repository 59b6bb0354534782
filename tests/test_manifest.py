"""The checkpoints of a run's folder: their names, the manifest, and which one a run goes on from."""

import json
import os
import shutil

import pytest
import torch

from utils.engine import manifest
from utils.engine.manifest import MANIFEST, newest_whole, take_over, write_checkpoint
from utils.engine.saving import Clock, Saver, on_host


def state(step: int, salt: float = 0.0) -> dict:
    return {"step": step, "model": {"weight": torch.full((50,), step + salt)}}


@pytest.fixture
def folder(tmp_path):
    """Steps 2 (best and kept), 4, 6 of a run."""
    for step, names, score in ((2, ("best.pt", "step_2.pt"), 0.5), (4, (), None), (6, (), 0.25)):
        write_checkpoint(tmp_path / "run", state(step), names, score)
    return tmp_path / "run"


def listed(folder) -> list[dict]:
    return json.loads((folder / MANIFEST).read_text())["checkpoints"]


def step_in(path) -> int:
    return torch.load(path, weights_only=True)["step"]


def damage(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_the_policy_of_names(folder):
    assert {p.name: step_in(p) for p in folder.glob("*.pt")} == {
        "last.pt": 6, "previous.pt": 4, "best.pt": 2, "step_2.pt": 2}
    rows = listed(folder)
    assert [(row["step"], sorted(row["files"]), row["score"]) for row in rows] == [
        (6, ["last.pt"], 0.25), (4, ["previous.pt"], None), (2, ["best.pt", "step_2.pt"], 0.5)]
    assert all(row["bytes"] == (folder / row["files"][0]).stat().st_size for row in rows)


def test_the_same_step_again_leaves_the_previous_one(folder):
    """As after an evaluation, which adds its scores to the checkpoint before it."""
    write_checkpoint(folder, state(6, 0.5), (), 0.75)
    assert step_in(folder / "previous.pt") == 4 and len(listed(folder)) == 3 and listed(folder)[0]["score"] == 0.75


@pytest.mark.parametrize("broken, chosen", [
    ([], "last.pt"), (["last.pt"], "previous.pt"), (["last.pt", "previous.pt"], "best.pt"),
    (["last.pt", "previous.pt", "best.pt"], "step_2.pt")])
@pytest.mark.parametrize("how", ["damaged", "gone", "cut", "empty", "foreign"])
def test_the_newest_whole_checkpoint_is_chosen(folder, tmp_path, caplog, broken, chosen, how):
    if "best.pt" in broken:
        shutil.copy(folder / "step_2.pt", tmp_path / "copy")        # they share their content: two names of one file
        os.replace(tmp_path / "copy", folder / "step_2.pt")
    for name in broken:
        path = folder / name
        if how == "damaged":
            damage(path)
        elif how == "gone":
            path.unlink()
        elif how == "foreign":
            write_checkpoint(tmp_path / "other", state(9), (), None)
            os.replace(tmp_path / "other" / "last.pt", path)
        else:
            path.write_bytes(path.read_bytes()[:-50] if how == "cut" else b"")
    assert newest_whole(folder).name == chosen
    assert how == "gone" or sum("going back to" in text for text in caplog.messages) == len(broken)


def test_nothing_whole_is_refused_with_every_reason(folder):
    for path in folder.glob("*.pt"):
        damage(path) if path.name != "best.pt" else None
    damage(folder / "previous.pt")                                  # the same bit again: whole
    assert newest_whole(folder).name == "previous.pt"
    damage(folder / "previous.pt")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be resumed: .*last\.pt is damaged.*best\.pt"):
        newest_whole(folder)


def test_swapped_files_are_known_by_their_content(folder, tmp_path):
    os.replace(folder / "last.pt", tmp_path / "x")
    os.replace(folder / "best.pt", folder / "last.pt")
    os.replace(tmp_path / "x", folder / "best.pt")
    assert newest_whole(folder).name == "best.pt" and step_in(folder / "best.pt") == 6


def test_copied_files_and_a_damaged_manifest_are_taken_as_they_are(folder, tmp_path, caplog):
    (tmp_path / "new").mkdir()
    shutil.copy(folder / "step_2.pt", tmp_path / "new" / "last.pt")
    assert newest_whole(tmp_path / "new").name == "last.pt"
    take_over(tmp_path / "new", tmp_path / "new" / "last.pt")
    assert [(row["step"], row["files"]) for row in listed(tmp_path / "new")] == [(2, ["last.pt"])]
    (folder / MANIFEST).write_text("{")
    assert newest_whole(folder).name == "last.pt" and "is damaged" in caplog.text
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:700])
    assert newest_whole(folder).name == "previous.pt" and "last.pt is damaged: it is cut off" in caplog.text
    assert newest_whole(tmp_path / "nowhere") is None


def test_what_is_damaged_steps_aside_and_leftovers_go(folder):
    damage(folder / "last.pt")
    (folder / ".last.pt.0123.tmp").write_text("half")
    take_over(folder, newest_whole(folder))
    assert {p.name for p in folder.iterdir()} == {"last.pt.unusable", "previous.pt", "best.pt", "step_2.pt", MANIFEST}
    write_checkpoint(folder, state(5), (), None)
    assert {p.name: step_in(p) for p in folder.glob("*.pt")} == {
        "last.pt": 5, "previous.pt": 4, "best.pt": 2, "step_2.pt": 2}


@pytest.mark.parametrize("dies_at", range(8))
def test_dying_at_any_moment_of_a_save_loses_nothing(folder, monkeypatch, dies_at):
    """Each time one call more to the disk is made before the process dies; nothing is tidied up after it."""
    class Death(BaseException):
        pass

    left = [dies_at]

    def mortal(function):
        def call(*arguments, **options):
            if not left[0]:
                raise Death
            left[0] -= 1
            return function(*arguments, **options)
        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "link"), (os, "fsync")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        patch.setattr(manifest.Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Death):
            write_checkpoint(folder, state(8), (), 0.5)
    chosen = newest_whole(folder)
    assert step_in(chosen) in (6, 8)
    take_over(folder, chosen)
    write_checkpoint(folder, state(10), (), None)
    assert step_in(newest_whole(folder)) == 10 and step_in(folder / "previous.pt") in (6, 8)


def test_the_thread_writes_what_was_there_when_it_was_asked(tmp_path):
    weight, told = torch.zeros(1000), []
    saver = Saver(tmp_path, lambda: told.append("synced"))
    saver.save({"step": 1, "model": {"weight": weight}})
    weight += 1
    saver.wait()
    assert not torch.load(tmp_path / "last.pt", weights_only=True)["model"]["weight"].any() and told == ["synced"]
    assert saver.written == 1 and not saver.failed


def test_an_error_of_the_thread_is_raised_once_by_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file" / "run", lambda: None)
    saver.save(state(1))
    with pytest.raises(OSError, match="cannot write .*last.pt: Not a directory"):
        saver.wait()
    saver.wait()
    assert saver.written == 0


def test_copies_share_nothing():
    original = {"a": [torch.ones(2), (torch.ones(1), 3)], "b": None}
    copy = on_host(original)
    original["a"][0].zero_()
    original["a"].append(4)
    assert copy["a"][0].tolist() == [1, 1] and copy["a"][1][1] == 3 and len(copy["a"]) == 2 and copy["b"] is None


def test_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(steps=5, minutes=10, step=3)
    assert not clock.due_by_steps(7) and clock.due_by_steps(8) and not clock.due_by_time()
    now[0] += 600
    assert clock.due_by_time()
    clock.restart(8)
    assert not clock.due_by_time() and not clock.due_by_steps(12)
    never = Clock(steps=0, minutes=0, step=0)
    now[0] += 1e9
    assert not never.due_by_steps(10**9) and not never.due_by_time()
