"""What becomes of an update whose losses or gradients are not finite, and of a run that makes no update at all.

Such an update has changed no weight: that is decided on the device (`utils.engine.update`), alike on all processes.
Here it is found, written down for whoever looks for the cause, and answered as `on_nonfinite` says, a bounded number of
times. On CUDA reading a value would make the host wait for the device, so values are copied in the background and read
one update later; `flush` reads the outstanding ones and comes before anything is evaluated or saved.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils import distributed
from utils.engine.layer_values import first_not_finite, largest_finite, largest_values, leaving_no_trace
from utils.engine.run import Run
from utils.engine.update import Outcome, Update
from utils.precision import autocast
from utils.sharded import local

logger = logging.getLogger(__name__)

SCALED_IN_A_ROW = 25        # updates that a loss scale may skip in a row: by then it has fallen by 2^25
ADVICE = "try a lower optimizer_kwargs.lr, a grad_clip_param.max_norm, or precision=fp32"
NAMED = 50                  # parameters in a report


@dataclass
class _Pending:
    """An update whose numbers are on their way to the host."""

    step: int
    names: list[str]            # of the losses of a pass
    passes: int
    grad_names: list[str]
    batches: Sequence[Mapping[str, Any]]
    values: Tensor              # losses, gradient norm, the norms of its parts, sound
    arrived: torch.cuda.Event | None


class Guard:
    """Looks at every update of a run. All processes call the same methods after the same updates.

    rollback: sets the state of the run back to its last checkpoint and says which; None where there is none.
    """

    def __init__(self, run: Run, update: Update, rollback: Callable[[], str | None]) -> None:
        self.run, self.update, self.rollback = run, update, rollback
        self.pending: _Pending | None = None
        self.bad = 0                # updates that were skipped or rolled back
        self.scaled_in_a_row = 0    # that the loss scale skipped
        self.made = 0

    def check(self, outcome: Outcome, batches: Sequence[Mapping[str, Any]]) -> None:
        """Of the update `run.step` + 1 (CPU), and of the one before (CUDA). batches: those of its passes."""
        self.flush()
        values = torch.cat([value.detach().float().flatten() for value in outcome])
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending = _Pending(self.run.step + 1, self.update.loss_names, len(outcome.losses), self.update.grad_names,
                                batches, values, arrived)
        if arrived is None:
            self.flush()

    def flush(self) -> None:
        """Answers what is outstanding. Raises FloatingPointError where the run must stop."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.arrived is not None:
            pending.arrived.synchronize()
        numbers = pending.values.tolist()
        if numbers[-1]:
            self.made, self.scaled_in_a_row = self.made + 1, 0
        else:
            self._answer(pending, numbers)

    def finish(self) -> None:
        """After the last update. A run that has made none has trained for nothing."""
        self.flush()
        if not self.made and self.bad + self.scaled_in_a_row:
            raise FloatingPointError(f"not one of {self.bad + self.scaled_in_a_row} updates was made, as their losses "
                                     f"or gradients were not finite: nothing has been trained ({ADVICE})")

    def _answer(self, pending: _Pending, numbers: list[float]) -> None:
        count = len(pending.names) * pending.passes
        losses, norm, norms = numbers[:count], numbers[count], numbers[count + 1:-1]
        rows = [dict(zip(pending.names, losses[i:i + len(pending.names)], strict=True))
                for i in range(0, count, len(pending.names))]
        files = [image["name"] for batch in pending.batches for image in batch["meta"]]
        everywhere = distributed.gather_objects({"losses": rows, "files": files})
        words = list(dict.fromkeys(f"loss '{name}' is {value}" for one in everywhere for row in one["losses"]
                                   for name, value in row.items() if not math.isfinite(value)))
        if self.run.scaler.is_enabled() and not words:          # a scaled gradient that overflows is no fault yet
            self.scaled_in_a_row += 1
            if self.scaled_in_a_row < SCALED_IN_A_ROW:
                return
            report = self._report(pending, everywhere, norm, norms, self._layers(pending))
            raise FloatingPointError(f"step {pending.step}: the gradients of the last {SCALED_IN_A_ROW} updates were "
                                     f"not finite at any loss scale, nothing is being trained; {report} has the "
                                     f"details ({ADVICE})")
        if not math.isfinite(norm):
            words.append(f"gradient norm is {norm}")
        layers = self._layers(pending)
        if layers.get("first_bad_layer"):
            words.append(f"the first layer to put out such a number is {layers['first_bad_layer']}")
        report = self._report(pending, everywhere, norm, norms, layers)
        self._go_on_or_stop(f"step {pending.step}: {', '.join(words)}", report)

    def _go_on_or_stop(self, words: str, report: str) -> None:
        answer, limit = self.run.config.on_nonfinite, self.run.config.nonfinite_limit
        self.bad += 1
        why = f"{report} names the images, the layers and the gradients; earlier checkpoints are untouched; {ADVICE}"
        if answer == "stop":
            raise FloatingPointError(f"{words}; the run stops (on_nonfinite=skip or rollback goes on): {why}")
        if self.bad > limit:
            raise FloatingPointError(f"{words}; this is one more than the {limit} that nonfinite_limit allows: {why}")
        if answer == "skip":
            if spoilt := self._spoilt():
                raise FloatingPointError(f"{words}; the update was skipped, but {spoilt} holds the bad numbers: use "
                                         f"on_nonfinite=rollback; {why}")
            done = "the update was skipped"
        else:
            back = self.rollback()
            if back is None:
                raise FloatingPointError(f"{words}; there is no checkpoint to go back to yet; {why}")
            done = f"weights and optimizer are those of {back} again, and the training goes on with the next images"
        logger.warning("%s; %s (%d of at most %d); see %s", words, done, self.bad, limit, report)

    def _spoilt(self) -> str | None:
        """The first running statistic, or memory of the loss balancing, that is not finite."""
        for module in (self.run.model, self.run.criterion):
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point() and not buffer.isfinite().all():
                    return name
        return None

    def _report(self, pending: _Pending, everywhere: list[dict], norm: float, norms: list[float],
                layers: dict[str, Any]) -> str:
        """Rank 0 writes what is known of the update; returns the file's name."""
        path = self.run.config.run_dir / "nonfinite" / f"step_{pending.step}.json"
        bad = distributed.gather_objects([name for name, parameter in self.run.model.named_parameters()
                                          if not local(parameter).isfinite().all()])
        if distributed.is_main():
            by_name = dict(zip(pending.grad_names, norms, strict=True))
            content = {
                "step": pending.step, "precision": self.run.config.precision, "loss_scale": self.run.scaler.get_scale(),
                "lr": [float(group["lr"]) for group in self.run.optimizer.param_groups], "processes": everywhere,
                "grad_norm": norm, "grad_norm_of_modules":
                    by_module(by_name, self.run.config.grad_clip_param.norm_type),
                "bad_gradients": [name for name, value in by_name.items() if not math.isfinite(value)][:NAMED],
                "bad_weights": list(dict.fromkeys(name for of_one in bad for name in of_one))[:NAMED], **layers}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_writable(content), indent=1) + "\n", encoding="ascii")
        return str(path)

    def _layers(self, pending: _Pending) -> dict[str, Any]:
        """What the layers put out when the batches run through them once more, on this process.

        On CUDA with the weights of the update behind, and always with another draw of whatever is drawn.
        """
        run = self.run

        def look() -> None:
            for batch in pending.batches:
                with autocast(run.device, run.config.precision):
                    run.model(batch["image"], batch)

        try:
            with leaving_no_trace(run.model, run.device):
                values = largest_values(run.model, look)
        except torch.OutOfMemoryError as error:
            return {"layers": f"not looked at, out of memory: {error}"}
        return {"first_bad_layer": first_not_finite(values), "largest_values_of_layers": largest_finite(values)}


def by_module(norms: dict[str, float], order: float) -> dict[str, float]:
    """Norms of parameters -> of the modules two levels below the model."""
    grouped: dict[str, list[float]] = {}
    for name, norm in norms.items():
        grouped.setdefault(".".join(name.split(".")[:-1][:2]) or name, []).append(norm)
    return {module: torch.linalg.vector_norm(torch.tensor(parts, dtype=torch.float64), order).item()
            for module, parts in grouped.items()}


def _writable(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become the words nan, inf, -inf."""
    if isinstance(value, dict):
        return {key: _writable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_writable(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
