import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax_jax import sampling
from parallax_jax.cache import init_cache, init_paged_cache
from parallax_jax.model import ModelConfig, TransformerLM, unstack_layers
from parallax_jax.sampling import Sampling, filter_logits, generate, sample, stream

CONFIG = ModelConfig(
    vocab_size=31,
    num_layers=2,
    width=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=24,
    rope_theta=1e4,
    tie_embeddings=False,  # tied and untrained, a model repeats its last token
)
WINDOWED = dataclasses.replace(CONFIG, local_window_size=24)
GREEDY = Sampling(temperature=0)
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [2, 7, 1, 8, 2])


@pytest.fixture(scope="module")
def params():
    tree = nn.meta.unbox(jax.jit(TransformerLM(CONFIG).init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"])
    # Far from uniform attention and from uniform logits; gains stay.
    return jax.tree_util.tree_map_with_path(lambda path, p: p if path[-1].key == "scale" else 10 * p, tree)


def recompute(config, params, prompts, steps):
    """Greedy tokens by running the whole sequence anew for each."""
    tokens = np.zeros((len(prompts), max(map(len, prompts)) + steps), np.int32)
    lengths = np.asarray([len(p) for p in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    config = dataclasses.replace(config, implementation="reference")
    forward = jax.jit(lambda tokens: jnp.argmax(TransformerLM(config).apply({"params": params}, tokens), -1))
    rows = np.arange(len(prompts))
    for _ in range(steps):
        tokens[rows, lengths] = forward(tokens)[rows, lengths - 1]
        lengths += 1
    return [tokens[b, len(p) : len(p) + steps].tolist() for b, p in enumerate(prompts)]


@pytest.mark.parametrize("kind", ["contiguous", "paged", "windowed"])
def test_greedy_with_a_cache_equals_recomputation(params, kind):
    config = WINDOWED if kind == "windowed" else CONFIG
    cache = None
    if kind == "paged":
        table = np.random.default_rng(0).permutation(45).astype(np.int32)[:42].reshape(3, 14)
        cache = init_paged_cache(config, table, num_pages=45, page_size=16)
        cache = dataclasses.replace(cache, key=cache.key.at[:].set(jnp.nan), value=cache.value.at[:].set(jnp.nan))
    options = {"max_new_tokens": 200, "sampling": GREEDY, "cache": cache, "prefill_chunk": 4}
    tokens = generate(config, params, PROMPTS, **options)
    expected = recompute(config, params, PROMPTS, 200)
    assert tokens == expected
    assert min(len(set(row)) for row in expected) > 3  # a constant text would show nothing


def test_a_prompt_does_not_depend_on_its_batch_and_a_seed_repeats(params):
    options = {"max_new_tokens": 12, "sampling": Sampling(top_k=9)}
    together = generate(CONFIG, params, PROMPTS, seed=[5, 6, 7], **options)
    others = generate(CONFIG, params, [PROMPTS[2], PROMPTS[0], [30] * 11], seed=[7, 5, 6], **options)
    assert others[:2] == [together[2], together[0]]
    first = generate(CONFIG, params, PROMPTS, seed=1, **options)
    assert first == generate(CONFIG, params, PROMPTS, seed=1, **options)
    assert first != generate(CONFIG, params, PROMPTS, seed=2, **options)
    twins = generate(CONFIG, params, [PROMPTS[0]] * 3, seed=1, **options)
    assert twins[0] != twins[1]


def test_stop_tokens_end_a_sequence_and_the_run(params):
    free = generate(CONFIG, params, PROMPTS, max_new_tokens=30, sampling=GREEDY)
    stop = (free[0][4], free[2][9])
    stopped = generate(CONFIG, params, PROMPTS, max_new_tokens=30, sampling=GREEDY, stop_tokens=stop)
    ends = [next((i for i, t in enumerate(row) if t in stop), 30) for row in free]
    assert stopped == [row[:end] for row, end in zip(free, ends, strict=True)]
    steps = list(stream(CONFIG, params, PROMPTS[:1], max_new_tokens=30, sampling=GREEDY, stop_tokens=stop))
    assert [int(s[0]) for s in steps] == free[0][: ends[0] + 1]


@pytest.mark.parametrize("tokens_per_call", [1, 5])
def test_tokens_do_not_depend_on_how_many_come_together(params, tokens_per_call):
    options = {"max_new_tokens": 21, "sampling": Sampling(top_k=9), "seed": 4}
    expected = np.stack(list(stream(CONFIG, params, PROMPTS, **options)))
    stop = (int(expected[3, 0]), int(expected[8, 1]))
    for stop_tokens in ((), stop):
        options["stop_tokens"] = stop_tokens
        expected = np.stack(list(stream(CONFIG, params, PROMPTS, **options)))
        tokens = np.stack(list(stream(CONFIG, params, PROMPTS, tokens_per_call=tokens_per_call, **options)))
        np.testing.assert_array_equal(tokens, expected)
        assert (expected == -1).any() == (stop_tokens == stop)


def test_nothing_is_written_past_the_last_token(params):
    """The last call draws fewer tokens than it could; the cache holds no more than the run needs."""
    capacity = len(PROMPTS[0]) + 6
    cache = init_cache(dataclasses.replace(CONFIG, scan_layers=False), 3, capacity)
    layers, tree = unstack_layers(CONFIG, params)
    token, done = jnp.asarray([3, 5, 7], jnp.int32), jnp.asarray([False, True, False])
    draws = sampling.Draws(jax.random.split(jax.random.key(0), 3), jnp.full(1, -1, jnp.int32), jnp.int32(31))
    tokens, cache, *_ = sampling.decode_steps(layers, GREEDY, 9, tree, cache, token, done, np.int32(4), draws)
    assert cache.lengths.tolist() == [4, 0, 4]
    np.testing.assert_array_equal(np.asarray(tokens) >= 0, (np.arange(9)[:, None] < 4) & [True, False, True])
    written = np.asarray(cache.key[1]).any((2, 3))
    np.testing.assert_array_equal(written, np.arange(capacity) < np.asarray([[4], [0], [4]]))


def test_ids_over_the_vocabulary_never_come(params):
    tokens = generate(CONFIG, params, PROMPTS, max_new_tokens=30, sampling=Sampling(temperature=3.0), vocab_size=10)
    assert {t for row in tokens for t in row} == set(range(10))


def test_one_compilation_for_the_whole_run(params):
    config = dataclasses.replace(CONFIG, norm_eps=2e-6)  # not compiled before
    before = sampling.decode_steps._cache_size(), sampling._prefill._cache_size()
    assert len(list(stream(config, params, PROMPTS, max_new_tokens=20, prefill_chunk=4))) == 20
    assert (sampling.decode_steps._cache_size(), sampling._prefill._cache_size()) == (before[0] + 1, before[1] + 1)


def kept(logits, **options):
    out = filter_logits(jnp.asarray([logits], jnp.float32), Sampling(**options))
    return np.flatnonzero(np.isfinite(out[0])).tolist()


def test_filters():
    p = np.asarray([0.1, 0.4, 0.03, 0.25, 0.22])
    logits = np.log(p) + 5
    assert kept(logits) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_k=50) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.6) == [1, 3]
    assert kept(logits, top_p=0.7) == [1, 3, 4]
    assert kept(logits, min_p=0.5) == [1, 3, 4]
    assert kept(logits, min_p=0.1) == [0, 1, 3, 4]
    assert kept(logits, top_k=3, top_p=0.7) == [1, 3]  # renormalised after top_k: 0.46, 0.29, 0.25
    assert kept(logits, temperature=10.0, min_p=0.7) == [0, 1, 2, 3, 4]


def test_sample_follows_the_distribution():
    p = np.asarray([0.1, 0.4, 0.05, 0.25, 0.2])
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (20_000, 5))
    share = np.bincount(sample(logits, keys, Sampling()), minlength=5) / 20_000
    np.testing.assert_allclose(share, p, atol=0.015)
    share = np.bincount(sample(logits, keys, Sampling(temperature=0.5, top_k=3)), minlength=5) / 20_000
    sharp = np.where(p < 0.2, 0, p**2)
    np.testing.assert_allclose(share, sharp / sharp.sum(), atol=0.015)
    assert (sample(logits, keys, GREEDY) == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, "prompts: need one token or more each, got lengths [1, 0]"),
        ({"prompts": [[1, 31]]}, "prompts: token ids must lie in [0, 30], got 1 to 31"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be an integer >= 1, got 0"),
        ({"tokens_per_call": 0}, "tokens_per_call: must be an integer >= 1, got 0"),
        ({"seed": [1, 2]}, "seed: must be an int or one per prompt (1), got 2"),
        ({"cache": init_cache(CONFIG, 1, 5)}, "cache: needs room for 6 tokens of a sequence, has 5"),
        ({"cache": init_cache(CONFIG, 2, 9)}, "cache: must be empty and hold 1 sequences"),
    ],
)
def test_bad_arguments(params, changes, message):
    options = {"prompts": [[1, 2]], "max_new_tokens": 5, **changes}
    with pytest.raises(ValueError) as error:
        generate(CONFIG, params, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("top_k", 0), ("top_p", 0), ("top_p", 1.5), ("min_p", -0.1)]
)
def test_bad_sampling(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} is not allowed: it must be"):
        Sampling(**{field: value})
