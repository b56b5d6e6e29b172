import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import train.loop
from tests.train.conftest import losses
from train import evaluate, generate
from train.config import ConfigError
from train.loop import train as run_training
from train.metrics import MetricWriter, read_metrics

ROOT = Path(__file__).parents[2]
FLAGS = ["--mesh.data", "1", "--log-interval", "1"]


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_run_folder_holds_everything(finished_run, config):
    assert {"config.json", "run.json", "metrics.jsonl", "loss.png", "checkpoints"} <= set(os.listdir(finished_run))
    record = json.loads((finished_run / "run.json").read_text())
    assert len(record["corpus"]["sha256"]) == 64 and record["versions"]["jax"] == jax.__version__
    assert [step for step, *_ in losses(finished_run)] == list(range(1, config.steps + 1))
    assert losses(finished_run)[-1][1] < losses(finished_run)[0][1] - 1.0
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    looks = [r["step"] for r in read_metrics(finished_run) if "validation_loss_part" in r]
    assert looks == [10] and "validation_loss" in read_metrics(finished_run)[-1]
    assert checkpoint_steps(finished_run) == [10, 15, 20]
    assert not list(finished_run.parent.glob(".*"))
    assert len(list((finished_run / "trace").rglob("*.xplane.pb"))) == 1
    events = [e for path in finished_run.glob("events*") for e in EventFileLoader(str(path)).Load()]
    logged = [(e.step, v.tensor.float_val[0]) for e in events for v in e.summary.value if v.tag == "loss"]
    assert logged == [(step, pytest.approx(loss)) for step, loss, _ in losses(finished_run)]


def test_evaluate_prints_the_loss_that_training_ended_with(finished_run, capsys):
    evaluate.main([str(finished_run)])
    printed = capsys.readouterr().out
    final = read_metrics(finished_run)[-1]["validation_loss"]
    assert f"validation loss {final:.6f} nats/token" in printed and f"perplexity {np.exp(final):.4f}" in printed
    evaluate.main([str(finished_run), "--mesh.fsdp", "2"])
    [spread] = re.findall(r"validation loss ([0-9.]+) nats", capsys.readouterr().out)
    assert float(spread) == pytest.approx(final, rel=1e-5)
    evaluate.main([os.path.relpath(finished_run / "checkpoints" / "10")])
    assert capsys.readouterr().out != printed


def test_finished_run_is_not_trained_again(finished_run, config, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    assert run_training(config, tmp_path / "run", "tiny") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (finished_run / "metrics.jsonl").read_text()
    final = read_metrics(finished_run)[-1]["validation_loss"]
    assert f"validation loss {final:.6f}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_resumed_run_repeats_the_unbroken_one(
    number, finished_run, config, tmp_path, monkeypatch, capsys
):
    write = MetricWriter.write

    def write_and_stop(self, step, **values):
        write(self, step, **values)
        if step == 12:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", write_and_stop)
        assert run_training(config, tmp_path / "run", "tiny") == 128 + number
    stopped_at = checkpoint_steps(tmp_path / "run")[-1]
    assert stopped_at in (13, 14)  # the update under way and at most one more
    assert f"stopped by {number.name}; saved {tmp_path / 'run/checkpoints'}/{stopped_at}" in capsys.readouterr().out
    assert run_training(config, tmp_path / "run", "tiny") == 0
    assert losses(tmp_path / "run") == losses(finished_run)
    assert read_metrics(tmp_path / "run")[-1] == read_metrics(finished_run)[-1]


def test_other_configuration_or_text_is_refused(finished_run, config, tmp_path):
    before = sorted(finished_run.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds another run: optimizer.momentum is 0.95 there and 0.5 here"):
        changed = dataclasses.replace(config.optimizer, momentum=0.5)
        run_training(dataclasses.replace(config, optimizer=changed), finished_run, "tiny")
    assert sorted(finished_run.rglob("*")) == before
    copy = shutil.copytree(finished_run, tmp_path / "run")
    record = json.loads((copy / "run.json").read_text())
    record["corpus"] |= {"sha256": "0" * 64, "python": "3.99"}
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"was trained on other text \(stdlib, Python 3.99; here stdlib"):
        run_training(config, copy, "tiny")
    with pytest.raises(ConfigError, match="was trained on other text"):
        evaluate.main([str(copy)])


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = os.urandom(64)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated data", "scrambled data", "no manifest", "no state"])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    damage, finished_run, config, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    newest = folder / "checkpoints" / "20"
    files = sorted((newest / "state").rglob("*/d/*"), key=lambda path: path.stat().st_size)
    if damage == "truncated data":
        truncate(files[-1])
    elif damage == "scrambled data":
        scramble(files[-1])
    elif damage == "no manifest":
        for path in (newest / "state").rglob("manifest.ocdbt"):
            path.unlink()
    else:
        shutil.rmtree(newest / "state")
    with pytest.raises(ConfigError, match=r"checkpoints/20 is damaged .*; try another of the run"):
        evaluate.main([str(folder)])
    assert run_training(config, folder, "tiny") == 0
    printed = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged" in printed and "using that of step 15" in printed
    assert losses(folder) == losses(finished_run)
    assert checkpoint_steps(folder) == [10, 15, 20]


def test_checkpoint_of_another_shape_is_refused(finished_run, config, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_width=96))
    (folder / "config.json").write_text(wider.to_json())
    for command in (evaluate.main, generate.main, lambda _: run_training(wider, folder, "tiny")):
        with pytest.raises(ConfigError, match=r"checkpoints/20: .*mlp/down/kernel is \(2, 64, 32\), .*\(2, 96, 32\)"):
            command([str(folder)])
    assert checkpoint_steps(folder) == [10, 15, 20]


@pytest.mark.parametrize("bad_step", [3, 8])
def test_non_finite_run_stops_and_names_the_last_good_checkpoint(bad_step, config, tmp_path, monkeypatch, capsys):
    make_train_step = train.loop.make_train_step

    def poisoned(*args):
        step = make_train_step(*args)

        def run(state, batch):
            state, metrics = step(state, batch)
            if int(state.step) == bad_step - 1:  # the next update meets a NaN
                state = state._replace(params=jax.tree.map(lambda leaf: leaf * np.float32("nan"), state.params))
            return state, metrics

        return run

    monkeypatch.setattr(train.loop, "make_train_step", poisoned)
    assert run_training(config, tmp_path / "run", "tiny") == 1
    printed = capsys.readouterr().out
    assert f"stopped: loss nan, gradient norm nan, parameter norm nan at step {bad_step}" in printed
    if bad_step == 8:
        assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '5'}" in printed
        assert checkpoint_steps(tmp_path / "run") == [5]
    else:
        assert "there is no checkpoint yet" in printed


def test_metrics_resume_after_a_crash_in_the_middle_of_a_line(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, loss=1.0 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricWriter(tmp_path, 2) as writer:
        writer.write(3, loss=9.0)
    assert read_metrics(tmp_path) == [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 0.5), (3, 9.0))]


def start(folder: Path, interval: int) -> subprocess.Popen:
    """A training process of its own, in the tiny preset."""
    command = [sys.executable, "-m", "train", "tiny", *FLAGS, "--checkpoint-interval", str(interval)]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_and_resume(folder: Path, interval: int, kills: int, seed: int) -> list[str]:
    """Kills the run at random moments after its first update, resuming each time; returns what each start printed."""
    rng, printed = random.Random(seed), []
    for _ in range(kills):
        process = start(folder, interval)
        wait_for, lines = rng.randint(1, 4), []
        while process.poll() is None and wait_for:
            lines.append(process.stdout.readline())
            wait_for -= lines[-1].startswith("step ")
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        printed.append("".join(lines) + process.communicate()[0])
    process = start(folder, interval)
    printed.append(process.communicate(timeout=200)[0])
    assert process.returncode == 0, printed[-1]
    return printed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, caches) -> Path:
    """The tiny preset's run in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    kill_and_resume(folder, 1, kills=0, seed=0)
    return folder


def check_kills(folder: Path, unbroken: Path, kills: int, seed: int):
    printed = kill_and_resume(folder, 1, kills, seed)
    assert losses(folder) == losses(unbroken), "\n".join(printed)
    assert read_metrics(folder)[-1] == read_metrics(unbroken)[-1]
    assert "damaged" not in "".join(printed)
    return printed


def test_killed_run_repeats_the_unbroken_one(unbroken, tmp_path):
    printed = check_kills(tmp_path / "run", unbroken, kills=3, seed=1)
    assert "from step" in printed[-1], "the last start continued a checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_survives_twenty_kills(unbroken, tmp_path):
    for attempt in range(5):
        check_kills(tmp_path / f"run{attempt}", unbroken, kills=4, seed=10 + attempt)
