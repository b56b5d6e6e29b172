"""A whole decode step of a language model with random weights: `python -m benchmarks.decode_step`.

First the fused step (`parallax_jax.step`) against the model's own blocks, on two layers; then the wall-clock time of
steps in a row, as generation runs them, beside the time that one reading of weights and cache takes at the device's
read bandwidth, and the kernels of one step. The default model is the paper's 0.6B (table 5). `--sweep` times launches
of the products instead.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.decode import read_bandwidth
from benchmarks.timing import jax_kernels
from pallas_kernels.triton import projection
from parallax_jax import step
from parallax_jax.cache import KVCache, init_cache
from parallax_jax.model import ModelConfig, TransformerLM
from parallax_jax.sampling import Draws, Sampling, decode_step

PAPER = ModelConfig(151936, 28, 1024, 16, 8, 128, 3072, dtype="bfloat16", param_dtype="bfloat16", scan_layers=False)
SMALL = dataclasses.replace(PAPER, vocab_size=512, num_layers=2, width=64, head_dim=16, mlp_width=96)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(shape, dtype, deviation, key):
    return deviation * jax.random.normal(key, shape, dtype)


def random_parameters(config: ModelConfig):
    """Kernels as at the start of training, gains 1: drawn shape by shape, for one program that draws all is slow."""
    init = lambda key: nn.meta.unbox(TransformerLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda x, key: jnp.ones(x.shape, x.dtype) if x.ndim == 1 else _normal(x.shape, x.dtype, 0.02, key)
    return jax.tree.unflatten(tree, map(draw, leaves, keys))


def random_cache(config: ModelConfig, batch: int, context: int, length: int) -> KVCache:
    """A cache that holds `length` tokens of each sequence."""
    cache = init_cache(config, batch, context)
    leaves, tree = jax.tree.flatten((cache.key, cache.value))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    key, value = jax.tree.unflatten(
        tree, [_normal(x.shape, x.dtype, 1.0, k) for x, k in zip(leaves, keys, strict=True)]
    )
    return dataclasses.replace(cache, key=key, value=value, lengths=jnp.full(batch, length, jnp.int32))


def check(config: ModelConfig, batch: int, context: int) -> dict[str, float]:
    """Relative errors of two layers' logits, bfloat16, against those of the same weights in float32.

    Returns:
      The errors of the step as generation runs it and of the model's own blocks.
    """
    config = dataclasses.replace(config, num_layers=2)
    params = random_parameters(config)
    cache = random_cache(config, batch, context, context - 3)
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def logits(dtype: str):
        cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, tree)
        model = TransformerLM(dataclasses.replace(config, dtype=dtype))
        run = jax.jit(lambda params, cache: model.apply({"params": params}, tokens, cache=cache)[0])
        return run(cast(params), cast(cache))

    ours = logits("bfloat16")
    with mock.patch.object(step, "runs", lambda *_: False):
        blocks = logits("bfloat16")
        with jax.default_matmul_precision("highest"):
            exact = logits("float32")
    error = lambda x: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))
    return {"fused_error": error(ours), "blocks_error": error(blocks)}


def bench(config: ModelConfig, batch: int, context: int, bandwidth: float, steps: int, profile: bool) -> dict:
    """Times `steps` steps of greedy decoding that end at `context` tokens, and with `profile` the kernels of one."""
    params = random_parameters(config)
    cache = random_cache(config, batch, context, context - 3 * steps)
    sizes = {"weight_bytes": params, "cache_bytes": (cache.key, cache.value)}
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}
    keys = jax.random.split(jax.random.key(0), batch)
    draws = Draws(keys, jnp.full(1, -1, jnp.int32), jnp.int32(config.vocab_size))
    run = functools.partial(decode_step, config, Sampling(temperature=0), params)
    start = time.perf_counter()
    state = jnp.ones(batch, jnp.int32), jnp.zeros(batch, bool)
    *state, cache = jax.block_until_ready(run(cache, *state, draws))
    first = time.perf_counter() - start
    for _ in range(2):  # the first round warms up
        start = time.perf_counter()
        for _ in range(steps):
            ahead, _ = state
            *state, cache = run(cache, *state, draws)
            jax.device_get(ahead)  # as `stream` does, while the device computes the next
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - start) / steps
    floor = sum(sizes.values()) / bandwidth
    row = {
        "attention": config.attention,
        "batch": batch,
        "context": context,
        "fused": step.runs(config, state[0][:, None], cache),
        **sizes,
        "first_step_seconds": first,
        "step_us": 1e6 * seconds,
        "floor_us": 1e6 * floor,
        "over_floor": seconds / floor,
        "tokens_per_second": batch / seconds,
    }
    if profile:
        # Nothing is donated here, so the cache is copied first. A kernel's time includes its wait for the one before.
        again = jax.jit(functools.partial(decode_step.__wrapped__, config, Sampling(temperature=0)))
        arguments = (params, cache, *state, draws)
        # Without graphs, in which kernels that do not depend on one another come in any order.
        again = again.lower(*arguments).compile(compiler_options={"xla_gpu_graph_min_graph_size": 1 << 20})
        _, kernels = jax_kernels(again, *arguments, iterations=5)
        row["kernels"] = {name: us for name, us in kernels.items() if "copy" not in name}
        row["kernels_us"] = sum(row["kernels"].values())
    return row


Pair = tuple[projection.Launch | None, projection.Launch | None]


def candidates(weights: list[jax.Array], gated: bool) -> list[projection.Launch]:
    """Launches of a product of one row whose tiles fit the registers."""
    held = weights[0].shape[0] * (len(weights) if gated else 1)
    choices = itertools.product((16, 32, 64), (512, 1024), (4, 8, 16))
    return [projection.Launch(n, k, w, 1) for n, k, w in choices if 32 <= n * held // (32 * w) <= 256]


def time_pairs(pairs: list[Pair], weights, gated: bool, calls: int = 20) -> list[tuple[float, Pair]]:
    """Microseconds of both products of a layer, best first, in a chain over layers: as a step runs them."""
    width, dtype = weights[0][0][0].shape[0], weights[0][0][0].dtype
    arguments = jnp.ones((1, width), dtype), jnp.ones(width, dtype), weights

    def chain(pair, x, gain, weights):
        for first, second in weights:
            hidden, *_ = projection.project(x, first, gain=gain, gated=gated, launch=pair[0])
            (x,) = projection.project(hidden, second, residual=x, launch=pair[1])
        return x

    def measure(call) -> float:
        for _ in range(2):  # the first round warms up
            start = time.perf_counter()
            jax.block_until_ready([call(*arguments) for _ in range(calls)])
        return (time.perf_counter() - start) / calls / len(weights) * 1e6

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        build = lambda pair: jax.jit(functools.partial(chain, pair)).lower(*arguments).compile()
        programs = list(pool.map(build, pairs))
    return sorted(zip(map(measure, programs), pairs, strict=True), key=lambda timed: timed[0])


def sweep(config: ModelConfig, layers: int = 28) -> list[dict]:
    """Times launches of a block's four products at batch 1, two and two; prints the best beside the default."""
    width, mlp = config.width, config.mlp_width
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    parts = {
        "attention": ([(width, n) for n in (heads, heads, kv_heads, kv_heads)], [(heads, width)]),
        "mlp": ([(width, mlp)] * 2, [(mlp, width)]),
    }
    rows = []
    for part, sides in parts.items():
        draw = lambda key, shape: _normal(shape, config.dtype, 0.02, key)
        weights = [
            [[draw(key, x) for x in side] for side in sides] for key in jax.random.split(jax.random.key(0), layers)
        ]
        gated = part == "mlp"
        pairs = [(None, None), *((launch, None) for launch in candidates(weights[0][0], gated))]
        timed = time_pairs(pairs, weights, gated)
        best = timed[0][1][0]
        timed += time_pairs([(best, launch) for launch in candidates(weights[0][1], False)], weights, gated)
        timed.sort(key=lambda pair: pair[0])
        rows += [{"part": part, "us": us, "first": pair[0], "second": pair[1]} for us, pair in timed]
        shown = timed[:6] + [x for x in timed if x[1] == (None, None)]
        print(*(f"{part}: {us:6.2f} us a layer with {pair}" for us, pair in shown), sep="\n", flush=True)
    return rows


def main() -> None:
    """Checks and times the model at the batch sizes named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--sweep", action="store_true", help="time launches of the products instead")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"times a GPU, and this is a {jax.default_backend()}")
    record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if args.sweep:
        record["rows"] = sweep(PAPER)
    else:
        bandwidth = record["read_bandwidth"] = read_bandwidth()
        print(f"{record['device']}, jax {jax.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
        record["rows"] = []
        for batch in args.batch:
            row = check(PAPER, batch, min(args.context, 512))
            print(f"batch {batch}: relative errors against float32 {row}", flush=True)
            row |= bench(PAPER, batch, args.context, bandwidth, args.steps, profile=batch == 1)
            record["rows"].append(row)
            print(
                "batch {batch} context {context}: step {step_us:.0f} us, {over_floor:.2f} x the {floor_us:.0f} us that "
                "reading takes, {tokens_per_second:.0f} tokens/s; first step {first_step_seconds:.1f} s; "
                "fused: {fused}".format(**row),
                flush=True,
            )
            for name, us in row.get("kernels", {}).items():
                print(f"  {name[:60]:60} {us:8.1f} us a step")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
