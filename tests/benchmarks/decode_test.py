import dataclasses
import math

import jax
import pytest

from benchmarks import decode
from benchmarks.decode import Shape


@pytest.mark.parametrize("shape", [shape for shape in decode.SETS["sweep"] if shape.batch <= 32], ids=str)
def test_swept_launches_fit_one_wave(shape):
    """132 cores with 227 KiB of shared memory each, of which a program takes one more KiB than it asks for."""
    launches = decode.launches(shape, 132)
    assert len(launches) == len(set(launches)) >= 10
    for launch in launches:
        a_core = math.ceil(shape.batch * shape.kv_heads * launch.num_splits / 132)
        tiles = 2 * shape.head_dim * 2 * launch.block_k * (launch.num_stages - 1)
        assert a_core * (tiles + 5 * 1024) <= 227 * 1024
        assert launch.block_k * launch.num_splits <= shape.length


@pytest.mark.parametrize("shape", decode.SETS["uneven"], ids=str)
def test_the_default_is_swept(shape):
    launches = decode.launches(shape, 132)
    default = decode.default("triton", jax.eval_shape(lambda: decode.draw(shape)))
    assert dataclasses.replace(default, rotate=shape.batch > 1) in launches
    assert len(launches) <= 20  # a sweep of the set takes a minute of a GPU


def test_a_call_that_fails_costs_its_own_place():
    found = decode.compile_all({"sum": (lambda x: x + 1, 2.0), "bad": (lambda x: x.nothing, 1.0), "not": "no reason"})
    assert found["sum"](2.0) == 3
    assert "nothing" in found["bad"]
    assert found["not"] == "no reason"


def test_grid_is_the_papers():
    assert len(set(decode.SETS["paper"])) == 216
    assert set(decode.SETS["paper"]) == {*decode.SETS["paper64"], *decode.SETS["paper128"]}
    assert max(shape.batch * shape.kv_heads for shape in decode.SETS["paper"]) == 2048
    assert Shape(256, 32768) in decode.SETS["paper128"]


def test_each_route_has_a_row_and_shares_the_peers(monkeypatch):
    times = {"routes": iter([5.0, 4.0]), "cudnn": iter([10.0])}
    monkeypatch.setattr(decode, "jax_kernels", lambda call, *_: (next(times[call()[1]]), {}))
    shape = Shape(1, 512)
    executables = {
        (shape, "draw", 0): lambda: (),
        (shape, "triton", 0): lambda: ([1.0, 2.0], "routes"),
        (shape, "triton_lang", 0): lambda: ([1.0, 2.5], "routes"),
        (shape, "cudnn", 0): lambda: ([], "cudnn"),
        (shape, "fa3", 0): "not installed",
    }
    rows = decode.bench(shape, ["triton", "triton_lang"], executables, {shape.bytes: 5e11, 1 << 32: 1e12})
    assert [(row["route"], row["us"], row["cudnn"]) for row in rows] == [
        ("triton", 5.0, 10.0),
        ("triton_lang", 4.0, 10.0),
    ]
    assert all("not installed" in row["fa3_failed"] for row in rows)
    assert rows[0]["bandwidth_share_of_same_size"] == 2 * rows[0]["bandwidth_share"]
    executables[shape, "triton_lang", 0] = "no jax-triton"
    times |= {"routes": iter([5.0]), "cudnn": iter([10.0])}
    with pytest.raises(RuntimeError, match=r"triton_lang at B 1 L 512.*no jax-triton"):
        decode.bench(shape, ["triton", "triton_lang"], executables, {1 << 32: 1e12})


def test_a_process_that_fails_ends_all():
    shapes = [Shape(1, 32 * i, 1, 1, 64) for i in (1, 2)]
    with pytest.raises(RuntimeError, match="not supported on this platform"):  # kernels of a CPU cannot be timed
        list(decode.bench_all(shapes, ["default"], [], {1 << 32: 1e12}, processes=2))


def test_softmax_column_is_softmax():
    shape = Shape(2, 40, heads=2, kv_heads=1, head_dim=32)
    query, probe, key, value, lengths, table = decode.draw(shape)
    (softmax,) = decode.JAX_PEERS["softmax"](shape)
    out = softmax(query, probe, key, value, lengths, table)
    expected = jax.nn.dot_product_attention(*(x.astype(jax.numpy.float32) for x in (query, key, value)))
    assert decode.relative_error(out, expected) < 1e-2


def test_routes_launch_alike():
    arguments = jax.eval_shape(lambda: decode.draw(Shape(32, 4096)))
    launches = {route: decode.default(route, arguments) for route in decode.LAUNCHED_BY}
    assert {route: type(x) for route, x in launches.items()} == decode.LAUNCHED_BY
    assert vars(launches["triton"]) == vars(launches["triton_lang"])
    assert launches["triton"].rotate
