"""Compiles the TPU kernels for TPUs that are not there: `python -m benchmarks.tpu_compile --topology v5e:2x2`.

Needs libtpu (`pip install libtpu`) and JAX_PLATFORMS=cpu, no TPU. Prints a Markdown table of what the compiler says:
the vector memory of each kernel, and floating-point operations, bytes and temporary memory of the whole program.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parallax_jax import parallax_attention, parallax_decode
from parallax_jax.workloads import Workload

ATTENTION = (
    Workload("d64", 1, 8192, 16, 64),
    Workload("d128", 1, 8192, 16, 128),
    Workload("d256", 1, 8192, 8, 256),
    Workload("gqa", 2, 4096, 16, 128, kv_heads=8),
    Workload("window", 1, 8192, 16, 128, window=1024),
    Workload("packed", 1, 8192, 16, 128, segments=8, layout="even"),
    Workload("ragged", 2, 2048, 4, 100, ragged=True, is_causal=False),
)
# Name -> (batch, new tokens, heads, kv heads, head width, capacity, page size).
DECODE = {
    "d64": (8, 1, 16, 8, 64, 8192, None),
    "d128": (8, 1, 16, 8, 128, 8192, None),
    "d256": (8, 1, 8, 8, 256, 8192, None),
    "mqa": (8, 1, 16, 1, 128, 8192, None),
    "speculative": (8, 4, 32, 8, 128, 8192, None),
    "pages_16": (8, 1, 16, 8, 128, 8192, 16),
    "pages_64": (8, 1, 16, 8, 128, 8192, 64),
    "prefill": (4, 512, 16, 8, 128, 4096, None),
}


@functools.cache
def tpu_mesh(topology: str) -> Mesh:
    """A mesh of one axis over the devices of a topology that is not there, such as "v5e:2x2"."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))


def compile_for(topology: str, function: Callable, *arguments) -> jax.stages.Compiled:
    """Compiles function(*arguments), given as shapes, for one device of a topology."""
    mesh = Mesh(tpu_mesh(topology).devices[:1], ("devices",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(place, arguments)).compile()


def kernels(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Name -> bytes of vector memory, of each TPU kernel in a program."""
    pattern = r"%(parallax_\w+?)[.\d]* = [^\n]*tpu_custom_call[^\n]*used_scoped_memory_configs\":\[([^\]]*)\]"
    sizes = {}
    for name, memory in re.findall(pattern, compiled.as_text()):
        found = re.search(r'"memory_space":"1"[^}]*"size":"(\d+)"', memory)
        sizes[name] = int(found[1]) if found else 0
    return sizes


def compile_attention(topology: str, workload: Workload, dtype=jnp.bfloat16) -> jax.stages.Compiled:
    """Compiles the loss's value and four gradients."""

    def loss(*operands):
        out = parallax_attention(*operands, implementation="mosaic_tpu", **workload.options())
        return jnp.sum(out.astype(jnp.float32))

    shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape in workload.shapes)
    return compile_for(topology, jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), *shapes)


def compile_decode(topology: str, name: str, dtype=jnp.bfloat16) -> jax.stages.Compiled:
    """Compiles a decode call of `DECODE`."""
    batch, new, heads, kv_heads, width, capacity, page_size = DECODE[name]
    pages = None if page_size is None else capacity // page_size
    query = jax.ShapeDtypeStruct((batch, new, heads, width), dtype)
    leading = (batch, capacity) if pages is None else (batch * pages, page_size)
    cache = jax.ShapeDtypeStruct((*leading, kv_heads, width), dtype)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    table = None if pages is None else jax.ShapeDtypeStruct((batch, pages), jnp.int32)
    call = lambda table, *x: parallax_decode(*x, page_table=table, implementation="mosaic_tpu")
    return compile_for(topology, call, table, query, query, cache, cache, lengths)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_compile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2", "v6e:2x2"])
    options = parser.parse_args()
    print("| topology | call | VMEM of each kernel, MiB | GFLOP | bytes, MiB | temporary, MiB |")
    print("|---|---|---|---|---|---|")
    for topology in options.topology:
        calls = [(f"train {w.name}", functools.partial(compile_attention, topology, w)) for w in ATTENTION]
        calls += [(f"decode {name}", functools.partial(compile_decode, topology, name)) for name in DECODE]
        for name, run in calls:
            compiled = run()
            memory = ", ".join(
                f"{kernel.removeprefix('parallax_')} {size / 2**20:.1f}" for kernel, size in kernels(compiled).items()
            )
            cost, temporary = compiled.cost_analysis(), compiled.memory_analysis().temp_size_in_bytes
            cells = (cost["flops"] / 1e9, cost["bytes accessed"] / 2**20, temporary / 2**20)
            print(f"| {topology} | {name} | {memory} | " + " | ".join(f"{x:.1f}" for x in cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
