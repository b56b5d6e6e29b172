"""The route of "triton" through the Triton language: which route runs, and numerics in Triton's interpreter.

The interpreter needs triton, and TRITON_INTERPRET=1 before it is imported: `make test-triton-lang`.
"""

import dataclasses
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sizes, blocks, triton_routes
from pallas_kernels.block_sizes import (
    TritonBlockSizes,
    TritonLangBlockSizes,
    TritonLangDecodeBlockSizes,
    TritonPass,
    XlaBlockSizes,
)
from parallax_jax import compare, parallax_attention, parallax_decode
from parallax_jax.workloads import BY_NAME, CONFORMANCE
from tests.conformance import Conformance
from tests.decode_conformance import DecodeConformance

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
SMALL = TritonLangBlockSizes(TritonPass(32, 16, 4, 2), TritonPass(16, 32, 4, 2), TritonPass(32, 16, 4, 2))
WHOLE_ROWS = dataclasses.replace(SMALL, forward=TritonPass(32, 16, 2, 2))  # 16 to a warp: the form with a fixed centre


@pytest.fixture
def only_triton_lang(monkeypatch):
    """No other route: a test that passes ran these kernels."""
    monkeypatch.delitem(triton_routes.ROUTES, "triton")


@pytest.mark.triton_lang
@interpreted
@pytest.mark.usefixtures("only_triton_lang")
class TestInterpreted(Conformance):
    implementation = "triton"
    half_workloads = tuple(w.name for w in CONFORMANCE if max(w.queries, w.keys or 0) < 200)

    @pytest.mark.parametrize("name", ["window_77", "scattered", "more_queries", "ragged_full", "packed"])
    def test_small_blocks(self, name):
        found = compare.errors("triton", BY_NAME[name], jnp.float32, block_sizes=SMALL)
        assert max(found.values()) <= self.bound()

    @pytest.mark.parametrize("name", ["gqa_wide_head", "narrow_value", "more_queries", "ragged_full", "offset_early"])
    def test_fixed_centre(self, name):
        """The form of the forward pass that float32 takes in no default launch."""
        from pallas_kernels.triton_lang.forward import has_fixed_centre

        assert has_fixed_centre(blocks.Mask(jnp.int32(0)), WHOLE_ROWS.forward)
        found = compare.errors("triton", BY_NAME[name], jnp.float32, block_sizes=WHOLE_ROWS)
        assert max(found.values()) <= self.bound()

    def test_vmap_of_offsets_and_lengths(self, rng):
        """Two mapped axes, masks mapped or shared: every call is what it is alone."""
        query, probe, key, value = (jnp.stack([x] * 2) for x in self.operands(rng, batch=2, queries=20))
        offsets = jnp.asarray([[0, -5, 20], [3, 4, 5]], jnp.int32)
        lengths = jnp.asarray([20, 7], jnp.int32)

        def attention(offset, *operands):
            return self.attention(*operands, query_offset=offset, key_value_seq_lengths=lengths)

        over_offsets = jax.vmap(attention, in_axes=(0, None, None, None, None))
        mapped = jax.vmap(over_offsets)(offsets, query, probe, key, value)
        for i, j in np.ndindex(2, 3):
            alone = attention(offsets[i, j], query[i], probe[i], key[i], value[i])
            np.testing.assert_array_equal(mapped[i, j], alone)


@pytest.mark.triton_lang
@interpreted
@pytest.mark.usefixtures("only_triton_lang")
class TestInterpretedDecode(DecodeConformance):
    implementation = "triton"
    block_sizes = tuple(  # with 32 splits the merge takes the columns of a row in programs of 16
        TritonLangDecodeBlockSizes(*sizes, 2, 2, rotate)
        for *sizes, rotate in ((16, 1, False), (16, 1, True), (32, 2, False), (16, 32, True))
    )

    def test_vmap(self):
        rng = np.random.default_rng(9)
        query, probe = (jnp.asarray(rng.normal(size=(3, 2, 1, 4, 16)), jnp.float32) for _ in range(2))
        key, value = (jnp.asarray(rng.normal(size=(2, 32, 2, 16)), jnp.float32) for _ in range(2))
        lengths = jnp.asarray([[32, 5], [1, 0], [7, 9]], jnp.int32)
        decode = lambda *x: parallax_decode(*x, implementation="triton")
        mapped = jax.vmap(decode, in_axes=(0, 0, None, None, 0))(query, probe, key, value, lengths)
        for i in range(3):
            np.testing.assert_array_equal(mapped[i], decode(query[i], probe[i], key, value, lengths[i]))


def call(**options):
    query = jnp.ones((1, 16, 1, 16))
    return parallax_attention(query, query, query, query, implementation="triton", **options)


def route(name: str, reason: str | None):
    """A route that stands for a backend."""
    module = types.ModuleType(name)
    module.unsupported = lambda *_, **__: reason
    module.forward = lambda query, *_, **__: (query * len(name),)
    return module


@pytest.fixture
def routes(monkeypatch):
    """Stands in for both routes; returns a function that sets their refusals."""

    def set_refusals(**refusals):
        for name, reason in refusals.items():
            monkeypatch.setitem(triton_routes.ROUTES, name, f"stand_in_{name}")
            monkeypatch.setitem(sys.modules, f"stand_in_{name}", route(name, reason))
        triton_routes.load.cache_clear()

    yield set_refusals
    triton_routes.load.cache_clear()


def taken() -> str:
    """Name of the route that ran."""
    length = int(call()[0, 0, 0, 0])
    return next(name for name in triton_routes.ROUTES if len(name) == length)


def test_the_tuned_table_picks_the_route(routes, monkeypatch):
    routes(triton=None, triton_lang=None)
    assert taken() == "triton"
    milliseconds = {"triton": {"32-bit 64": {"forward": 2.0}}, "triton_lang": {"32-bit 64": {"forward": 1.0}}}
    table = {"milliseconds": milliseconds}
    monkeypatch.setattr(block_sizes, "_table", lambda device_kind: table)
    assert taken() == "triton_lang"
    milliseconds["triton"]["32-bit 64"]["forward"] = 0.5
    assert taken() == "triton"


def test_the_other_route_runs_where_one_cannot(routes):
    routes(triton="scale: not here", triton_lang=None)
    assert taken() == "triton_lang"
    routes(triton="scale: not here", triton_lang="query: nor here")
    with pytest.raises(NotImplementedError, match="triton: scale: not here; triton_lang: query: nor here"):
        call()


def test_without_jax_triton_pallas_runs_and_compare_says_why(monkeypatch, capsys):
    monkeypatch.setitem(triton_routes.ROUTES, "triton_lang", "pallas_kernels.not_there")
    call()
    compare.main(["--implementations", "triton_lang", "triton", "--dtypes", "float32", "--workloads", "one"])
    printed = capsys.readouterr().out
    assert "triton_lang: implementation: No module named 'pallas_kernels.not_there'" in printed
    assert "1 compared, 0 over their bound, 1 not supported" in printed


def test_block_sizes_name_the_route(monkeypatch):
    monkeypatch.setitem(triton_routes.ROUTES, "triton_lang", "pallas_kernels.not_there")
    small = TritonPass(16, 16, 4, 2)
    call(block_sizes=TritonBlockSizes(small, small, small))
    for wrong in (TritonLangBlockSizes(small, small, small), XlaBlockSizes()):
        with pytest.raises(NotImplementedError, match=f"needs TritonBlockSizes, got {type(wrong).__name__}.*not_there"):
            call(block_sizes=wrong)
    query = jnp.ones((1, 1, 1, 16))
    with pytest.raises(NotImplementedError, match=r"needs TritonDecodeBlockSizes.*not_there"):
        parallax_decode(
            query, query, query, query, jnp.ones(1, jnp.int32), implementation="triton",
            block_sizes=TritonLangDecodeBlockSizes(16, 1, 4, 2),
        )  # fmt: skip
