import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax_jax.cache import KVCache, init_cache, init_paged_cache
from parallax_jax.layers import ParallaxAttention
from parallax_jax.model import ModelConfig, TransformerLM, unstack_layers

LENGTH = 45
CONFIG = ModelConfig(
    vocab_size=31, num_layers=2, width=20, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24, rope_theta=1e4
)
PAGES = jnp.asarray([[7, 0, 3], [5, 6, 1]], jnp.int32)


def layer_cache(kind: str, window: int | None) -> KVCache:
    """An empty cache of two sequences in which every row is poison."""
    shape = {"contiguous": (2, 48, 2, 8), "paged": (9, 16, 2, 8), "ring": (2, window, 2, 8)}[kind]
    poison = jnp.full(shape, jnp.nan)
    table = PAGES if kind == "paged" else None
    return KVCache(poison, poison, jnp.zeros(2, jnp.int32), table, ring=kind == "ring")


@pytest.fixture(scope="module")
def layer_run():
    """Outputs of whole sequences without a cache, by window."""
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 20))

    def run(window):
        layer = ParallaxAttention(4, 2, 8, local_window_size=window)
        params = nn.meta.unbox(layer.init(jax.random.key(1), x)["params"])
        params = jax.tree.map(lambda p: p * 20 if p.ndim > 1 else p, params)
        return layer, params, x, layer.apply({"params": params}, x)[0]

    return {window: run(window) for window in (None, 7, 1)}


@pytest.mark.parametrize(
    ("kind", "window"),
    [("contiguous", None), ("contiguous", 7), ("paged", None), ("paged", 7), ("ring", 7), ("ring", 1)],
)
def test_any_chunks_equal_the_whole(layer_run, kind, window):
    layer, params, x, expected = layer_run[window]
    cache = layer_cache(kind, window)
    step = jax.jit(lambda cache, x, num_new: layer.apply({"params": params}, x, cache=cache, num_new=num_new))
    # The two sequences take different shares of each chunk, none and all included; the rest of a chunk is padding.
    done = np.zeros(2, int)
    for chunk, share in [(9, (9, 4)), (1, (1, 1)), (9, (0, 9)), (1, (1, 0)), (1, (1, 1)), (20, (13, 20)), (9, (9, 1))]:
        rows = np.zeros((2, chunk, 20), np.float32)
        for b, n in enumerate(share):
            rows[b, :n] = x[b, done[b] : done[b] + n]
            rows[b, n:] = 1e3
        out, cache = step(cache, rows, np.asarray(share, np.int32))
        for b, n in enumerate(share):
            np.testing.assert_allclose(out[b, :n], expected[b, done[b] : done[b] + n], rtol=1e-4, atol=1e-5)
        done += share
    np.testing.assert_array_equal(cache.lengths, done)
    assert cache.capacity == (np.inf if kind == "ring" else 48)


def test_nothing_lands_outside_a_sequences_own_pages():
    layer = ParallaxAttention(4, 2, 8)
    x = jax.random.normal(jax.random.key(0), (2, 20, 20))
    params = nn.meta.unbox(layer.init(jax.random.key(1), x)["params"])
    cache = layer_cache("paged", None)
    # Sequence 0 owns page 7 only and outgrows it; sequence 1 owns page 5 and starts near the table's end.
    table = jnp.asarray([[7, -1, 9], [99, -2, 5]], jnp.int32)
    cache = dataclasses.replace(cache, page_table=table, lengths=jnp.asarray([4, 40], jnp.int32))
    _, new = jax.jit(lambda cache: layer.apply({"params": params}, x, cache=cache))(cache)
    written = ~jnp.isnan(new.key).any((-1, -2))
    expected = np.zeros((9, 16), bool)
    expected[7, 4:] = True
    expected[5, 8:] = True
    np.testing.assert_array_equal(written, expected)
    np.testing.assert_array_equal(~jnp.isnan(new.value).any((-1, -2)), expected)


def test_contiguous_drops_what_does_not_fit_inside_jit():
    layer = ParallaxAttention(4, 2, 8)
    x = jax.random.normal(jax.random.key(0), (2, 20, 20))
    params = nn.meta.unbox(layer.init(jax.random.key(1), x)["params"])
    cache = dataclasses.replace(layer_cache("contiguous", None), lengths=jnp.asarray([40, 0], jnp.int32))
    _, new = jax.jit(lambda cache: layer.apply({"params": params}, x, cache=cache))(cache)
    expected = np.zeros((2, 48), bool)
    expected[0, 40:] = True
    expected[1, :20] = True
    np.testing.assert_array_equal(~jnp.isnan(new.key).any((-1, -2)), expected)


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    return nn.meta.unbox(jax.jit(TransformerLM(CONFIG).init)(jax.random.key(0), tokens)["params"])


def test_scanned_and_unstacked_models_agree_and_update_in_place(params):
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 31)
    whole = TransformerLM(CONFIG).apply({"params": params}, tokens)
    for config, p in ((CONFIG, params), unstack_layers(CONFIG, params)):

        @jax.jit
        def prefill(p, cache, tokens, config=config):
            return TransformerLM(config).apply({"params": p}, tokens, cache=cache)

        step = jax.jit(prefill.__wrapped__, donate_argnums=1)
        logits, cache = prefill(p, init_cache(config, 2, 20), tokens[:, :5])
        np.testing.assert_allclose(logits, whole[:, :5], rtol=1e-4, atol=1e-5)
        before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((cache.key, cache.value))]
        logits, cache = step(p, cache, tokens[:, 5:])
        np.testing.assert_allclose(logits, whole[:, 5:], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(cache.lengths, [6, 6])
        if not config.scan_layers:
            assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves((cache.key, cache.value))] == before


def test_the_cache_holds_keys_and_values_only():
    cache = init_cache(CONFIG, 3, 20)
    assert cache.key.shape == cache.value.shape == (2, 3, 20, 2, 8)
    windowed = init_cache(dataclasses.replace(CONFIG, local_window_size=6, dtype="bfloat16"), 3, 20)
    assert windowed.ring and windowed.key.shape == (2, 3, 6, 2, 8) and windowed.key.dtype == jnp.bfloat16
    assert not init_cache(dataclasses.replace(CONFIG, local_window_size=20), 3, 20).ring
    paged = init_paged_cache(CONFIG, PAGES, num_pages=9, page_size=16)
    assert paged.key.shape == (2, 9, 16, 2, 8) and paged.capacity == 48


def test_errors(params):
    tokens = jnp.zeros((2, 6), jnp.int32)
    apply = lambda cache, **kw: TransformerLM(CONFIG).apply({"params": params}, tokens, cache=cache, **kw)
    with pytest.raises(ValueError, match="cache: has room for 5 tokens of a sequence, got 6"):
        apply(init_cache(CONFIG, 2, 5))
    apply(init_cache(CONFIG, 2, 5), num_new=jnp.asarray([5, 2], jnp.int32))
    with pytest.raises(ValueError, match="segment_ids: a cache holds one segment"):
        apply(init_cache(CONFIG, 2, 9), segment_ids=tokens)
    with pytest.raises(ValueError, match="cache: holds bfloat16, got keys of float32"):
        apply(init_cache(dataclasses.replace(CONFIG, dtype="bfloat16"), 2, 9))
    with pytest.raises(ValueError, match="page_table: page 4 is given out 2 times"):
        init_paged_cache(CONFIG, jnp.asarray([[4, -1], [2, 4]], jnp.int32), num_pages=9, page_size=16)
    with pytest.raises(ValueError, match="page_table: must be int32"):
        init_paged_cache(CONFIG, jnp.ones((2, 2)), num_pages=9, page_size=16)
