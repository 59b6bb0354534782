"""Keeps a run from being lost: when to save, when to leave, what to save when something breaks."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from utils import distributed
from utils.engine.leaving import BREAK, GOING_ON, LEAVE, SAVE, Agreement, Departure
from utils.engine.manifest import BEST, LAST, step_name
from utils.engine.run import Run
from utils.engine.saving import Clock, Saver
from utils.exits import ToBeContinued, ToldElsewhere
from utils.machine import git_hash
from utils.sharded import is_sharded, whole

logger = logging.getLogger(__name__)

LAUNCHER_S = 3.0        # in which a launcher ends the other processes once one has gone


class Keeper:
    """Saves and leaves for a run. All ranks call the same methods after the same updates.

    sums: what the log line to come has summed up so far on this process. failed: whether this process cannot make the
    next update; its error is raised once the others know and the state is saved.
    """

    def __init__(self, run: Run, departure: Departure, sums: Callable[[], dict], failed: Callable[[], bool]) -> None:
        self.run, self.departure, self.sums, self.failed = run, departure, sums, failed
        settings = run.config.save_interval
        self.clock = Clock(settings.steps, settings.minutes, run.step)
        self.agreement = Agreement(self._wish)
        self.saver = Saver(run.config.run_dir, run.writer.sync) if distributed.is_main() else None
        self.saved = run.step           # of the newest checkpoint; 0: there is none
        self.whole = True               # the state is that of a step, and not in the middle of an update
        departure.something_to_lose = True

    def begin_update(self) -> None:
        """From here on the state belongs to no step."""
        self.agreement.announce()
        self.whole = False

    def end_update(self, settle: Callable[[], None]) -> None:
        """Saves what is due, and leaves where a process has been asked to, or one cannot go on.

        settle: called before a state is saved; it raises where the state must not be. Ahead of an evaluation the
        checkpoint is on the disk: whatever happens there, nothing is lost.
        """
        run, wish = self.run, self.agreement.result()
        due = run.kept or run.evaluation_due or self.clock.due_by_steps(run.step) or wish > GOING_ON
        if due:
            settle()
        self.whole = True
        if due:
            self.save(wait=run.evaluation_due or wish >= LEAVE)
        if wish == LEAVE:
            self.leave()
        if wish == BREAK and not self.failed():
            raise ToldElsewhere("another process of the run cannot go on")

    def save(self, best: bool = False, score: float | None = None, wait: bool = False) -> None:
        """Begins to write last.pt, also as best.pt or step_N.pt; with `wait`, until it is on the disk."""
        run, names = self.run, [BEST] if best else []
        names += [step_name(self.run.step)] if run.kept else []
        ranks = self.agreement.gather({"rng": _random_state(run.device), "sums": self.sums()})
        if self.saver is not None or is_sharded(run.model):
            state = whole(_state(run, ranks), keep=self.saver is not None)
        if self.saver is not None:
            self.saver.save(state, names, score)
            if wait:
                self.saver.wait()
        self.saved = run.step
        self.clock.restart(run.step)
        if wait:
            self.agreement.meet()       # a process that leaves early has its launcher end the others

    def leave(self) -> NoReturn:
        """Says where the run goes on, and raises ToBeContinued."""
        message = f"interrupted ({self.departure.reason or 'another process was asked'}): {self._holds()}"
        logger.info("%s", message)
        raise ToBeContinued(message)

    def finish(self) -> None:
        """The run is over: waits until everything is written."""
        if self.saver is not None:
            self.saver.wait()
        self.agreement.meet()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the training: an error is told together with what is saved, after saving what can be."""
        try:
            yield
        except ToldElsewhere:
            raise
        except Exception as error:
            if distributed.lost_another(error):
                if self.whole and self.saved == self.run.step and self.departure.wait(LAUNCHER_S):
                    self.leave()
                raise self._alone(error) from error
            self._save_at_error()
            logger.error("stopped at step %d: %s", self.run.step, self._holds())
            raise

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation: all is saved, so a request to leave ends it at once."""
        with self.departure.at_once(self.leave):
            try:
                yield
            except Exception:
                if self.departure.wait(1.0):            # what broke may have been ended by the same signal
                    self.leave()
                raise

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Around the page of a finished run, on rank 0: a request to leave ends the page at once, and nothing else."""
        self.saver.wait()
        try:
            with self.departure.at_once(_stop):
                yield
        except _Stopped:
            logger.info("no report (%s); it can be had any time: python main.py --run_mode infer --trained_model %s",
                        self.departure.reason, self.run.config.run_dir / LAST)

    def _wish(self) -> int:
        if (self.saver is not None and self.saver.failed) or self.failed():
            return BREAK
        if self.departure.asked:
            return LEAVE
        return SAVE if self.saver is not None and self.clock.due_by_time() else GOING_ON

    def _save_at_error(self) -> None:
        """With several processes there is nothing to do: the others do not know, and their random states are theirs."""
        if self.saver is None:
            return
        try:
            if self.whole and self.saved != self.run.step and distributed.world_size() == 1:
                self.save(wait=True)
            self.saver.wait()
        except OSError as error:
            logger.error("the last state could not be saved: %s", error)
            self.saved = self.saver.written

    def _alone(self, error: Exception) -> Exception:
        """What this process says where another one has gone: nothing, unless it is the one that speaks."""
        message = f"{distributed.LOST}; {self._holds()}"
        return ConnectionError(message) if distributed.is_main() else ToldElsewhere(message)

    def _holds(self) -> str:
        last = self.run.config.run_dir / LAST
        return f"{last} holds step {self.saved}; continue with --resume" if self.saved else "no step has been saved yet"


class _Stopped(KeyboardInterrupt):
    """What was under way is to be left out."""


def _stop() -> NoReturn:
    raise _Stopped


def _state(run: Run, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """All that a run is made of; `ranks`: what each process has of its own."""
    return {
        **_weights(run),
        "criterion": run.criterion.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "rng": [one["rng"] for one in ranks],
        "sums": [one["sums"] for one in ranks], "step": run.step, "epoch": run.step // run.steps_per_epoch,
        "scored": run.scored, "best": run.best, "metrics": run.metrics,
        "images_per_update": run.images_per_update, "config": run.config.to_dict(), "git": git_hash(),
    }


def _weights(run: Run) -> dict[str, Any]:
    """The model's and the average's; with adapters without what is not trained."""
    model, ema, base = run.model.state_dict(), None if run.ema is None else run.ema.state_dict(), run.base
    if base is None:
        return {"model": model, "ema": ema}
    return {"model": base.left_out(model), "ema": ema and base.left_out(ema, "module."), "base": base.about()}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
