"""A whole decode step of a language model with random weights: `python -m benchmarks.decode_step`.

Wall-clock time of steps in a row, as generation runs them, beside the time that one reading of weights and cache takes
at the device's read bandwidth. The default model is the paper's 0.6B (table 5).
"""

import argparse
import dataclasses
import functools
import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.decode import read_bandwidth
from parallax_jax.cache import init_cache
from parallax_jax.model import ModelConfig, TransformerLM
from parallax_jax.sampling import Draws, Sampling, decode_step

PAPER = ModelConfig(151936, 28, 1024, 16, 8, 128, 3072, dtype="bfloat16", param_dtype="bfloat16", scan_layers=False)


def bench(config: ModelConfig, batch: int, context: int, bandwidth: float, steps: int = 50) -> dict:
    """Times `steps` steps of greedy decoding that end at `context` tokens."""
    model = TransformerLM(config)
    init = jax.jit(lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    params = init(jax.random.key(0))
    cache = init_cache(config, batch, context)
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves((cache.key, cache.value)))
    cache = dataclasses.replace(cache, lengths=jnp.full(batch, context - 2 * steps, jnp.int32))
    step = functools.partial(decode_step, config, Sampling(temperature=0), params)
    keys = jax.random.split(jax.random.key(0), batch)
    draws = Draws(keys, jnp.full(1, -1, jnp.int32), jnp.int32(config.vocab_size))
    token, done = jnp.ones(batch, jnp.int32), jnp.zeros(batch, bool)
    for _ in range(2):  # the first round compiles
        start = time.perf_counter()
        for _ in range(steps):
            token, done, cache = step(cache, token, done, draws)
        jax.block_until_ready(token)
        seconds = (time.perf_counter() - start) / steps
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    floor = (weight_bytes + cache_bytes) / bandwidth
    return {
        "attention": config.attention,
        "batch": batch,
        "context": context,
        "step_us": 1e6 * seconds,
        "floor_us": 1e6 * floor,
        "over_floor": seconds / floor,
        "tokens_per_second": batch / seconds,
    }


def main() -> None:
    """Times the model at the batch sizes named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"times a GPU, and this is a {jax.default_backend()}")
    bandwidth = read_bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for batch in args.batch:
        rows.append(bench(PAPER, batch, args.context, bandwidth))
        print(
            "batch {batch} context {context}: step {step_us:.0f} us, {over_floor:.2f} x the {floor_us:.0f} us that "
            "reading takes, {tokens_per_second:.0f} tokens/s".format(**rows[-1]),
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"device": jax.devices()[0].device_kind, "read_bandwidth": bandwidth, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
