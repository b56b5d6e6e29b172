"""Times launches of the Triton kernels on this device, by both routes, and writes its table.

`python -m benchmarks.tune` compiles candidates side by side; one that does not fit the device is refused. The table,
launches and times by which a route is chosen, goes to pallas_kernels/tuned/, where `pallas_kernels.block_sizes` finds
it.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys

# Read when the GPU backend starts: a Pallas kernel that spills does not compile.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.decode import LAUNCHED_BY
from pallas_kernels import block_sizes, blocks, device, triton_routes
from pallas_kernels.block_sizes import TritonPass
from parallax_jax import parallax_decode, workloads

TUNED_FOR = {64: "d64_2x4096", 128: "train_2x4096", 256: "d256_2x4096"}
PASSES = ("forward", "rows", "columns", "decode")
WARPS_AND_STAGES = ((4, 2), (4, 3), (8, 2), (8, 3))
TILES = ((128, 64), (64, 64), (64, 32), (32, 64), (32, 128), (128, 128), (16, 64), (32, 32))
# In the Triton language at width 128: those whose main loop does not spill, by ptxas for sm_90.
LANG_128 = {
    "forward": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4))
    + ((128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2)),
    "rows": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4))
    + ((32, 64, 4, 2),),
    "columns": ((32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2))
    + ((64, 128, 8, 2), (16, 64, 4, 3), (16, 64, 4, 4)),
}


def candidates(backend: str, name: str, width: int) -> list[TritonPass]:
    """Launches worth compiling: tiles that fit the shared memory, accumulators that fit the registers, and no warp with
    fewer rows of an accumulator than the 16 of a matrix instruction: such launches took 1.5 to 6 times as long."""
    if backend == "triton_lang" and width == 128:
        return [TritonPass(*launch) for launch in LANG_128[name]]
    limit = block_sizes.shared_memory_limit(device.target()[1])
    found = []
    for (rows, keys), (warps, stages) in itertools.product(TILES, WARPS_AND_STAGES):
        launch = TritonPass(rows, keys, warps, stages)
        held = keys if name == "columns" else rows
        registers = 2 * held * width / (32 * warps) + 2 * rows * keys / (32 * warps)
        fits = registers <= 224 and block_sizes.triton_shared_memory(name, launch, 16, width) <= limit
        if fits and held >= 16 * warps:
            found.append(launch)
    return found


def functions(backend: str):
    """(forward, backward) with explicit launches."""
    module = triton_routes.load(triton_routes.ROUTES[backend])
    if isinstance(module, str):
        sys.exit(f"{backend}: {module}")
    options = {"interpret": False} if backend == "triton" else {}
    passes = (sys.modules[f"{module.__name__}.{name}"] for name in ("forward", "backward"))
    return tuple(functools.partial(getattr(x, x.__name__.rpartition(".")[2]), **options) for x in passes)


def tune(backend: str, width: int, passes: list[str]) -> dict[str, tuple[TritonPass, float]]:
    """Pass -> (fastest launch, milliseconds)."""
    forward, backward = functions(backend)
    workload = workloads.BY_NAME[TUNED_FOR[width]]
    *operands, cotangent = workload.operands(jnp.bfloat16)
    mask = blocks.Mask(jnp.int32(0))
    scale = workload.head_dim**-0.5
    fallback = getattr(block_sizes, f"{backend}_block_sizes")("", 16, width, width)
    run_forward = lambda config: jax.jit(lambda *x: forward(*x, mask, scale=scale, config=config))
    residuals = run_forward(fallback.forward)(*operands)

    def run(name, config):
        if name == "forward":
            return run_forward(config)
        options = dict(scale=scale, block_sizes=dataclasses.replace(fallback, **{name: config}))
        return jax.jit(lambda *x: backward(*x, mask, *residuals, cotangent, **options))

    def compiled(item):
        try:
            if item[0] == "columns":  # a loop over heads that share keys may spill where this workload does not
                shared = [*operands[:2], *(x[:, :, ::2] for x in operands[2:])]
                run(*item).lower(*shared).compile()
            executable = run(*item).lower(*operands).compile()
            jax.block_until_ready(executable(*operands))  # jax-triton's kernels are assembled when first run
            return item, executable
        except Exception as error:  # does not fit this device: that is what tuning finds out
            return item, str(error).splitlines()[0]

    items = [(name, config) for name in passes for config in candidates(backend, name, width)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        executables = list(pool.map(compiled, items))
    best = {}
    for (name, config), executable in executables:
        if isinstance(executable, str):
            print(f"{backend} {width} {name:<8} refused   {config}: {executable[:80]}", flush=True)
            continue
        part = None if name == "forward" else f"backward_{name}"
        ms = timing.milliseconds(executable, *operands, iterations=5, kernel=part)
        print(f"{backend} {width} {name:<8} {ms:7.3f} ms  {config}", flush=True)
        best[name] = min(best.get(name, (None, float("inf"))), (config, ms), key=lambda x: x[1])
    return best


def decode_milliseconds(backend: str, width: int) -> float:
    """Time of two decode steps, one that fills the device with sequences and one that must split the keys."""
    total = 0.0
    for batch, length in ((32, 4096), (1, 16384)):
        shapes = [(batch, 1, 8, width)] * 2 + [(batch, length, 8, width)] * 2
        keys = jax.random.split(jax.random.key(0), 4)
        operands = [jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)]
        lengths = jnp.full(batch, length, jnp.int32)
        query, _, key, value = operands
        sizes = LAUNCHED_BY[backend].heuristic(query, key, value, blocks.Mask(None, lengths), None)
        step = functools.partial(parallax_decode, implementation="triton", block_sizes=sizes)
        ms = timing.milliseconds(jax.jit(step), *operands, lengths)
        print(f"{backend} {width} decode   {ms:7.4f} ms  batch {batch}, {length} keys: {sizes}", flush=True)
        total += ms
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, choices=TUNED_FOR, default=[64, 128, 256])
    parser.add_argument("--backends", nargs="+", choices=triton_routes.ROUTES, default=[*triton_routes.ROUTES])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=[*PASSES])
    parser.add_argument("--device", help="part of the device's name that the table is for; default: the whole name")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="default: the package's table of this device")
    options = parser.parse_args()
    kind = device.target()[1]
    name = options.device or kind
    if name not in kind:
        parser.error(f"--device: {name!r} is no part of this device's name, {kind!r}")
    table = {"device": name, "measured_on": kind, "jax": jax.__version__, "milliseconds": {}}
    for backend in options.backends:
        table[backend], times = {}, {}
        for width in options.widths:
            key = f"16-bit {width}"
            best = tune(backend, width, [x for x in options.passes if x != "decode"])
            times[key] = {x: round(ms, 4) for x, (_, ms) in best.items()}
            if "decode" in options.passes:
                times[key]["decode"] = round(decode_milliseconds(backend, width), 4)
            if len(best) == 3:
                table[backend][key] = {x: list(vars(launch).values()) for x, (launch, _) in best.items()}
        table["milliseconds"][backend] = times
    folder = pathlib.Path(block_sizes.__file__).parent / "tuned"
    path = options.json or folder / f"{name.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
