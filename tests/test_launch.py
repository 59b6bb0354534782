"""The launch scripts: without mistakes of the shell, and what they do where their commands are stand-ins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.shared import ROOT
from utils.engine.config import load_config

SCRIPTS = sorted((ROOT / "scripts" / "launch").glob("*.sh"))
KUBERNETES = ROOT / "scripts" / "launch" / "kubernetes.yml"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_finds_no_mistake(script):
    assert os.access(script, os.X_OK)
    for check in (["bash", "-n"], [str(Path(sys.executable).with_name("shellcheck"))]):
        done = subprocess.run([*check, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def stand_ins(tmp_path):
    """A folder of commands that write down how they are called; `srun` runs what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"srun": 'shift; exec "$@"', "scontrol": 'if [ "$1" = show ]; then echo node7; fi',
                       "torchrun": 'eval "$TORCHRUN"', "scancel": 'kill -TERM "$(cat "$CALLS.pid")"',
                       "ssh": "true"}.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
            "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_SUBMIT_DIR": str(tmp_path)}


def calls(environment: dict, name: str) -> list[str]:
    lines = Path(environment["CALLS"]).read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def slurm(environment: dict, *arguments: str) -> int:
    script = str(ROOT / "scripts" / "launch" / "slurm.sh")
    return subprocess.run([script, *arguments], env=environment, check=False, timeout=60).returncode


@pytest.mark.parametrize("code, ends, requeues", [(0, 0, []), (1, 1, []), (75, 0, ["requeue 41_3"])])
def test_a_job_of_a_suite_is_requeued_where_it_was_asked_to_leave(stand_ins, code, ends, requeues, tmp_path):
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/bash\necho "python $*" >> "$CALLS"\nexit {code}\n')
    python.chmod(0o755)
    environment = {**stand_ins, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_JOB_ID": "41"}
    script = str(ROOT / "scripts" / "launch" / "slurm_suite.sh")
    assert subprocess.run([script, "suite.yml"], env=environment, check=False, timeout=60).returncode == ends
    assert calls(environment, "python") == ["scripts/fair_table.py suite.yml --share 3/8 --devices cuda:0"]
    assert calls(environment, "scontrol") == requeues


@pytest.mark.parametrize("code", [0, 1])
def test_slurm_requeues_neither_what_is_done_nor_what_has_failed(stand_ins, code):
    assert slurm({**stand_ins, "TORCHRUN": f"exit {code}"}, "--config_exp", "configs/bim_nyud.yml") == code
    [line] = calls(stand_ins, "torchrun")
    assert "--nnodes=2 --nproc_per_node=8" in line and "--rdzv_endpoint=node7:20041 --rdzv_id=41" in line
    assert line.endswith("main.py --run_mode train --config_exp configs/bim_nyud.yml resume=auto")
    assert "requeue 41" not in calls(stand_ins, "scontrol")


def test_slurm_asks_the_run_to_leave_before_its_time_is_up(stand_ins):
    """The signal reaches the shell; the run is asked, takes a moment, ends with torchrun's code, and is requeued."""
    body = ('trap "sleep 0.5; echo torchrun saved >> $CALLS; exit 1" TERM; echo $$ > "$CALLS.pid"; '
            "while :; do sleep 0.05; done")
    process = subprocess.Popen([str(ROOT / "scripts" / "launch" / "slurm.sh"), "--config_exp", "x.yml"],
                               env={**stand_ins, "TORCHRUN": body})
    while not Path(stand_ins["CALLS"] + ".pid").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert calls(stand_ins, "scancel") == ["--signal=TERM 41"] and "saved" in calls(stand_ins, "torchrun")
    assert "requeue 41" in calls(stand_ins, "scontrol")


def test_an_array_is_one_experiment_with_other_seeds(stand_ins):
    environment = {**stand_ins, "TORCHRUN": "exit 0", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm(environment, "--config_exp", "configs/bim_nyud.yml", "max_iter=5") == 0
    assert calls(stand_ins, "torchrun")[0].endswith("--config_exp configs/bim_nyud.yml max_iter=5 seed=2 "
                                                    "version_name=bim_nyud_seed2 resume=auto")


def test_ssh_starts_one_launcher_on_every_machine(stand_ins):
    script = str(ROOT / "scripts" / "launch" / "ssh.sh")
    done = subprocess.run([script, "a,b", "--config_exp", "my exp.yml"], env={**stand_ins, "GPUS": "4"}, timeout=60,
                          check=False)
    assert done.returncode == 0
    first, second = sorted(calls(stand_ins, "ssh"), key=lambda line: "--node_rank=1" in line)
    assert "BatchMode=yes a cd" in first and "BatchMode=yes b cd" in second and str(ROOT) in first
    assert "--nnodes=2 --nproc_per_node=4 --master_addr=a --master_port=29400 --node_rank=1" in second
    assert r"my\ exp.yml resume=auto" in second
    assert subprocess.run([script], env=stand_ins, capture_output=True, check=False).returncode == 2


def test_the_pods_of_kubernetes_run_an_experiment_that_can_be_read():
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    arguments = container["args"]
    assert spec["completions"] == spec["parallelism"] == 2 and "--nnodes=2" in arguments
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in arguments
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts) and mounts["shm"] == "/dev/shm"
    [file] = [word.partition("=")[2] for word in arguments if word.startswith("--config_exp=")]
    given = [word for word in arguments if "=" in word and not word.startswith("--")]
    assert load_config(ROOT / file, given).db_root == "/data"
