"""Videos in and out: every frame, at its rate, with colours that do not flicker; cameras; damage."""

import logging
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.test_predict_files import NYUD, by_colour, stripes
from tests.watched_run import answers, experiment
from utils.engine import video
from utils.engine.build import model_from_config
from utils.engine.predict import predict
from utils.engine.predictor import Predictor
from utils.engine.video import Frames, predict_video


@pytest.fixture
def predictor(tmp_path) -> Predictor:
    config = experiment(tmp_path, tmp_path, *NYUD, "nworkers=2")
    torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")
    return Predictor(config, tmp_path / "any.pt", torch.device("cpu"), batch=2)


def write_video(path: Path, frames, rate: float = 29.97) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (got := capture.read())[0]:
        frames.append(got[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_every_frame_at_its_rate_with_all_tasks(tmp_path, predictor):
    """The picture and four tasks in three columns; the last place stays black."""
    shades = [np.clip(stripes(96, 144).astype(int) * (20 - i) // 20, 0, 255).astype(np.uint8) for i in range(7)]
    source = write_video(tmp_path / "in" / "a.b.mp4", shades)
    with answers(by_colour):
        [shown] = predict(predictor.config, tmp_path / "any.pt", source, tmp_path / "out")
    assert shown == tmp_path / "out" / "videos" / "a.b.mp4"
    frames, rate = read_video(shown)
    assert len(frames) == 7 and rate == pytest.approx(29.97, abs=0.01) and frames[0].shape == (2 * 96, 3 * 144, 3)
    for i, frame in enumerate(frames):
        red = int(shades[i][48, 24, 0])
        assert abs(int(frame[48, 24, 0]) - red) < 12 and frame[150, 300:].max() < 12      # in order; the empty place
        assert abs(int(frame[70, 144 + 72, 0]) - 128) < 30                      # class 2 of NYUD: (0, 128, 128) + 1
    assert list((tmp_path / "out" / "videos").iterdir()) == [shown]             # nothing half written
    stamp = shown.stat().st_mtime_ns
    with answers(by_colour):
        predict(predictor.config, tmp_path / "any.pt", source, tmp_path / "out")
    assert shown.stat().st_mtime_ns == stamp                                    # it is there already


def test_colours_of_depth_do_not_flicker(tmp_path, predictor):
    """Something near comes into the picture for one frame: the wall behind it keeps its colour, nearly."""
    still = np.full((64, 96, 3), 128, np.uint8)
    still[:, 48:] = 192                                                         # two walls
    flash = still.copy()
    flash[:, :8] = 0

    def by_brightness(rgb):
        return {**by_colour(rgb), "depth": 1 + 8 * rgb[:, :1]}

    steady = video.Steady(predictor)
    colours = []
    with answers(by_brightness):
        for picture in (still, still, flash, still):
            [answer] = steady.forward([predictor.frame(picture)])
            colours.append({r.task: r for r in answer.results(picture)}["depth"].colour()[32, 40].astype(int))
        [alone] = predictor.forward([predictor.frame(flash)])
        flickering = {r.task: r for r in alone.results(flash)}["depth"].colour()[32, 40].astype(int)
    assert np.array_equal(colours[0], colours[1])
    jump = np.abs(colours[2] - colours[1]).max()
    assert 0 < jump < 0.5 * np.abs(flickering - colours[1]).max()


def test_a_camera_is_recorded_in_its_own_time(tmp_path, predictor, monkeypatch, caplog):
    """Frames that the network could not take are filled in; Ctrl-C ends the recording and keeps it."""
    class Camera:
        def __init__(self, source):
            self.opened, self.left = source == 3, 5

        def isOpened(self):         # noqa: N802 (OpenCV's name)
            return self.opened

        def get(self, key):
            return {cv2.CAP_PROP_FPS: 10.0}.get(key, 0.0)

        def read(self):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return True, stripes(64, 96)

        def release(self):
            pass

    clock = iter(np.arange(0.0, 100.0, 0.5))
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture",
                        lambda source: Camera(source) if isinstance(source, int) else capture(source))
    monkeypatch.setattr(video.time, "monotonic", lambda: float(next(clock)))
    before = signal.getsignal(signal.SIGINT)
    with answers(by_colour), caplog.at_level(logging.INFO):
        predict_video(predictor, "camera:3", tmp_path / "c.mp4")
    assert "the recording ends" in caplog.text
    frames, rate = read_video(tmp_path / "c.mp4")
    assert rate == 10 and len(frames) >= 20 and len(frames) % 5 == 0            # half a second for every frame
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="cannot open camera:4: there is no such camera"):
        Frames("camera:4")


def test_bad_videos_cost_nothing_else(tmp_path, predictor, caplog):
    good = write_video(tmp_path / "in" / "good.mp4", [stripes(64, 96)] * 3)
    (tmp_path / "in" / "cut.mp4").write_bytes(good.read_bytes()[:-300])
    (tmp_path / "in" / "text.avi").write_text("no video")
    cv2.imwrite(str(tmp_path / "in" / "p.png"), stripes(64, 96))
    (tmp_path / "in" / "\udcff.mp4").write_bytes(good.read_bytes())
    with answers(by_colour), pytest.raises(ValueError, match="3 of 5 input") as error:
        predict(predictor.config, tmp_path / "any.pt", tmp_path / "in", tmp_path / "out")
    assert "cut.mp4" in str(error.value) and "text.avi" in str(error.value)
    assert "OpenCV opens no video whose name is not UTF-8; rename it" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out" / "videos").iterdir()) == ["good.mp4"]
    assert (tmp_path / "out" / "panels" / "p.png").is_file()
    with pytest.raises(FileNotFoundError):
        Frames(str(tmp_path / "nowhere.mp4"))


def test_a_full_disk_is_told(tmp_path, predictor, monkeypatch):
    source = write_video(tmp_path / "a.mp4", [stripes(64, 96)] * 3)

    class Full:
        def __init__(self, *arguments):
            self.writer = writer(*arguments)
            self.isOpened, self.release = self.writer.isOpened, self.writer.release

        def write(self, frame):
            pass

    writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", Full)
    with answers(by_colour), pytest.raises(OSError, match="of 3 frames 0 are in the file; is the disk full"):
        predict_video(predictor, str(source), tmp_path / "out.mp4")
    assert not list(tmp_path.glob("*out*"))


def test_memory_does_not_grow_with_the_video(tmp_path, predictor, monkeypatch):
    """No more frames are under way than threads and batches ask for."""
    alive, most = [0], [0]

    class Counted(Frames):
        def __iter__(self):
            for image in super().__iter__():
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                yield image

    show = video.show

    def shown(*arguments):
        mosaic = show(*arguments)
        alive[0] -= 1
        return mosaic

    monkeypatch.setattr(video, "Frames", Counted)
    monkeypatch.setattr(video, "show", shown)
    source = write_video(tmp_path / "a.mp4", [stripes(64, 96)] * 30)
    with answers(by_colour):
        predict_video(predictor, str(source), tmp_path / "out.mp4")
    assert most[0] <= 12 and alive[0] == 0
