"""A few minutes on a card, made a report: is everything right there, and how fast is it?

    python scripts/gpu_check.py [--budget 280] [--out gpu_check] [--only STEP [STEP ...]]

Steps run one after the other, the most important first, each in a process of its own that is ended at its limit, so
that none takes another with it. What a step finds is written as it is found, OUT/<step>.jsonl, and after every step
OUT/report.md and OUT/report.json; a step that fails is a row that says why. On a CPU the same steps run with tiny
sizes: that checks this program, not a machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import gpu_right, gpu_speed
from scripts.command_line import Command
from scripts.gpu_report import Check, Report
from scripts.measuring import markdown
from utils.distributed import pick_device
from utils.logging import setup_logging

STEPS = {                       # the most important first
    "card": Check("the card", 30, gpu_speed.card),
    "kernels": Check("scan kernels against float64", 40, gpu_right.kernels),
    "recorded": Check("a recorded update beside the update: BIM", 180,
                      lambda *on: gpu_speed.recorded_updates(*on, gpu_speed.FIRST)),
    "agree": Check("300 updates of the example in bf16 and float32", 240, gpu_right.agree),
    "scan": Check("the scan beside mamba-ssm", 60, gpu_right.scan_beside_mamba),
    "models": Check("an update of every model", 180, gpu_speed.every_model),
    "path": Check("the whole path", 240, gpu_right.path),
    "group": Check("one process in a group", 60, gpu_right.one_process_group),
    "recorded_others": Check("a recorded update beside the update: the other models", 120,
                             lambda *on: gpu_speed.recorded_updates(*on, gpu_speed.OTHERS)),
    "host": Check("host and device", 60, gpu_speed.host_and_device),
    "compiled": Check("compiled models", 600, gpu_speed.compiled),
}
LEAST = 8       # seconds in which a step can begin to say something


def check(budget: float, out: Path, only: list[str] | None, device: str, step: str | None) -> int:
    """Runs the steps; 1 if one of them could not or found something wrong."""
    if step is not None:
        return run_step(step, out, device)
    if unknown := set(only or ()) - set(STEPS):
        raise ValueError(f"--only {', '.join(sorted(unknown))}: the steps are {', '.join(STEPS)}")
    out.mkdir(parents=True, exist_ok=True)
    start, took = time.monotonic(), {}
    for name in only or STEPS:
        (out / f"{name}.jsonl").unlink(missing_ok=True)
        left = budget - (time.monotonic() - start)
        begun = time.monotonic()
        if left < LEAST:
            Report(out, name).row(what=name, wrong=f"not run: {budget:.0f} s are over")
        else:
            _in_a_process(name, out, device, min(left, STEPS[name].limit_s))
        took[name] = time.monotonic() - begun
        _write(out, took)
    return int(any("wrong" in row for name in took for row in _rows(out, name)))


def run_step(name: str, out: Path, device: str) -> int:
    """One step in this process."""
    run, report, on = STEPS[name].run, Report(out, name), pick_device(device)
    setup_logging(True)
    with report.attempt(name):
        run(report, on)
    return 0


def _in_a_process(name: str, out: Path, device: str, limit_s: float) -> None:
    command = [sys.executable, str(Path(__file__).resolve()), "--step", name, "--out", str(out), "--device", device]
    with (out / f"{name}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    report = Report(out, name)
    try:
        if code := child.wait(limit_s):
            lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
            report.row(what=name, wrong=f"ended with code {code}: {lines[-1] if lines else 'without a word'}")
    except subprocess.TimeoutExpired:
        report.row(what=name, wrong=f"ended at its limit of {limit_s:.0f} s")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)        # and what it has started
            child.wait()


def _write(out: Path, took: dict[str, float]) -> None:
    found = {name: _rows(out, name) for name in took}
    (out / "report.json").write_text(json.dumps({"seconds": took, "steps": found}, indent=1) + "\n")
    parts = [f"## {name}: {STEPS[name].title} ({took[name]:.0f} s)\n\n{markdown(rows)}\n"
             for name, rows in found.items() if rows]
    (out / "report.md").write_text("\n".join(parts))
    print(parts[-1] if parts else "", flush=True)


def _rows(out: Path, name: str) -> list[dict]:
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


main = Command(__doc__, check, {
    "--budget": dict(type=float, default=600, help="seconds for everything"),
    "--out": dict(type=Path, default=Path("gpu_check")),
    "--only": dict(nargs="+", metavar="STEP", help="these steps, in this order"),
    "--device": dict(choices=("auto", "cpu", "cuda"), default="auto"),
    "--step": dict(metavar="STEP", help="one step in this process, which is what the program starts for each of them"),
})

if __name__ == "__main__":
    sys.exit(main())
