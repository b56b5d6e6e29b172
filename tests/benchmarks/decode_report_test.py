import json
import sys

import pytest

from benchmarks import decode_report


def row(heads, length, head_dim, us, **peers):
    return dict(batch=max(1, heads // 8), kv_heads=min(heads, 8), length=length, head_dim=head_dim, us=us, **peers)


def test_the_faster_peer_counts(tmp_path, monkeypatch, capsys):
    wide = [row(1, 128, 128, 10.0, cudnn=20.0, fa3=15.0), row(16, 128, 128, 10.0, cudnn=6.0, fa3_failed="no")]
    narrow = [row(1, 128, 64, 5.0, cudnn=10.0), row(16, 256, 64, 5.0)]
    narrow += [row(2048, n, 64, 9.0, bandwidth_share_of_same_size=x) for n, x in ((1024, 0.9), (2048, 0.96))]
    for name, rows in {"wide": wide, "narrow": narrow}.items():
        (tmp_path / name).write_text(json.dumps({"device": "a", "rows": rows}))
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "wide"), str(tmp_path / "narrow"), str(figure)])
    decode_report.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "head_dim 64: geometric mean 2.00x, 1 of 1 at 1.0 or more",
        "head_dim 128: geometric mean 0.95x, 1 of 2 at 1.0 or more",
        "  below: batch x heads 16, 128 keys: 0.600",
        "Parallax 64, softmax 128: geometric mean 3.00x, 1 of 1 at 1.0 or more",
        "head_dim 64: 0.95 of the read bandwidth in 1 of 2",
        "  below: batch x heads 2048, 1024 keys: 0.900",
    ]
    assert figure.stat().st_size > 10_000
    (tmp_path / "narrow").write_text(json.dumps({"device": "b", "rows": narrow}))
    with pytest.raises(SystemExit):
        decode_report.main()
