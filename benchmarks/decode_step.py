"""A whole decode step of a language model with random weights: `python -m benchmarks.decode_step`.

First the fused step (`parallax_jax.step`) against the model's own blocks, on two layers; then the wall-clock time of
a token as generation runs it, several in a call of one compiled program, and with one in a call, beside the time that
one reading of weights and cache takes at the device's read bandwidth, and the kernels of a step. The model is the
paper's 0.6B (table 5). `--sweep` times variants of the step at batch 1 instead.
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
import numpy as np

from benchmarks.decode import read_bandwidth
from pallas_kernels.block_sizes import TritonDecodeBlockSizes
from pallas_kernels.mosaic_gpu import layer
from pallas_kernels.triton import projection
from parallax_jax import step
from parallax_jax.cache import KVCache, init_cache
from parallax_jax.model import ModelConfig, TransformerLM, unstack_layers
from parallax_jax.sampling import Draws, Sampling, decode_steps

PAPER = ModelConfig(151936, 28, 1024, 16, 8, 128, 3072, dtype="bfloat16", param_dtype="bfloat16")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(shape, dtype, deviation, key):
    return deviation * jax.random.normal(key, shape, dtype)


def random_parameters(config: ModelConfig):
    """Kernels as at the start of training, gains 1: drawn shape by shape, for one program that draws all is slow."""
    init = lambda key: nn.meta.unbox(TransformerLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    paths, tree = jax.tree.flatten_with_path(jax.eval_shape(init, jax.random.key(0)))

    def draw(path, x, key):
        return jnp.ones(x.shape, x.dtype) if path[-1].key == "scale" else _normal(x.shape, x.dtype, 0.02, key)

    keys = jax.random.split(jax.random.key(0), len(paths))
    return jax.tree.unflatten(tree, [draw(path, x, key) for (path, x), key in zip(paths, keys, strict=True)])


def model(config: ModelConfig, batch: int, context: int) -> tuple[ModelConfig, dict]:
    """The model with random parameters, laid out as generation does for so many sequences."""
    params, cache = random_parameters(config), jax.eval_shape(lambda: init_cache(config, batch, context))
    return (config, params) if step.takes_stacked(config, params, cache) else unstack_layers(config, params)


def random_cache(config: ModelConfig, batch: int, context: int, length: int) -> KVCache:
    """A cache that holds `length` tokens of each sequence."""
    cache = jax.eval_shape(lambda: init_cache(config, batch, context))
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
    config, params = model(config, batch, context)
    cache = random_cache(config, batch, context, context - 3)
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def logits(dtype: str):
        cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, tree)
        apply = TransformerLM(dataclasses.replace(config, dtype=dtype)).apply
        run = jax.jit(lambda params, cache: apply({"params": params}, tokens, cache=cache)[0])
        return run(cast(params), cast(cache))

    ours = logits("bfloat16")
    with mock.patch.object(step, "runs", lambda *_: False):
        blocks = logits("bfloat16")
        with jax.default_matmul_precision("highest"):
            exact = logits("float32")
    error = lambda x: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))
    return {"fused_error": error(ours), "blocks_error": error(blocks)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from a step as it is by default.

    Attributes:
      implementation: of the model; "triton" takes five kernels a block.
      stacked: whether the layers are.
      layer: constants of the one kernel, `pallas_kernels.mosaic_gpu.layer`.
      ahead: what kernels read ahead, where it is not `step.AHEAD`.
      launches: fields of the launches of a block's products, by their names in `step.AHEAD`.
      attention: fields of the launch of `append`.
      options: of XLA.
    """

    implementation: str | None = None
    stacked: bool = True
    layer: dict[str, int] = dataclasses.field(default_factory=dict)
    ahead: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    launches: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    attention: dict[str, int] = dataclasses.field(default_factory=dict)
    options: dict[str, int | bool] = dataclasses.field(default_factory=dict)

    def lower(self, config: ModelConfig, tokens: int, *arguments) -> jax.stages.Lowered:
        """Greedy steps of this variant, `tokens` in a call."""

        def launch(rows, weights, gated, residual):
            first = "down" if weights[0].shape[0] == config.mlp_width else "out"
            name = "gate" if gated else "in" if len(weights) > 1 else first
            return default(rows, weights, gated, residual)._replace(**self.launches.get(name, {}))

        heuristic = lambda *x: dataclasses.replace(append(*x), **self.attention)
        default, append = projection._launch, TritonDecodeBlockSizes.heuristic
        with (
            mock.patch.object(projection, "_launch", launch),
            mock.patch.object(TritonDecodeBlockSizes, "heuristic", heuristic),
            mock.patch.object(step, "AHEAD", step.AHEAD | self.ahead),
            mock.patch.dict(vars(layer), self.layer),
        ):
            jax.clear_caches()
            config = dataclasses.replace(config, implementation=self.implementation)
            return decode_steps.lower(config, Sampling(temperature=0), tokens, *arguments)


@dataclasses.dataclass
class Steps:
    """A compiled call of some steps and what it goes on from.

    Attributes:
      program: the call.
      tokens: that it draws of each sequence.
      params: the model's.
      state: cache, last tokens, and whether they end their sequences.
      draws: what tokens are drawn by.
    """

    program: jax.stages.Compiled
    tokens: int
    params: dict
    state: list
    draws: Draws

    def __call__(self) -> jax.Array:
        """Goes on; returns the tokens, which the device may still be computing."""
        drawn, *self.state = self.program(self.params, *self.state, np.int32(self.tokens), self.draws)
        return drawn

    def time(self, calls: int) -> dict[str, float]:
        """Microseconds of a token, and of the host to start a call; `stream` too fetches tokens a call behind."""
        for _ in range(2):  # the first round warms up
            ahead, host = self(), 0.0
            jax.block_until_ready(self.state)
            start = time.perf_counter()
            for _ in range(calls):
                before = time.perf_counter()
                ahead, ready = self(), ahead
                host += time.perf_counter() - before
                jax.device_get(ready)
            jax.block_until_ready(self.state)
            seconds = time.perf_counter() - start
        return {"step_us": 1e6 * seconds / calls / self.tokens, "host_us_a_call": 1e6 * host / calls}

    def timeline(self) -> dict[str, float]:
        """Microseconds of a step on the device, by kernel: from the end of the kernel before to the kernel's own.

        "idle" is the time in which no kernel ran, "total" the sum; under the profiler XLA launches kernels one by one,
        not as a graph, so the host may be what they wait for. All 0 where the profiler sees no kernel.
        """
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                jax.block_until_ready(self())
            (path,) = Path(folder).rglob("*.xplane.pb")
            planes = [plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes if "GPU" in plane.name]
            streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
            events = sorted((e.start_ns + e.duration_ns, e.start_ns, e.name) for line in streams for e in line.events)
        times, last = collections.Counter(), events[0][0] if events else 0
        for end, start, name in events[1:]:
            times["idle"] += max(start - last, 0)
            times[name] += end - max(start, last)
            last = end
        times = {name: time / self.tokens / 1e3 for name, time in times.most_common()}
        return {"total": sum(times.values())} | times


def beginning(config: ModelConfig, batch: int) -> tuple[list, Draws]:
    """What a run goes on from, but for the cache: last tokens, and whether they end; and what the next are drawn by."""
    draws = Draws(jax.random.split(jax.random.key(0), batch), jnp.full(1, -1, jnp.int32), jnp.int32(config.vocab_size))
    return [jnp.ones(batch, jnp.int32), jnp.zeros(batch, bool)], draws


def rewound(state: list, length: int) -> list:
    """`state` with `length` tokens of each sequence in the cache."""
    cache, *rest = state
    return [dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, length)), *rest]


def short(times: dict[str, float], least: float = 2.0) -> str:
    """The larger of the times, for a line of text."""
    return ", ".join(f"{name[:20]} {us:.0f}" for name, us in times.items() if us >= least)


def bench(config: ModelConfig, batch: int, context: int, bandwidth: float, tokens: int, calls: int) -> dict:
    """Times greedy decoding that ends before `context` tokens: `tokens` a call, and one a call."""
    config, params = model(config, batch, context)
    cache = random_cache(config, batch, context, context)
    sizes = {"weight_bytes": params, "cache_bytes": (cache.key, cache.value)}
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}
    rest, draws = beginning(config, batch)
    results, drawn = {}, {}
    for number in (tokens, 1):
        state = rewound([cache, *rest], context - (2 * calls + 4) * tokens)
        before = time.perf_counter()
        program = Variant().lower(config, number, params, *state, np.int32(0), draws).compile()
        seconds = time.perf_counter() - before
        run = Steps(program, number, params, state, draws)
        drawn[number] = np.concatenate([run() for _ in range(tokens // number)])
        results[number] = {"compile_seconds": seconds} | run.time(calls)
        if number == tokens:
            results[number]["device"] = run.timeline()
        cache = run.state[0]  # the one before was donated
    floor = 1e6 * sum(sizes.values()) / bandwidth
    return {
        "attention": config.attention,
        "batch": batch,
        "context": context,
        "fused": step.runs(config, params, rest[0][:, None], cache),
        "stacked": config.scan_layers,
        **sizes,
        "tokens_per_call": tokens,
        **results[tokens],
        "alone": results[1],
        "same_tokens": bool((drawn[1] == drawn[tokens]).all()),
        "floor_us": floor,
        "over_floor": results[tokens]["step_us"] / floor,
        "tokens_per_second": 1e6 * batch / results[tokens]["step_us"],
    }


FIVE = functools.partial(Variant, "triton", False)
VARIANTS = {
    "default": Variant(),
    "one_under_way": Variant(layer={"UNDER_WAY": 1}),
    "three_under_way": Variant(layer={"UNDER_WAY": 3}),
    "eight_slots": Variant(layer={"SLOTS": 8}),
    "a_kernel_a_block": Variant(stacked=False),
    "five": FIVE(),
    "five_no_pdl": FIVE(options={"xla_gpu_enable_pdl": False}),
    "five_nothing_ahead": FIVE(ahead=dict.fromkeys(step.AHEAD, ())),
    "five_in_vector_8": FIVE(launches={"in": {"vector": 8}}),
    "five_splits_8": FIVE(attention={"num_splits": 8, "num_stages": 5}),
}


def sweep(config: ModelConfig, context: int, tokens: int, calls: int, names: list[str]) -> list[dict]:
    """Times steps of one sequence with the variants named, compiled at once."""
    rest, draws = beginning(config, 1)
    params, layouts = random_parameters(config), {}
    for stacked in (True, False):
        layout, weights = (config, params) if stacked else unstack_layers(config, params)
        layouts[stacked] = layout, weights, random_cache(layout, 1, context, context)
    lowered = []
    for name in names:
        layout, weights, cache = layouts[VARIANTS[name].stacked]
        lowered.append(VARIANTS[name].lower(layout, tokens, weights, cache, *rest, np.int32(0), draws))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compile = lambda name, x: x.compile(compiler_options=VARIANTS[name].options)
        programs = list(pool.map(compile, names, lowered))
    rows = []
    for name, program in zip(names, programs, strict=True):
        layout, params, cache = layouts[VARIANTS[name].stacked]
        state = rewound([cache, *rest], context - (2 * calls + 4) * tokens)
        run = Steps(program, tokens, params, state, draws)
        drawn = np.asarray(run())[:8, 0].tolist()
        rows.append({"variant": name, **run.time(calls), "device": run.timeline(), "tokens": drawn})
        layouts[VARIANTS[name].stacked] = layout, params, run.state[0]  # the cache before was donated
        print("{variant:16} step {step_us:6.0f} us, the host's part of a call {host_us_a_call:6.0f}".format(**rows[-1]))
        print(f"  on the device: {short(rows[-1]['device'])}; tokens {drawn[:4]}", flush=True)
    return rows


def main() -> None:
    """Checks and times the model at the batch sizes named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each sequence in a call")
    parser.add_argument("--calls", type=int, default=8, help="calls that are timed")
    parser.add_argument("--sweep", nargs="*", choices=VARIANTS, help="time variants of a step instead; none for all")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"times a GPU, and this is a {jax.default_backend()}")
    record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    if args.sweep is not None:
        record["rows"] = sweep(PAPER, args.context, args.tokens, args.calls, args.sweep or list(VARIANTS))
    else:
        bandwidth = record["read_bandwidth"] = read_bandwidth()
        print(f"{record['device']}, jax {jax.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
        for batch in args.batch:
            row = check(PAPER, batch, min(args.context, 512))
            print(f"batch {batch}: relative errors against float32 {row}", flush=True)
            row |= bench(PAPER, batch, args.context, bandwidth, args.tokens, args.calls)
            record["rows"].append(row)
            print(
                "batch {batch} context {context}, {tokens_per_call} tokens a call: {step_us:.0f} us a token, "
                "{over_floor:.2f} x the {floor_us:.0f} us that reading takes, {tokens_per_second:.0f} tokens/s; "
                "the host's part of a call {host_us_a_call:.0f} us".format(**row)
            )
            print(
                "  one token a call: {alone[step_us]:.0f} us, the host's part {alone[host_us_a_call]:.0f} us; "
                "same tokens: {same_tokens}; fused: {fused}; compiled in {compile_seconds:.1f} s".format(**row)
            )
            print(f"  on the device: {short(row['device'])}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
