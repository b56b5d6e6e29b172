"""Times one long sequence split over the GPUs of a host: `python -m benchmarks.context`.

Forward and backward of a causal call, in bfloat16, on 1, 2, 4, ... devices: seconds by the clock, for they hold
communication that no one kernel's time shows, the speed relative to one device, and the rate of each device. A rate
counts 15 products of B N T T H floating-point operations, as `benchmarks.attention` does. A short sequence is first
compared with the same call on one device.

    python -m benchmarks.context --lengths 32768 131072 --json context.json
    JAX_NUM_CPU_DEVICES=4 python -m benchmarks.context --lengths 512  # emulated devices: the code, not the times
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.timing import with_gradients
from pallas_kernels import device
from parallax_jax import compare, parallax_attention

PRODUCTS = 15
CHECKED_TOKENS_PER_DEVICE = 512
_ENOUGH = 2.0  # seconds of measured calls, where the fewest do not take longer
_CALLS = 3, 20  # fewest and most


def mesh_of(count: int) -> Mesh:
    """The first devices, along the axis that splits sequences."""
    return jax.make_mesh((count,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def operands(mesh: Mesh, length: int, options) -> tuple:
    """Query, probe, key, value and the output's cotangent, made where they lie."""
    shape = lambda heads: (options.batch, length, heads, options.head_dim)
    heads, kv_heads = options.heads, options.kv_heads or options.heads
    shapes = [shape(heads), shape(heads), shape(kv_heads), shape(kv_heads), shape(heads)]
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw():
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

    *inputs, cotangent = draw()
    return tuple(inputs), cotangent


def compiled(mesh: Mesh, length: int, options):
    """The call on a mesh, ready to run, and its operands."""
    attention = functools.partial(parallax_attention, implementation=options.implementation)
    arguments = operands(mesh, length, options)
    with jax.set_mesh(mesh):
        return jax.jit(with_gradients(attention)).lower(*arguments).compile(), arguments


def check(count: int, options) -> dict[str, float]:
    """Relative differences from one device; raises AssertionError where they are more than rounding."""
    length = CHECKED_TOKENS_PER_DEVICE * count if jax.default_backend() == "gpu" else 16 * count
    results = []
    for mesh in (mesh_of(1), mesh_of(count)):
        call, arguments = compiled(mesh, length, options)
        out, gradients = jax.device_get(call(*arguments))
        results.append((out, *gradients))
    errors = {
        name: float(compare.relative_error(many, one))
        for name, one, many in zip(compare.RESULTS, *results, strict=True)
    }
    assert max(errors.values()) < 1e-2, f"{count} devices differ from one: {errors}"
    return errors


def measure(count: int, length: int, options) -> dict:
    """Median seconds of a call on so many devices, or why there are none."""
    row = {"length": length, "devices": count}
    try:
        call, arguments = compiled(mesh_of(count), length, options)
        jax.block_until_ready(call(*arguments))
        seconds = []
        while len(seconds) < _CALLS[0] or (sum(seconds) < _ENOUGH and len(seconds) < _CALLS[1]):
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:  # out of memory, most of all
        return row | {"error": str(error).splitlines()[0][:160]}
    flops = PRODUCTS * options.batch * options.heads * length**2 * options.head_dim
    row["seconds"] = statistics.median(seconds)
    row["tflops_per_device"] = flops / row["seconds"] / count / 1e12
    row["temporary_bytes_per_device"] = call.memory_analysis().temp_size_in_bytes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__.split("\n\n")[0])
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072] if on_gpu else [512])
    parser.add_argument("--devices", type=int, default=jax.device_count(), help="the most; 1, 2, 4, ... are timed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="as many as heads unless given")
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 32)
    parser.add_argument("--implementation", help="the fastest unless given")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.devices > jax.device_count():
        parser.error(f"--devices: {options.devices} wanted, {jax.device_count()} here")
    counts = sorted({2**i for i in range(options.devices.bit_length())} | {options.devices})

    _, kind = device.target()
    errors = {count: check(count, options) for count in counts[1:]}
    if errors:
        print(f"largest relative difference from one device: {max(max(e.values()) for e in errors.values()):.1e}")
    print(f"{kind}, jax {jax.__version__}, B={options.batch} N={options.heads} H={options.head_dim}, bfloat16, causal")
    print(f"{'tokens':>9}{'devices':>9}{'fwd+bwd ms':>12}{'speed-up':>10}{'TF/s each':>11}{'temp GiB each':>15}")
    rows, alone = [], {}
    for length in options.lengths:
        for count in counts:
            row = measure(count, length, options)
            rows.append(row)
            if "error" in row:
                print(f"{length:9}{count:9}  {row['error']}", flush=True)
                continue
            if count == 1:
                alone[length] = row["seconds"]
            if length in alone:
                row["speedup"] = alone[length] / row["seconds"]
            print(
                f"{length:9}{count:9}{1e3 * row['seconds']:12.2f}{row.get('speedup', float('nan')):10.2f}"
                f"{row['tflops_per_device']:11.1f}{row['temporary_bytes_per_device'] / 2**30:15.2f}",
                flush=True,
            )
    if options.json:
        shape = {name: getattr(options, name) for name in ("batch", "heads", "kv_heads", "head_dim", "implementation")}
        report = {"device": kind, "jax": jax.__version__, "dtype": "bfloat16", **shape, "errors": errors, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
