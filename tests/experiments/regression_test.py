"""The measure of integrated error at toy size, the slopes, and the report."""

import json

import jax
import numpy as np
import pytest

from experiments import regression


def test_slope():
    rng, rows = np.random.default_rng(0), []
    for n in (32, 128, 512, 2048):
        exact = 3.0 * n**-0.8 if n > 32 else 9.0  # the first lies below the least n
        row = {"n": n, "error": exact * np.exp(0.01 * rng.normal()), "standard_error": 0.01 * exact}
        rows.append(row | {"width": 0.3, "estimator": "local linear: LLA"})
    rows.append(rows[-1] | {"error": 1e9, "width": regression.WIDTHS[0]})  # at the edge of the grid: left out
    value, error = regression.slope(rows)
    assert value == pytest.approx(-0.8, abs=4 * error) and 0.001 < error < 0.01


def test_functions_have_the_smoothness_they_are_named_after():
    x = np.linspace(-1, 1, 4001)[None, :, None]
    smooth, kinks, jumps = np.moveaxis(regression.functions(np.random.default_rng(1), 1, 1, x)[0], -1, 0)
    step = lambda y, order: np.abs(np.diff(y, order)).max()
    assert step(smooth, 1) < 0.01 and step(smooth, 2) < 1e-4
    assert step(kinks, 1) < 0.01 and step(kinks, 2) > 1e-4
    assert step(jumps, 1) > 0.5


def test_measure_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "TASKS", 8)
    monkeypatch.setattr(regression, "WIDTHS", (0.1, 0.3, 1.0))
    monkeypatch.setattr(regression, "SIZES", (64, 128, 256))
    with jax.enable_x64(True):
        rows = [row for n in regression.SIZES for row in regression.measure(1, n)]
    by_name = {row["estimator"]: row["error"] for row in rows if (row["n"], row["data"]) == (256, "smooth")}
    assert set(by_name) == set(regression.NAMES)
    assert by_name["local linear: LLA"] < by_name["local constant: softmax"] < 0.2 * by_name["global linear"]
    log = tmp_path / "regression.jsonl"
    log.write_text("".join(json.dumps(row | {"device": "cpu", "jax": "0", "commit": "x"}) + "\n" for row in rows))
    regression.write_report(log)
    assert "| local linear: LLA | -0.80 |" in log.with_suffix(".md").read_text()
    assert log.with_suffix(".png").exists()
