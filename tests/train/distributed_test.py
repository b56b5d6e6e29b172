"""Runs of several processes on this machine, over gloo; the launchers' files."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.train.conftest import losses
from train.config import ConfigError, LaunchConfig, parse_command_line
from train.data import split_of
from train.distributed import initialize, share_of_rows
from train.loop import train as run_training
from train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# Heads that two devices can share, and updates in two parts.
FLAGS = "--model.num-kv-heads 2 --accumulation-steps 2 --log-interval 1 --checkpoint-interval 2"
STEPS = ("--steps", "8")
MESH = ("--mesh.fsdp", "2", "--mesh.tensor", "2")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Job:
    """A run of `count` processes with `devices` emulated devices each."""

    def __init__(self, folder: Path, text: Path, count: int, devices: int, *flags: str):
        command = [
            sys.executable,
            "-u",
            "-m",
            "train",
            "tiny",
            *FLAGS.split(),
            *flags,
            "--run-dir",
            str(folder),
            "--data",
            str(text),
        ]
        together = ["--launch.coordinator", f"127.0.0.1:{free_port()}", "--launch.num-processes", str(count)]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        self.processes = [
            subprocess.Popen(
                [*command, *together, "--launch.process-id", str(i), "--launch.timeout", "20"],
                env=env,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(count)
        ]
        self._read = ""

    def wait_for(self, text: str):
        """Reads what process 0 prints until a line contains `text`."""
        for line in self.processes[0].stdout:
            self._read += line
            if text in line:
                return
        raise AssertionError(f"no {text!r} in\n{self._read}")

    def wait(self, timeout: float) -> tuple[list[int], list[str]]:
        """Exit codes and output of all processes."""
        try:
            texts = [process.communicate(timeout=timeout)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], [self._read + texts[0], *texts[1:]]


def run(folder: Path, text: Path, count: int, devices: int, *flags: str) -> list[str]:
    """A job that must succeed; returns what its processes printed."""
    codes, printed = Job(folder, text, count, devices, *flags).wait(200)
    assert codes == [0] * count, "\n".join(printed)
    return printed


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A corpus with little to validate on."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    words = rng.integers(0, 1000, 600_000).astype(str)
    (folder / "0.txt").write_text(" ".join(words))
    held_out = next(name for name in map("{}.txt".format, range(1, 1000)) if split_of(name) == "validation")
    (folder / held_out).write_text(" ".join(words[:250]))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, caches, text) -> Path:
    """The run of one process, this one, with four devices."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    _, config = parse_command_line(["tiny", *FLAGS.split(), *MESH, *STEPS, "--mesh.data", "1", "--data", str(text)])
    with jax.numpy_dtype_promotion("standard"):
        assert run_training(config, folder, "tiny") == 0
    return folder


def assert_same_run(folder: Path, expected: Path):
    np.testing.assert_allclose(losses(folder), losses(expected), rtol=1e-5)
    ends = [read_metrics(f)[-1]["validation_loss"] for f in (folder, expected)]
    np.testing.assert_allclose(*ends, rtol=1e-5)


_SRUN = """#!/bin/sh
# Starts two tasks as srun does on one node.
shift
export SLURM_JOB_ID=$$ SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
for id in 0 1; do
    SLURM_PROCID=$id SLURM_LOCALID=$id "$@" > "$LOGS/$id" 2>&1 & tasks="$tasks $!"
done
for task in $tasks; do wait "$task" || exit; done
"""


def test_two_processes_under_srun_equal_one(alone, text, tmp_path):
    (tmp_path / "srun").write_text(_SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    flags = [*FLAGS.split(), *MESH, *STEPS, "--data", str(text), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "configs/launch/slurm.sh", "tiny", *flags],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PATH": path, "LOGS": str(tmp_path)},
        cwd=ROOT,
        timeout=200,
    )
    printed = [(tmp_path / str(i)).read_text() for i in range(2)]
    assert done.returncode == 0, "\n".join(printed)
    assert_same_run(tmp_path / "run", alone)
    assert "4 x cpu of 2 processes" in printed[0] and "step 8/8" in printed[0]
    assert "step 8" not in printed[1] and "checkpoint" not in printed[1], "one process speaks"
    assert len(list((tmp_path / "run").glob("events*"))) == 1


_STEPS_UNTIL_A_SIGNAL = """
import sys, time
import jax
from train.config import LaunchConfig
from train.distributed import StopSignal, initialize
initialize(LaunchConfig(sys.argv[1], 2, int(sys.argv[2])))
with StopSignal() as stop:
    for step in range(100_000):
        print("at", step, flush=True)
        time.sleep(0.01)
        if number := stop.after(step):
            sys.exit(f"{number} at {step}")
"""


def test_signal_to_one_process_reaches_the_other_at_the_same_step():
    command = [sys.executable, "-c", _STEPS_UNTIL_A_SIGNAL, f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    processes[1].stdout.readline()
    processes[1].send_signal(signal.SIGINT)  # becomes SIGTERM, which JAX passes on
    ends = [process.communicate(timeout=100)[1].splitlines()[-1] for process in processes]
    assert ends[0] == ends[1] and ends[0].startswith(f"{signal.SIGTERM:d} at "), ends


@pytest.mark.slow
def test_run_of_two_stops_and_saves_after_a_signal_to_one(text, tmp_path, caches):
    job = Job(tmp_path / "run", text, 2, 2, *MESH, "--steps", "1000000", "--checkpoint-interval", "1000000")
    job.wait_for("step 2/")
    job.processes[1].send_signal(signal.SIGTERM)
    codes, printed = job.wait(200)
    assert codes == [128 + signal.SIGTERM] * 2, "\n".join(printed)
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped by SIGTERM; saved {saved}" in printed[0]
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, int(saved.name) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_other_and_the_run_continues(victim, alone, text, tmp_path):
    job = Job(tmp_path / "run", text, 2, 2, *MESH, *STEPS)
    job.wait_for("step 3/8")
    began = time.monotonic()
    job.processes[victim].kill()
    codes, printed = job.wait(120)
    other = printed[1 - victim]
    assert time.monotonic() - began < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, -signal.SIGKILL)
    assert "lost another" in other or "another task died" in other, other
    printed = run(tmp_path / "run", text, 2, 2, *MESH, *STEPS)
    assert "tiny from step" in printed[0]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "context"])
def test_run_moves_to_other_processes(axis, alone, text, tmp_path):
    """Begun by one process, continued by two on another mesh; a context of four spans both."""
    shutil.copytree(alone, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    printed = run(tmp_path / "run", text, 2, 2, f"--mesh.{axis}", "4", *STEPS)
    assert "from step 4" in printed[0]
    assert_same_run(tmp_path / "run", alone)


def test_pods_of_a_job_are_the_processes_of_a_run():
    service, job = yaml.safe_load_all((ROOT / "configs/launch/kubernetes.yaml").read_text())
    name, pods, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pods["completionMode"] == "Indexed" and pods["completions"] == pods["parallelism"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    [variable] = container["env"]
    assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
    command = [word.replace(f"$({variable['name']})", "1") for word in container["command"]]
    assert command[:4] == ["python", "-u", "-m", "train"]
    _, config = parse_command_line(command[4:])
    assert config.launch.coordinator.startswith(f"{name}-0.{pod['subdomain']}:")
    assert (config.launch.num_processes, config.launch.process_id) == (pods["completions"], 1)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert config.run_dir.startswith(mounts["shared"])


def test_share_of_rows():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    assert share_of_rows(NamedSharding(mesh, PartitionSpec(None, "data")), (1, 6, 8)) == (0, 1)
    assert share_of_rows(NamedSharding(mesh, PartitionSpec()), (1, 6, 8)) == (0, 1)


@pytest.mark.parametrize(
    ("held", "expected"),
    [([(0, 2), (2, 4)], (0, 2)), ([(4, 6), (6, 8)], (1, 2)), ([(6, 8)], (3, 4)), ([(0, 4), (0, 4)], (0, 2))],
)
def test_share_of_rows_of_one_process(held, expected):
    class Held:
        def addressable_devices_indices_map(self, shape):
            return {i: (slice(None), slice(*rows), slice(None)) for i, rows in enumerate(held)}

    assert share_of_rows(Held(), (1, 8, 4)) == expected


@pytest.mark.parametrize("held", [[], [(0, 2), (4, 6)], [(2, 4), (4, 6)]])
def test_rows_that_are_not_one_block_are_refused(held):
    class Held:
        def addressable_devices_indices_map(self, shape):
            return {i: (slice(None), slice(*rows), slice(None)) for i, rows in enumerate(held)}

    with pytest.raises(ConfigError, match="mesh: process 0 would hold rows"):
        share_of_rows(Held(), (1, 8, 4))


@pytest.mark.parametrize(
    ("environment", "launch", "expected"),
    [
        ({}, {}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        ({"SLURM_STEP_NUM_TASKS": "16"}, {}, (None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, (None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {"num_processes": 1}, None),
        ({"JOB_COMPLETION_INDEX": "1"}, {}, (None, None, None)),
        ({}, {"coordinator": "host:1", "num_processes": 2, "process_id": 1}, ("host:1", 2, 1)),
    ],
)
def test_processes_meet_where_something_started_several(environment, launch, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize(LaunchConfig(**launch))
    assert calls == ([] if expected is None else [expected])


def test_processes_that_cannot_meet_say_what_to_pass():
    with pytest.raises(ConfigError, match=r"cannot meet \(.*; pass --launch.coordinator .* --launch.process-id I"):
        initialize(LaunchConfig(coordinator="127.0.0.1:1", num_processes=2))  # JAX is in use already
