import json
import sys

from benchmarks import attention_report


def row(workload, implementation, forward, total):
    rates = dict(forward_tflops=1000 / forward, total_tflops=4000 / total)
    return dict(workload=workload, implementation=implementation, forward_ms=forward, total_ms=total, **rates)


def test_tables_and_figure(tmp_path, monkeypatch, capsys):
    rows = [
        row("causal", "parallax-kernel (Triton)", 4.0, 16.0),
        dict(workload="accuracy", implementation="mosaic_gpu", out=2e-3),
        row("causal", "mosaic_gpu", 3.0, 8.0),
        dict(workload="causal", implementation="softmax: cuDNN (jax.nn)", error="no"),
        row("window", "mosaic_gpu", 2.0, 5.0),
    ]
    (tmp_path / "rows").write_text(json.dumps(dict(device="a", dtype="bfloat16", rows=rows)))
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "rows"), str(figure)])
    attention_report.main()
    assert capsys.readouterr().out.splitlines() == [
        "| workload | `mosaic_gpu` | `triton_lang` | `triton_pallas` | published Triton "
        "| softmax: FlashAttention-3 | softmax: cuDNN |",
        "|---|---|---|---|---|---|---|",
        "| causal | 3.000, 333 / 8.000, 500 |  |  | 4.000, 250 / 16.000, 250 |  |  |",
        "| window | 2.000, 500 / 5.000, 800 |  |  |  |  |  |",
        "",
        "| workload | `mosaic_gpu` | `triton_lang` | `triton_pallas` | softmax: FlashAttention-3 | softmax: cuDNN |",
        "|---|---|---|---|---|---|",
        "| causal | 0.75 / 0.50 |  |  |  |  |",
    ]
    assert figure.stat().st_size > 10_000
