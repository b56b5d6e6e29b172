import pytest

from benchmarks import roofline
from benchmarks.decode import Shape

COLUMNS = ["ID", "Kernel Name", "Grid Size", roofline.TENSOR, roofline.BYTES, roofline.TIME, *roofline.FP32]
UNITS = ["", "", "", "", "byte", "ns", "inst", "inst", "inst"]
CALLS = [  # kernel, tensor FLOP, bytes, ns, fadd, fmul, ffma
    ("cudnn_tried_out", "9", "9", "9", "9", "9", "9"),
    ("parallax_decode", "4,000", "1,000", "20", "1", "2", "3"),
    ("parallax_decode_merge", "0", "10", "2", "10", "0", "0"),
    ("parallax_decode", "4000", "1000", "19", "0", "0", "0"),
    ("parallax_decode_merge", "0", "5", "1", "0", "0", "0"),
    ("cudnn_sdpa", "2000", "1000", "30", "0", "0", "0"),
    ("cudnn_reduce", "0", "1", "2", "0", "0", "0"),
]


def log(calls) -> str:
    kernels = [[str(i), name, "(1, 1, 1)", *counters] for i, (name, *counters) in enumerate(calls)]
    lines = [",".join(f'"{x}"' for x in row) for row in (COLUMNS, UNITS, *kernels)]
    return "\n".join(["==PROF== Connected to process 7 (python3)", "==PROF== Disconnected", *lines, ""])


def test_counters_are_summed_over_a_calls_kernels(tmp_path):
    found = roofline.rows(log(CALLS), [Shape(1, 16384)])
    assert [row["name"] for row in found] == list(roofline.NAMES)
    assert [row["bytes"] for row in found] == [1010, 1005, 1001]
    assert [row["needed_flop"] for row in found] == [8 * 8 * 16384 * 128, *[4 * 8 * 16384 * 128] * 2]
    assert [row["tensor_flop"] for row in found] == [4000, 4000, 2000]
    assert found[0]["flop"] == 4000 + 11 + 2 + 2 * 3
    assert [row["ns"] for row in found] == [22, 20, 32]
    for peak in (989e12, None):
        roofline.draw(found, 4.6e12, peak, tmp_path / f"{peak}.png")
        assert (tmp_path / f"{peak}.png").stat().st_size > 1000


def test_a_missing_call_is_an_error():
    with pytest.raises(RuntimeError, match="2 calls of 3"):
        roofline.rows(log(CALLS[:-2]), [Shape(1, 16384)])
