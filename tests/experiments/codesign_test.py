"""Which runs are left to do, the arms' controls, and a run of toy size."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import codesign
from experiments.codesign import ARMS, RATE_OF, RATES, SIZES, Arm, Run, model_config, planned
from experiments.codesign_report import write_report


def parameters(arm, size):
    config = model_config(arm, SIZES[size], "float32", None)
    shapes = jax.eval_shape(codesign.TransformerLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size", ["small", "medium"])
def test_controls_match(size):
    """Softmax with the parameters of Parallax, and Parallax with the attention products of softmax, to 0.1 %."""
    wanted = parameters("Parallax", size)
    assert parameters("softmax", size) < 0.96 * wanted
    for arm in ("softmax, matched parameters", "Parallax, matched compute"):
        assert parameters(arm, size) == pytest.approx(wanted, rel=1e-3)
    small, plain = (model_config(arm, SIZES[size], "float32", None) for arm in ("Parallax, matched compute", "softmax"))
    assert 4 * small.num_heads * small.head_dim == 2 * plain.num_heads * plain.head_dim


def arguments(**options):
    given = dict(arms=list(ARMS), optimizers=list(RATES), rates=None, size="tiny", seeds=2, steps=8, sweep_steps=4)
    return argparse.Namespace(**(given | options))


def row(run: Run, loss: float):
    return run._asdict() | {"size": "tiny", "validation_loss": loss}


def test_plan():
    """Every arm is swept, but the variants of Parallax take its rate and come last; seed by seed; nothing twice."""
    args, rows = arguments(), []
    while (run := next(planned(args, rows), None)) is not None:
        rows.append(row(run, float("nan") if run.rate == max(RATES[run.optimizer]) else 1 / run.rate))
    sweeps, final = ([r for r in rows if r["stage"] == stage] for stage in ("sweep", "final"))
    assert len(sweeps) == 4 * (len(RATES["muon"]) + len(RATES["adamw"])) and len(final) == 2 * 2 * len(ARMS)
    order = [(r["arm"] in RATE_OF, r["seed"]) for r in final]
    assert order == sorted(order)
    for r in final:
        assert r["rate"] == sorted(RATES[r["optimizer"]])[-2]  # the highest ended in NaN
    more = [*planned(arguments(seeds=3), rows)]
    assert {run.seed for run in more} == {3} and len(more) == 2 * len(ARMS)


def test_run_and_report(tmp_path):
    tokens = np.random.default_rng(0).integers(97, 101, 4000).astype(np.uint16)  # log 4 nats a token
    validation = tokens[:260].reshape(4, 65)
    arm = Arm(
        model_config("Parallax, gate", SIZES["tiny"], "float32", "xla"), "muon", SIZES["tiny"], 4, validation, 4000
    )
    run = Run("Parallax, gate", "muon", 0.02, 1, 8, "final")
    with ThreadPoolExecutor(1) as pool:
        (first, looks), (again, _) = (arm.train(run, jnp.asarray(tokens), pool) for _ in range(2))
        statistics = {str(step): look.result() for step, look in looks.items()}
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert len(first["train_losses"]) == 8 and len(first["validation_losses"]) == 2
    assert first["validation_losses"][-1] < first["validation_losses"][0] < 5.6
    assert sorted(statistics) == ["0", "4", "8"]
    assert all(0 < gate < 1 for gate in statistics["8"]["probe_gate"]) and len(statistics["8"]["stable_rank_R"]) == 2

    about = {"size": "tiny", "device": "cpu", "jax": jax.__version__, "dtype": "float32", "commit": "x"}
    about["corpus"] = {"source": "test", "files": 1, "bytes": 4000, "sha256": "0" * 64}
    rows = [
        run._asdict() | first | about | {"statistics": statistics, "arm": name, "optimizer": optimizer, "seed": seed}
        for name in ("softmax", "Parallax", "Parallax, gate")
        for optimizer in RATES
        for seed in (1, 2)
    ]
    rows += [rows[0] | {"stage": "sweep", "steps": 4, "rate": rate} for rate in RATES["muon"]]
    log = tmp_path / "codesign.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(log)
    page = log.with_suffix(".md").read_text()
    assert "| Parallax minus softmax | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 |" in page
    assert (tmp_path / "codesign_tiny.png").exists()
