"""Checks, errors, dispatch and remat of `parallax_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sizes import XlaBlockSizes
from parallax_jax import parallax_attention
from parallax_jax.attention import RESIDUAL_NAMES


def operands(batch=2, queries=8, heads=4, head_dim=16, keys=8, kv_heads=2, value_dim=16, dtype=jnp.float32):
    shapes = [(batch, queries, heads, head_dim)] * 2
    shapes += [(batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, value_dim)]
    return [jnp.ones(shape, dtype) for shape in shapes]


def call(changes=None, **options):
    """Calls the operator with operand i replaced by changes[i]."""
    arguments = operands()
    for i, x in (changes or {}).items():
        arguments[i] = x
    return parallax_attention(*arguments, **options)


ids = np.zeros((2, 8), np.int32)

BAD = {
    "rank": (dict(changes={0: jnp.ones((8, 4, 16))}), r"query: needs 4 axes, got shape \(8, 4, 16\)"),
    "probe_shape": (dict(changes={1: jnp.ones((2, 8, 2, 16))}), "probe: needs query's shape"),
    "key_batch": (dict(changes={2: jnp.ones((1, 8, 2, 16))}), r"key: needs shape \(2, S, K, 16\)"),
    "key_width": (dict(changes={2: jnp.ones((2, 8, 2, 32))}), r"key: needs shape \(2, S, K, 16\)"),
    "value_length": (dict(changes={3: jnp.ones((2, 9, 2, 16))}), r"value: needs shape \(2, 8, 2, Hv\)"),
    "heads": (
        dict(changes={2: jnp.ones((2, 8, 3, 16)), 3: jnp.ones((2, 8, 3, 16))}),
        "key: 3 heads do not divide query's 4 heads",
    ),
    "empty": (dict(changes={2: jnp.ones((2, 0, 2, 16)), 3: jnp.ones((2, 0, 2, 16))}), "key: every axis must be"),
    "mixed_dtypes": (dict(changes={3: jnp.ones((2, 8, 2, 16), jnp.bfloat16)}), "value: needs query's dtype float32"),
    "int_dtype": (dict(changes=dict(enumerate(operands(dtype=jnp.int32)))), "query: dtype must be bfloat16"),
    "wide_head": (dict(changes=dict(enumerate(operands(head_dim=512)))), "query: head width is at most 256, got 512"),
    "wide_value": (dict(changes={3: jnp.ones((2, 8, 2, 257))}), "value: head width is at most 256, got 257"),
    "scale": (dict(scale=float("nan")), "scale: must be a finite Python number or None, got nan"),
    "window": (dict(local_window_size=0), "local_window_size: must be an int >= 1 or None, got 0"),
    "window_type": (dict(local_window_size=2.0), "local_window_size: must be an int"),
    "offset": (dict(query_offset=np.zeros(2, np.int32)), r"query_offset: must be int32 of shape \(\)"),
    "offset_type": (dict(query_offset=1.5), r"query_offset: must be int32 of shape \(\), got float32"),
    "segment_shape": (dict(segment_ids=ids[:1]), r"segment_ids: must be int32 of shape \(2, 8\)"),
    "segment_type": (dict(segment_ids=ids.astype(np.float32)), "segment_ids: must be int32"),
    "segment_keys": (
        dict(changes={2: jnp.ones((2, 9, 2, 16)), 3: jnp.ones((2, 9, 2, 16))}, segment_ids=ids),
        "segment_ids: needs as many queries as keys, got T = 8, S = 9",
    ),
    "lengths": (
        dict(key_value_seq_lengths=np.zeros(3, np.int32)),
        r"key_value_seq_lengths: must be int32 of shape \(2,\)",
    ),
    "implementation": (dict(implementation="cudnn"), "implementation: got 'cudnn', allowed are 'reference'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(implementation="reference", block_sizes=XlaBlockSizes()), "block_sizes: implementation 'reference'"),
        (dict(implementation="triton", block_sizes=XlaBlockSizes()), "block_sizes: needs TritonBlockSizes"),
        (dict(implementation="xla", block_sizes=3), "block_sizes: needs XlaBlockSizes, got int"),
    ],
)
def test_refused_calls(options, message):
    with pytest.raises(NotImplementedError, match=message):
        call(**options)


def test_none_follows_the_block_sizes():
    np.testing.assert_allclose(call(block_sizes=XlaBlockSizes(16, 16)), call(implementation="xla"))


def test_missing_backend_never_stops_none(monkeypatch):
    from parallax_jax import attention

    monkeypatch.setitem(attention.BACKENDS, "triton", ("pallas_kernels.not_there", ("cpu", "gpu")))
    call()
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run this call: .*not_there"):
        call(implementation="triton")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64(implementation):
    with jax.enable_x64(True):
        assert call(dict(enumerate(operands(dtype=jnp.float64))), implementation=implementation).dtype == jnp.float64
        with pytest.raises(NotImplementedError, match="query: float64"):
            call(dict(enumerate(operands(dtype=jnp.float64))), implementation="triton")


def test_residual_names_let_remat_skip_the_forward_pass():
    """With the residuals saved, the backward pass of a checkpointed call does not run the forward kernel again."""

    def loss(policy):
        attention = jax.checkpoint(lambda *x: parallax_attention(*x, implementation="xla"), policy=policy)
        return lambda *x: jnp.sum(attention(*x))

    def forward_passes(policy):
        jaxpr = str(jax.make_jaxpr(jax.grad(loss(policy)))(*operands()))
        return jaxpr.count("name=forward")

    policies = jax.checkpoint_policies
    assert forward_passes(policies.nothing_saveable) == 2
    assert forward_passes(policies.save_only_these_names(*RESIDUAL_NAMES)) == 1
