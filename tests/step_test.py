"""The fused step of generation against the model's own blocks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sizes import TritonDecodeBlockSizes
from parallax_jax import step
from parallax_jax.cache import init_cache, init_paged_cache
from parallax_jax.model import ModelConfig, TransformerLM

BASE = ModelConfig(64, 2, 48, 4, 2, 20, 40, rope_theta=100.0, scan_layers=False)
LENGTHS = (11, 0, 20)


@functools.cache
def parameters(config: ModelConfig):
    init = jax.jit(lambda key: nn.meta.unbox(TransformerLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    leaves, tree = jax.tree.flatten(init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    # Norms' gains differ, and kernels are large enough for attention to be far from uniform.
    return jax.tree.unflatten(tree, [x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])


def filled(config: ModelConfig, paged: bool):
    """A cache of random keys and values, ragged; what no sequence owns is NaN."""
    rng = np.random.default_rng(0)
    if paged:
        table = jnp.asarray(rng.permutation(7)[:6].reshape(3, 2), jnp.int32)
        cache = init_paged_cache(config, table, num_pages=7, page_size=16)
    else:
        table, cache = None, init_cache(config, 3, 32)

    def random(x):
        owned = np.zeros(x.shape[:2], bool)
        for b, length in enumerate(LENGTHS):
            rows = np.arange(min(length, 8) if cache.ring else length)
            owned[b if table is None else np.asarray(table)[b, rows // 16], rows % 16 if paged else rows] = True
        return jnp.asarray(np.where(owned[..., None, None], rng.normal(size=x.shape), np.nan), x.dtype)

    key, value = (tuple(map(random, x)) for x in (cache.key, cache.value))
    return dataclasses.replace(cache, key=key, value=value, lengths=jnp.asarray(LENGTHS, jnp.int32))


# Changes to the model, whether the cache is paged, and the number of splits.
CASES = {
    "contiguous": ({}, False, 4),
    "softmax": ({"attention": "softmax"}, False, 4),
    "paged_mqa": ({"num_kv_heads": 1, "num_heads": 10}, True, 2),
    "window": ({"local_window_size": (None, 7)}, True, 1),
    "ring": ({"local_window_size": 8}, False, 2),
    "no_norms": ({"qk_norm": False, "probe_norm": False, "probe_rope": False}, False, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_blocks(name, monkeypatch):
    changes, paged, splits = CASES[name]
    monkeypatch.setattr(TritonDecodeBlockSizes, "heuristic", lambda *_: TritonDecodeBlockSizes(16, splits, 4, 2))
    config = dataclasses.replace(BASE, **changes)
    params, cache = parameters(config), filled(config, paged)
    model = TransformerLM(config)
    call = jax.jit(lambda cache, tokens, num_new: model.apply({"params": params}, tokens, cache=cache, num_new=num_new))
    fused = jax.jit(lambda *x: call.__wrapped__(*x))
    ours, plain = cache, cache
    for i in range(2):
        tokens = jnp.asarray([[i], [7], [50 + i]], jnp.int32)
        num_new = jnp.asarray([1, 1, i % 2], jnp.int32)
        expected, plain = call(plain, tokens, num_new)
        with monkeypatch.context() as patch:
            patch.setattr(step, "runs", lambda config, params, _, cache: step.takes(config, params, cache))
            logits, ours = fused(ours, tokens, num_new)
        real = np.asarray(num_new) > 0
        # A logit near 0 is a sum of terms as large as the others are, which either rounds in its own order.
        atol = 2e-5 * float(jnp.abs(expected[real]).max())
        np.testing.assert_allclose(logits[real], expected[real], rtol=2e-5, atol=atol)
        np.testing.assert_array_equal(ours.lengths, plain.lengths)
        for x, y in zip(
            jax.tree.leaves((ours.key, ours.value)), jax.tree.leaves((plain.key, plain.value)), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
