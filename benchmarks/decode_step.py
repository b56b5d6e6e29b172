"""A whole decode step of a language model with random weights: `python -m benchmarks.decode_step`.

First the fused step (`parallax_jax.step`) against the model's own blocks, on two layers; then the wall-clock time of
steps in a row, as generation runs them, beside the time that one reading of weights and cache takes at the device's
read bandwidth, and the kernels of one step. The default model is the paper's 0.6B (table 5). `--sweep` times variants
of the step at batch 1 instead; without programmatic dependent launches under XLA_FLAGS=--xla_gpu_enable_pdl=false.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.decode import read_bandwidth
from benchmarks.timing import jax_kernels
from pallas_kernels.triton import decode, projection
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


Launch = projection.Launch


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from a step as it is by default.

    Attributes:
      ahead: what products read ahead (`step.AHEAD`).
      launches: of a block's products by their names in `step.AHEAD`.
      attention: fields of the launch of `append`.
      options: of XLA.
    """

    ahead: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: step.AHEAD)
    launches: dict[str, Launch] = dataclasses.field(default_factory=dict)
    attention: dict[str, int] = dataclasses.field(default_factory=dict)
    options: dict[str, int] = dataclasses.field(default_factory=dict)

    def lower(self, config: ModelConfig, *arguments) -> jax.stages.Lowered:
        """A step of this variant."""

        def launch(rows, weights, gated):
            first = "down" if weights[0].shape[0] == config.mlp_width else "out"
            name = "gate" if gated else "in" if len(weights) > 1 else first
            return self.launches.get(name) or default(rows, weights, gated)

        heuristic = lambda *x: dataclasses.replace(append(*x), **self.attention)
        default, append = projection._launch, decode.heuristic
        with (
            mock.patch.object(projection, "_launch", launch),
            mock.patch.object(decode, "heuristic", heuristic),
            mock.patch.object(step, "AHEAD", self.ahead),
        ):
            jax.clear_caches()
            return decode_step.lower(config, Sampling(temperature=0), *arguments)


FAR_AHEAD = {"in": ("gains", "out", "gate", "up"), "out": ("down",), "gate": ("next",), "down": ()}
TILES = {"in": Launch(32, 128, 4, 4), **dict.fromkeys(("out", "gate", "down"), Launch(16, 128, 4, 4))}
VARIANTS = {
    "default": Variant(),
    "no_graph": Variant(options={"xla_gpu_graph_min_graph_size": 1 << 20}),
    "nothing_ahead": Variant(ahead=dict.fromkeys(step.AHEAD, ())),
    "far_ahead": Variant(ahead=FAR_AHEAD),
    "cache_ahead": Variant(ahead=step.AHEAD | {"in": ("gains", "cache", "out")}),
    "few_warps": Variant(launches=dict.fromkeys(step.AHEAD, Launch(16, 1024, 8, 1))),
    "wide": Variant(launches=dict.fromkeys(("in", "gate"), Launch(32, 1024, 16, 1))),
    "narrow": Variant(launches=dict.fromkeys(("out", "down"), Launch(8, 1024, 8, 1))),
    "tiles": Variant(launches=TILES),
    "tiles_far_ahead": Variant(FAR_AHEAD, TILES),
    "splits": Variant(attention={"num_splits": 32}),
    "short_blocks": Variant(attention={"block_k": 32, "num_stages": 4}),
}


def timeline(run: "_Steps", steps: int = 5) -> dict[str, float]:
    """Microseconds of a step on the device, by kernel: from the end of the kernel before to the kernel's own.

    "idle" is the time in which no kernel ran, "total" the sum. Empty where the profiler sees no kernel (in a graph).
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                run()
            jax.block_until_ready(run.state)
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = [plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes if "GPU" in plane.name]
        streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        events = sorted((e.start_ns + e.duration_ns, e.start_ns, e.name) for line in streams for e in line.events)
    if not events:
        return {}
    times, last = collections.Counter(), events[0][0]
    for end, start, name in events[1:]:
        times["idle"] += max(start - last, 0)
        times[name] += end - max(start, last)
        last = end
    times = {name: time / steps / 1e3 for name, time in times.most_common()}
    return {"total": sum(times.values())} | times


@dataclasses.dataclass
class _Steps:
    """A compiled step and what it goes on from: token, whether it is the last, cache."""

    program: jax.stages.Compiled
    params: dict
    state: list
    draws: Draws

    def __call__(self) -> None:
        token, done, cache = self.state
        self.state = self.program(self.params, cache, token, done, self.draws)


def sweep(config: ModelConfig, context: int, steps: int, names: list[str]) -> list[dict]:
    """Times steps of one sequence with the variants named, compiled at once."""
    params, cache = random_parameters(config), random_cache(config, 1, context, context // 2)
    draws = Draws(jax.random.split(jax.random.key(0), 1), jnp.full(1, -1, jnp.int32), jnp.int32(config.vocab_size))
    state = jnp.ones(1, jnp.int32), jnp.zeros(1, bool)
    lowered = [VARIANTS[name].lower(config, params, cache, *state, draws) for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compile = lambda name, x: x.compile(compiler_options=VARIANTS[name].options)
        programs = list(pool.map(compile, names, lowered))
    rows = []
    for name, program in zip(names, programs, strict=True):
        cache = dataclasses.replace(cache, lengths=jnp.full(1, context - 4 * steps, jnp.int32))
        run = _Steps(program, params, [*state, cache], draws)
        tokens = [int((run(), run.state[0][0])[1]) for _ in range(8)]
        for _ in range(2):  # the first round warms up
            start = time.perf_counter()
            for _ in range(steps):
                run()
            host = time.perf_counter() - start
            jax.block_until_ready(run.state)
            seconds = time.perf_counter() - start
        rows.append(
            {"variant": name, "step_us": 1e6 * seconds / steps, "host_us": 1e6 * host / steps, "tokens": tokens}
        )
        cache = run.state[2]  # the one before was donated
        print("{variant:16} step {step_us:7.1f} us, the host's part {host_us:7.1f}; {tokens}".format(**rows[-1]))
    for row, program in zip(rows, programs, strict=True):
        run = _Steps(program, params, [*state, cache], draws)
        run()
        row["device"] = timeline(run)
        cache = run.state[2]
        print(row["variant"], "on the device:", *(f"{name[:24]} {us:.0f}" for name, us in row["device"].items()))
    return rows


def main() -> None:
    """Checks and times the model at the batch sizes named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--sweep", nargs="*", choices=VARIANTS, help="time variants of a step instead; none for all")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"times a GPU, and this is a {jax.default_backend()}")
    record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if args.sweep is not None:
        record["rows"] = sweep(PAPER, args.context, args.steps, args.sweep or list(VARIANTS))
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
