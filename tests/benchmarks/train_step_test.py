import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import train_step
from configs import parallax_0p6b


def test_fields():
    fields = train_step.parse_fields("model.remat=attention,batch_size=8,mesh.fsdp=2,model.local_window_size=None")
    assert fields == {"model.remat": "attention", "batch_size": 8, "mesh.fsdp": 2, "model.local_window_size": None}
    config = train_step.with_fields(parallax_0p6b.config, {"accumulation_steps": 1} | fields)
    assert (config.model.remat, config.batch_size, config.mesh.fsdp) == ("attention", 8, 2)
    assert train_step.parse_fields("") == {}


def test_cases_differ_as_they_say():
    fields = {"batch_size": 4, "seq_len": 128}
    parallax, softmax, peers = (train_step.make_config("parallax_0p6b", case, fields) for case in train_step.SHAPES)
    assert (parallax.model.attention, softmax.model.attention) == ("parallax", "softmax")
    assert (peers.model.num_heads, peers.model.num_kv_heads, peers.model.head_dim) == (8, 8, 128)
    assert (parallax.batch_size, parallax.accumulation_steps, parallax.seq_len) == (4, 1, 128)


def test_steps_are_timed_with_the_next_one_dispatched(monkeypatch):
    order, now = [], iter(range(1000))
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: float(next(now)) ** 2)

    def step():
        number = len([event for event in order if event[0] == "dispatch"])
        order.append(("dispatch", number))
        return lambda: order.append(("wait", number)) or number

    seconds, losses = train_step.median_seconds(step, warmup=2, steps=3)
    assert order[:4] == [("dispatch", 0), ("dispatch", 1), ("wait", 0), ("dispatch", 2)]
    assert losses == list(range(6))
    assert seconds == 3**2 - 2**2, "the clock's steps after the two that warm up are 3, 5 and 7"


@pytest.mark.parametrize("losses", [[5.5, 5.6, 5.7], [9.0, 5.0, 4.0], [5.5, 5.0, float("nan")]])
def test_wrong_losses_are_refused(losses):
    train_step.check_losses([5.5, 5.0, 5.2], 257)
    with pytest.raises(RuntimeError, match="a fresh model starts near"):
        train_step.check_losses(losses, 257)


def test_a_case_that_fails_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nMemoryError: none left\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    row = train_step.run_case("tiny", "parallax", {"batch_size": 2, "flags": "--xla_x=1"}, {"seq_len": 64})
    assert row["error"] == "MemoryError: none left" and row["flags"].endswith("--xla_x=1")
    assert "MemoryError: none left" in train_step.describe(row)


def test_times_a_model(monkeypatch, capsys, tmp_path):
    """As on a GPU but for the process of its own."""

    def here(command, **_):
        monkeypatch.setattr(sys, "argv", ["train_step", *command[3:]])
        train_step.main()
        return SimpleNamespace(returncode=0, stdout=capsys.readouterr().out, stderr="")

    fields = "batch_size=2,mesh.data=1,model.num_layers=1,optimizer.newton_schulz_steps=1"
    options = {"seq_len": 64, "packed": True, "warmup": 1, "steps": 2, "profile": None}
    monkeypatch.setattr(subprocess, "run", here)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies int32 counts into float32
        row = train_step.run_case("tiny", "parallax", train_step.parse_fields(fields) | {"seq_len": 64}, options)
    assert row["parameters"] == 18_608 and row["tokens"] == 128
    assert row["tokens_per_second"] == 128 / row["seconds"] and row["optimizer_seconds"] > 0
    assert row["flops_per_token"] == 6 * 18_608 + 3 * 8 * 32 * 32 and "mfu" not in row
    assert json.dumps(row) and train_step.describe(row).startswith("parallax")
    assert train_step.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
