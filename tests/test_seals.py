"""Files that are whole or not there, and that tell when they have been damaged."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from utils.durable import WriteError, atomic_path, leftovers, write_text
from utils.engine.checkpoint import read_checkpoint, save_checkpoint
from utils.locks import FolderLock
from utils.seals import LENGTH, check_whole, read_seal, save_sealed

STATE = {"step": 31, "model": {"weight": torch.arange(600.0)}}


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    return path


def test_a_sealed_file_says_its_step_and_any_reader_reads_it(sealed):
    assert read_seal(sealed).step == 31
    assert torch.equal(torch.load(sealed, weights_only=True)["model"]["weight"], STATE["model"]["weight"])
    assert torch.equal(torch.load(sealed, weights_only=True, mmap=True)["model"]["weight"], STATE["model"]["weight"])
    check_whole(sealed)


def test_every_flipped_bit_is_noticed(sealed, tmp_path):
    """In each 7th byte, and all of the last 300, wherever that is: headers and the seal itself included."""
    whole, copy = sealed.read_bytes(), tmp_path / "copy.pt"
    for position in sorted({*range(0, len(whole), 7), *range(len(whole) - 300, len(whole))}):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        copy.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"copy\.pt is damaged"):
            read_checkpoint(copy)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -LENGTH, -LENGTH - 2, -LENGTH - 30])
def test_a_file_that_was_cut_off_is_refused(sealed, length):
    sealed.write_bytes(sealed.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"last\.pt (is damaged|cannot be read)"):
        read_checkpoint(sealed)


def test_files_of_others_are_checked_by_their_own_sums(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(STATE, path)
    assert read_seal(path) is None and read_checkpoint(path)["step"] == 31
    content = bytearray(path.read_bytes())
    content[content.index(STATE["model"]["weight"].numpy().tobytes()[4:40]) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth is damaged: the entry .* is not what was written"):
        read_checkpoint(path)


def test_files_that_are_no_archives_have_nothing_to_be_checked_by(tmp_path):
    """PyTorch wrote such files before version 1.6; many published weights are."""
    for last in (0.0, 1.0, -1.0, 0.057):
        torch.save({"weight": torch.full((64,), last)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        check_whole(tmp_path / "old.pth")
        assert read_checkpoint(tmp_path / "old.pth")["model"]["weight"][0] == pytest.approx(last)


def test_a_write_that_fails_names_the_file_and_the_cause(tmp_path):
    with pytest.raises(WriteError, match=rf"^cannot write {tmp_path}/gone/file/a.txt: Not a directory$"):
        (tmp_path / "gone").write_text("")
        write_text(tmp_path / "gone" / "file" / "a.txt", "a")


def test_a_disk_that_has_turned_read_only_is_what_is_told(tmp_path, monkeypatch):
    """Not that the temporary file cannot be removed there, either."""
    def refused(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for owner, name in ((os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, refused)
    with pytest.raises(WriteError, match=rf"^cannot write {tmp_path}/a.txt: Read-only file system$"):
        write_text(tmp_path / "a.txt", "a")


def test_a_file_in_the_place_of_a_runs_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    for folder in (tmp_path / "run", tmp_path / "run" / "seed_0"):
        with (pytest.raises(ValueError, match=f"^{tmp_path}/run.* is a file where a run needs a folder; remove it, or"),
              FolderLock(folder, {})):
            pass


def test_a_full_disk_keeps_its_cause_through_the_writer_of_pytorch(tmp_path):
    with (pytest.raises(WriteError, match=r"^cannot write .*last\.pt: No space left on device$"),
          atomic_path(tmp_path / "last.pt") as temporary):
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        save_sealed(temporary, STATE, 31)
    assert not list(tmp_path.iterdir())


def test_temporary_names_cannot_be_guessed_and_follow_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda length: "0" * 2 * length)
    trap = tmp_path / f".last.pt.{'0' * 16}.tmp"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    trap.symlink_to(victim)
    with pytest.raises(WriteError, match="File exists"):
        write_text(tmp_path / "last.pt", "x")
    assert victim.read_text() == "mine" and leftovers(tmp_path) == [trap]


def test_files_have_the_permissions_that_the_user_gives_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
