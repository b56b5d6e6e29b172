"""Blocks in one kernel for Hopper without a GPU: numerics in Pallas' interpreter, and what is shared out to whom."""

import collections
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.mosaic_gpu import layer as kernel
from parallax_jax import step
from parallax_jax.cache import init_cache, init_paged_cache
from parallax_jax.model import ModelConfig, TransformerLM
from parallax_jax.sampling import Sampling, generate
from tests.step_test import parameters

BASE = ModelConfig(64, 1, 256, 4, 2, 64, 384, rope_theta=100.0, dtype="bfloat16", param_dtype="bfloat16")
TOKEN = np.asarray([[3]], np.int32)


def cast(tree, dtype: str):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def filled(config: ModelConfig, length: int, capacity: int):
    """A cache of random keys and values; what lies past `length` is NaN."""
    cache, rng = init_cache(config, 1, capacity), np.random.default_rng(0)

    def random(x):
        there = np.arange(x.shape[-3])[:, None, None] < length
        return jnp.asarray(np.where(there, rng.normal(size=x.shape), np.nan), x.dtype)

    key, value = jax.tree.map(random, (cache.key, cache.value))
    return dataclasses.replace(cache, key=key, value=value, lengths=jnp.asarray([length], jnp.int32))


def relative_error(x, exact) -> float:
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


@functools.cache
def step_of(config: ModelConfig, fused: bool):
    """A jitted step, traced once for all lengths; `fused` only tells the two apart."""
    apply = TransformerLM(config).apply
    return jax.jit(lambda params, cache, new: apply({"params": params}, TOKEN, cache=cache, num_new=new))


def check(config: ModelConfig, length: int, capacity: int, new: int = 1):
    """Logits and new cache entries against float32, no worse than the model's own blocks are."""
    params, cache = parameters(config), filled(config, length, capacity)

    def run(dtype: str, fused: bool):
        call = step_of(dataclasses.replace(config, dtype=dtype), fused)
        of_dtype = dataclasses.replace(cache, key=cast(cache.key, dtype), value=cast(cache.value, dtype))
        with mock.patch.object(step, "runs", lambda *_: fused):
            return call(cast(params, dtype), of_dtype, jnp.asarray([new], jnp.int32))

    with mock.patch.object(step, "_five_kernels", None):
        logits, ours = run(config.dtype, True)
    blocks, _ = run(config.dtype, False)
    with jax.default_matmul_precision("highest"):
        exact, plain = run("float32", False)
    # Of so few logits the rounding errors of two orders of summation differ by a half; what is wrong is off by 0.1.
    assert relative_error(logits, exact) <= 2 * relative_error(blocks, exact) + 1e-3
    size = ours.key[0].shape[1]  # stacked or not
    has_place = new and (ours.ring or length < size)
    place = length % size
    kept = np.delete(np.arange(size), [place] if has_place else [])
    for x, y, old in zip((*ours.key, *ours.value), (*plain.key, *plain.value), (*cache.key, *cache.value), strict=True):
        np.testing.assert_array_equal(*(np.asarray(y[:, kept], np.float32) for y in (x, old)))
        if has_place:
            assert relative_error(x[:, place], y[:, place]) <= 0.03


# Changes to the model, the sequence's length, the cache's capacity, whether there is a new token.
CASES = {
    "two_blocks": ({"num_layers": 2}, 200, 1024, 1),
    "a_kernel_a_block": ({"num_layers": 2, "scan_layers": False}, 40, 64, 1),
    "softmax": ({"attention": "softmax"}, 130, 256, 1),
    "wide_heads": ({"head_dim": 128, "num_kv_heads": 1, "width": 384}, 300, 512, 1),
    "no_norms": ({"qk_norm": False, "probe_norm": False, "probe_rope": False, "dtype": "float16"}, 65, 72, 1),
    "empty": ({}, 0, 64, 1),
    "full": ({}, 64, 64, 1),
    "no_new_token": ({}, 50, 64, 0),
    "ring": ({"local_window_size": 200}, 530, 600, 1),
    "ring_not_full": ({"local_window_size": 200}, 70, 600, 1),
    "ring_no_new_token": ({"local_window_size": 200}, 530, 600, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_blocks(name, monkeypatch):
    changes, *rest = CASES[name]
    programs = 4 if name == "two_blocks" else 2
    for function in ("layers", "unsupported"):
        monkeypatch.setattr(kernel, function, functools.partial(getattr(kernel, function), programs=programs))
    config = dataclasses.replace(BASE, **changes)
    check(dataclasses.replace(config, param_dtype=config.dtype), *rest)


def test_vmap_is_one_after_the_other(monkeypatch):
    """Each waits for all of its programs: side by side they could wait for ever."""
    for function in ("layers", "unsupported"):
        monkeypatch.setattr(kernel, function, functools.partial(getattr(kernel, function), programs=2))
    params, several = parameters(BASE), [filled(BASE, length, 64) for length in (5, 40)]
    call, new = step_of(BASE, True), jnp.ones(1, jnp.int32)
    monkeypatch.setattr(step, "runs", lambda *_: True)
    alone = [call(params, cache, new)[0] for cache in several]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    mapped = jax.vmap(lambda cache: call(params, cache, new)[0])
    np.testing.assert_allclose(mapped(stacked), jnp.stack(alone), rtol=1e-4, atol=1e-5)  # the last product's order
    assert set(re.findall(r"grid=\([^)]*\)", str(jax.make_jaxpr(mapped)(stacked)))) == {"grid=(2,)"}


def test_generation_is_greedy(monkeypatch):
    """Prompt and generation outgrow the window, the layers are stacked, and every token is the likeliest."""
    for function in ("layers", "unsupported"):
        monkeypatch.setattr(kernel, function, functools.partial(getattr(kernel, function), programs=2))
    monkeypatch.setattr(step, "runs", lambda config, params, tokens, cache: tokens.shape == (1, 1))
    layers, stacked = step.layers, []
    monkeypatch.setattr(
        step, "layers", lambda config, *rest: stacked.append(config.scan_layers) or layers(config, *rest)
    )
    config = dataclasses.replace(BASE, local_window_size=16)
    params, prompt = parameters(config), list(range(3, 14))
    options = {"max_new_tokens": 9, "sampling": Sampling(temperature=0), "tokens_per_call": 4}
    (tokens,) = generate(config, params, [prompt], **options)
    assert set(stacked) == {True}
    exact = TransformerLM(dataclasses.replace(config, dtype="float32", implementation="reference"))
    logits = exact.apply({"params": cast(params, "float32")}, jnp.asarray([prompt + tokens[:-1]], jnp.int32))[0, 10:]
    behind = logits.max(axis=-1) - jnp.take_along_axis(logits, jnp.asarray(tokens)[:, None], axis=-1)[:, 0]
    assert float(behind.max()) <= 0.05 * float(jnp.abs(logits).max())


@pytest.mark.parametrize(
    ("changes", "call", "stacked"),
    [
        ({}, {}, True),
        ({"local_window_size": 40}, {}, True),
        ({}, {"batch": 2}, False),
        ({}, {"card": "NVIDIA A100-SXM4-80GB"}, False),
        ({"use_bias": True}, {}, False),
        ({"dtype": "float32"}, {}, False),
        ({"scan_layers": False}, {}, False),
    ],
    ids=str,
)
def test_when_layers_are_to_be_stacked(changes, call, stacked):
    config, card = dataclasses.replace(BASE, num_layers=2, **changes), call.get("card", "NVIDIA H100 80GB HBM3")
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(card, num_cores=None, platform="gpu"))
    params, cache = parameters(config), init_cache(config, call.get("batch", 1), 64)
    with jax.sharding.use_abstract_mesh(mesh):
        assert step.takes_stacked(config, params, cache) == stacked
        one_by_one = dataclasses.replace(cache, key=tuple(cache.key), value=tuple(cache.value))
        assert not step.takes_stacked(config, params, one_by_one)


@pytest.mark.parametrize(
    ("depth", "widths", "shares"),
    [(1024, (2048, 2048, 1024, 1024), None), (1024, (3072, 3072), None), (3072, (1024,), None), (2048, (1024,), 8)],
)
def test_every_tile_of_a_product_is_somebodys(depth, widths, shares):
    plan = kernel.Product.of([jax.ShapeDtypeStruct((depth, n), jnp.bfloat16) for n in widths], 128, shares)
    places = [plan.place(program, i) for program in range(128) for i in range(plan.num_tiles)]
    found = collections.Counter((int(row), int(column)) for row, column in places)
    assert set(found) == {(row, column) for row in range(0, depth, 128) for column in range(sum(widths) // 64)}
    assert set(found.values()) == {1}  # in the paper's smaller model all programs have as much to do


def test_columns_that_do_not_come_out_even_are_done_twice():
    plan = kernel.Product.of([jax.ShapeDtypeStruct((128, 192), jnp.bfloat16)], 2)
    assert (plan.shares, plan.rounds) == (1, 2)
    assert [int(plan.block(program, i)) for program in range(2) for i in range(2)] == [0, 2, 1, 2]


def reason(card="NVIDIA H100 80GB HBM3", config=BASE, batch=1, page_size=None) -> str | None:
    """Why a block does not go to the kernel; an empty string where that is not the kernel's to say."""
    cache = init_cache(config, batch, 64)
    if page_size is not None:
        cache = init_paged_cache(config, np.zeros((batch, 1), np.int32) - 1, num_pages=1, page_size=page_size)
    answers = []

    def ask(params):
        answers.append(step._fits_one_kernel(config, cache, params, cache.key, config.windows[0]))
        x = jax.ShapeDtypeStruct((batch, config.width), jnp.dtype(config.dtype))
        answers.append(kernel.unsupported(x, step._weights(config, params), cache.key))

    params = parameters(dataclasses.replace(config, dtype="bfloat16"))["layers"]
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(card, num_cores=None, platform="gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(ask, params)
    fits, why = answers
    assert not (fits and why)
    return None if fits else why or ""


@pytest.mark.parametrize(
    ("changes", "call", "expected"),
    [
        ({}, {}, None),
        ({}, {"card": "NVIDIA H200"}, None),
        ({}, {"card": "NVIDIA H100 PCIe"}, "needs a whole Hopper GPU"),
        ({}, {"card": "NVIDIA H20"}, "needs a whole Hopper GPU"),
        ({}, {"card": "NVIDIA H100 80GB HBM3 MIG 3g.40gb"}, "needs a whole Hopper GPU"),
        ({}, {"card": "NVIDIA A100-SXM4-80GB"}, "needs a Hopper GPU"),
        ({}, {"batch": 2}, "needs one sequence, got 2"),
        ({}, {"page_size": 64}, ""),
        ({"dtype": "float32"}, {}, "got float32"),
        ({"param_dtype": "float32"}, {}, "weights: need bfloat16"),
        ({"mlp_width": 320}, {}, "multiples of"),
        ({"mlp_width": 1664}, {}, "at most 1536 rows, got 1664"),
        ({"head_dim": 32}, {}, "got 32"),
        ({"num_kv_heads": 4}, {}, "need 128 rows"),
        ({"width": 4096}, {}, "at most 2048, got 4096"),
        ({"implementation": "triton"}, {}, ""),
        ({"local_window_size": 40}, {}, None),  # a ring
        ({"local_window_size": 100}, {}, None),  # more than there is room for
    ],
    ids=str,
)
def test_when_it_is_taken(changes, call, expected):
    why = reason(config=dataclasses.replace(BASE, **changes), **call)
    assert why == expected if not expected else expected in why
