"""Every implementation of decode, and the errors."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sizes import TritonDecodeBlockSizes, XlaBlockSizes
from parallax_jax import parallax_decode
from tests.decode_conformance import CASES, DecodeConformance, draw


class TestReference(DecodeConformance):
    implementation = "reference"


class TestXla(DecodeConformance):
    implementation = "xla"
    block_sizes = (XlaBlockSizes(block_k=16), XlaBlockSizes(block_k=100))


class TestTriton(DecodeConformance):
    implementation = "triton"
    block_sizes = tuple(TritonDecodeBlockSizes(*sizes, 2, 2) for sizes in ((16, 1), (32, 2), (16, 8)))


def operands(**changes):
    shapes = {"query": (2, 1, 4, 8), "probe": (2, 1, 4, 8), "key_cache": (2, 9, 2, 8), "value_cache": (2, 9, 2, 8)}
    arrays = {k: jnp.ones(v) for k, v in shapes.items()}
    return {**arrays, "lengths": jnp.asarray([3, 9], jnp.int32), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_cache": jnp.ones((3, 9, 2, 8))}, "key_cache: needs shape (2, S, K, 8) to fit query, got (3, 9, 2, 8)"),
        ({"value_cache": jnp.ones((2, 8, 2, 8))}, "value_cache: needs shape (2, 9, 2, Hv) to fit key_cache, got"),
        ({"key_cache": jnp.ones((2, 9, 2, 8), jnp.bfloat16)}, "key_cache: needs query's dtype float32, got bfloat16"),
        (
            {"lengths": jnp.asarray([3, 10], jnp.int32)},
            "lengths: must lie in [0, 9], the cache's capacity, got 3 to 10",
        ),
        ({"lengths": jnp.asarray([3.0, 9.0])}, "lengths: must be int32 of shape (2,), got float32 of shape (2,)"),
        ({"page_table": jnp.ones((1, 3), jnp.int32)}, "page_table: must be int32 of shape (2, pages_per_sequence)"),
        ({"page_table": jnp.asarray([[0], [2]], jnp.int32)}, "page_table: page ids must lie in [0, 1], got 2"),
        ({"local_window_size": 0}, "local_window_size: must be an int >= 1 or None, got 0"),
        ({"implementation": "cuda"}, "implementation: got 'cuda', allowed are"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError) as raised:
        parallax_decode(**operands(**changes))
    assert message in str(raised.value)


def test_unsupported_calls_say_why():
    cache = {"key_cache": jnp.ones((4, 9, 2, 8)), "value_cache": jnp.ones((4, 9, 2, 8))}
    paged = operands(**cache, page_table=jnp.asarray([[0], [3]], jnp.int32))
    with pytest.raises(NotImplementedError, match="page size must be a multiple of 16, got 9"):
        parallax_decode(**paged, implementation="triton")
    parallax_decode(**paged)
    with pytest.raises(NotImplementedError, match="needs TritonDecodeBlockSizes, got XlaBlockSizes"):
        parallax_decode(**operands(), implementation="triton", block_sizes=XlaBlockSizes())


def test_vmap():
    case = next(c for c in CASES if c.name == "step")
    (query, probe, key, value), lengths, _ = draw(case)
    stack = lambda x: jnp.stack([x, x[::-1]])
    both = jax.vmap(parallax_decode)(*(stack(x) for x in (query, probe, key, value)), stack(lengths))
    once = parallax_decode(query, probe, key, value, lengths)
    assert jnp.allclose(both[0], once, atol=1e-6)
    assert jnp.allclose(both[1], once[::-1], atol=1e-6)
