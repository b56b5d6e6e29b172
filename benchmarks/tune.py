"""Times launches of the Triton kernels on this device and writes its table: `python -m benchmarks.tune`.

Candidates are compiled side by side; one that spills registers or overflows shared memory is refused. The table goes to
pallas_kernels/tuned/, where `pallas_kernels.block_sizes` finds it.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib

# Read when the GPU backend starts: a kernel that spills does not compile.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels import block_sizes, blocks, device
from pallas_kernels.block_sizes import TritonPass
from pallas_kernels.triton.backward import backward
from pallas_kernels.triton.forward import forward
from parallax_jax import workloads

TUNED_FOR = {64: "d64_2x4096", 128: "train_2x4096", 256: "d256_2x4096"}
WARPS_AND_STAGES = ((4, 2), (4, 3), (8, 2), (8, 3))
TILES = ((128, 64), (64, 64), (64, 32), (32, 64), (32, 128), (128, 128), (16, 64), (32, 32))


def candidates(name: str, width: int) -> list[TritonPass]:
    """Launches worth compiling: those whose tiles fit the shared memory, with accumulators that fit the registers."""
    limit = block_sizes.shared_memory_limit(device.target()[1])
    found = []
    for (rows, keys), (warps, stages) in itertools.product(TILES, WARPS_AND_STAGES):
        launch = TritonPass(rows, keys, warps, stages)
        held = keys if name == "columns" else rows
        registers = 2 * held * width / (32 * warps) + 2 * rows * keys / (32 * warps)
        if registers <= 224 and block_sizes.triton_shared_memory(name, launch, 16, width) <= limit:
            found.append(launch)
    return found


def tune(width: int) -> dict[str, tuple[TritonPass, float, int]]:
    """Pass -> (fastest launch, milliseconds, candidates that compiled)."""
    workload = workloads.BY_NAME[TUNED_FOR[width]]
    *operands, cotangent = workload.operands(jnp.bfloat16)
    mask = blocks.Mask(jnp.int32(0))
    scale = workload.head_dim**-0.5
    fallback = block_sizes.triton_block_sizes("", 16, width, width)
    run_forward = lambda config: jax.jit(lambda *x: forward(*x, mask, scale=scale, config=config, interpret=False))
    residuals = run_forward(fallback.forward)(*operands)

    def run(name, config):
        if name == "forward":
            return run_forward(config)
        options = dict(scale=scale, block_sizes=dataclasses.replace(fallback, **{name: config}), interpret=False)
        return jax.jit(lambda *x: backward(*x, mask, *residuals, cotangent, **options))

    def compiled(item):
        try:
            return item, run(*item).lower(*operands).compile()
        except Exception:  # does not fit this device: that is what tuning finds out
            return item, None

    items = [(name, config) for name in ("forward", "rows", "columns") for config in candidates(name, width)]
    best = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, config), executable in pool.map(compiled, items):
            if executable is None:
                continue
            part = None if name == "forward" else f"backward_{name}"
            ms = timing.milliseconds(executable, *operands, iterations=5, kernel=part)
            print(f"width {width} {name:<8} {ms:7.3f} ms  {config}", flush=True)
            before = best.get(name, (None, float("inf"), 0))
            best[name] = (*min(before[:2], (config, ms), key=lambda x: x[1]), before[2] + 1)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, choices=TUNED_FOR, default=[64, 128, 256])
    parser.add_argument("--device", help="part of the device's name that the table is for; default: the whole name")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="default: the package's table of this device")
    options = parser.parse_args()
    kind = device.target()[1]
    name = options.device or kind
    if name not in kind:
        parser.error(f"--device: {name!r} is no part of this device's name, {kind!r}")
    table = {"device": name, "measured_on": kind, "jax": jax.__version__, "triton": {}, "milliseconds": {}}
    for width in options.widths:
        best = tune(width)
        table["triton"][f"16-bit {width}"] = {key: list(vars(x[0]).values()) for key, x in best.items()}
        table["milliseconds"][f"16-bit {width}"] = {key: round(x[1], 4) for key, x in best.items()}
    folder = pathlib.Path(block_sizes.__file__).parent / "tuned"
    path = options.json or folder / f"{name.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
