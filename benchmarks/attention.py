"""Times the operator beside every peer that is installed: `python -m benchmarks.attention`.

Prints, per workload and implementation, the time of the forward pass and of forward + backward, the rate, and the ratio
to the published Triton kernel (parallax-kernel) where that runs; for the accuracy workloads, errors against float64.
Rates count a product of causal attention as B N T T H floating-point operations (half of the dense 2 B N T T H); the
Parallax forward pass has four products and the softmax one has two, forward and backward 15 and 7 (in the two-pass
form, whatever an implementation really does).
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels import device
from parallax_jax import compare, parallax_attention, workloads
from parallax_jax.attention import BACKENDS

DEFAULT_WORKLOADS = [w.name for w in (*workloads.ACCURACY, *workloads.TRAINING)]
BASELINE = "parallax-kernel (Triton)"


def visible_pairs(workload: workloads.Workload) -> float:
    """Query-key pairs of one head and sequence, borders counted as a continuum."""
    queries, keys = workload.queries, workload.keys or workload.queries
    if workload.segments:
        queries, keys = queries / workload.segments, keys / workload.segments
    pairs = queries * keys * (0.5 if workload.is_causal else 1.0)
    if workload.window:
        pairs = workload.window * queries - workload.window**2 / 2
    return pairs * (workload.segments or 1)


def flops(workload: workloads.Workload, products: int) -> float:
    """Floating-point operations of so many products."""
    width = (workload.head_dim + (workload.value_dim or workload.head_dim)) / 2
    return products * 2 * workload.batch * workload.heads * visible_pairs(workload) * width


def softmax_peers(workload: workloads.Workload) -> dict:
    """Softmax attention from JAX packages: name -> function of query, key, value."""
    peers = {}
    if workload.segments or workload.window or workload.keys or jax.default_backend() != "gpu":
        return peers
    peers["softmax: cuDNN (jax.nn)"] = lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=workload.is_causal, implementation="cudnn"
    )
    try:
        from flash_attn3_jax import flash_mha
    except ImportError:
        return peers
    if workload.head_dim == 128:
        peers["softmax: FlashAttention-3"] = lambda q, k, v: flash_mha(q, k, v, is_causal=workload.is_causal)
    return peers


def torch_peers(names: list[str]) -> Iterator[dict]:
    """Rows of `benchmarks.torch_peers` as they come, from a process that ends before JAX needs the whole GPU."""
    command = [sys.executable, "-m", "benchmarks.torch_peers", *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peers:
        for line in peers.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if peers.returncode:
        print("torch peers: exit code", peers.returncode)


def compiled(attention, workload: workloads.Workload, num_operands: int):
    """The executables of the forward pass and of forward + backward, or the reason why there are none."""
    shapes = workload.shapes if num_operands == 4 else (workload.shapes[0], *workload.shapes[2:])
    *operands, cotangent = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (*shapes, workload.cotangent_shape))
    try:
        forward = jax.jit(attention).lower(*operands).compile()
        return forward, jax.jit(timing.with_gradients(attention)).lower(operands, cotangent).compile()
    except Exception as error:  # a peer may fail in any way, here or when it runs; the table says how
        return reason(error)


def reason(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def time_row(executables, workload: workloads.Workload, operands, cotangent, products: tuple[int, int]) -> dict:
    """Times one implementation; an error becomes the row's reason."""
    if isinstance(executables, str):
        return {"error": executables}
    forward, total = executables
    try:
        row = {
            "forward_ms": timing.milliseconds(forward, *operands),
            "total_ms": timing.milliseconds(total, operands, cotangent),
        }
    except Exception as error:
        return {"error": reason(error)}
    return row | rates(row, workload, products)


def rates(row: dict, workload, products: tuple[int, int]) -> dict:
    """TFLOP/s of the forward pass and of forward + backward."""
    return {
        f"{part}_tflops": flops(workload, count) / row[f"{part}_ms"] / 1e9
        for part, count in zip(("forward", "total"), products, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.split("\n\n")[0])
    platform, kind = device.target()
    native = [name for name, (_, platforms) in BACKENDS.items() if platform in platforms]
    parser.add_argument("--workloads", nargs="+", default=DEFAULT_WORKLOADS, metavar="NAME")
    parser.add_argument("--implementations", nargs="+", default=native, choices=[*BACKENDS, *compare.ROUTES])
    parser.add_argument("--no-peers", action="store_true", help="time this project alone")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    unknown = [name for name in options.workloads if name not in workloads.BY_NAME]
    if unknown:
        parser.error(f"--workloads: unknown {unknown[0]!r}, allowed are {', '.join(workloads.BY_NAME)}")

    rows, calls, accuracy = [], [], []

    def add(row: dict):
        """Prints a row and writes all so far."""
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        if options.json:
            report = dict(device=kind, jax=jax.__version__, dtype="bfloat16", rows=rows)
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    for name in options.workloads:
        workload = workloads.BY_NAME[name]
        if workload in workloads.ACCURACY:
            accuracy.append(workload)
            continue
        for implementation in options.implementations:
            options_of_call = compare.options_of(implementation, workload, jnp.bfloat16) | workload.options()
            attention = functools.partial(parallax_attention, **options_of_call)
            calls.append((implementation, workload, attention, 4))
        if not options.no_peers:
            calls += [(peer, workload, attention, 3) for peer, attention in softmax_peers(workload).items()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        executables = pool.map(lambda call: compiled(call[2], call[1], call[3]), calls)
        if not options.no_peers and platform == "gpu":  # their processes have the GPU while ours is compiled
            for row in torch_peers(options.workloads):
                products = (2, 7) if row["implementation"].startswith("softmax") else (4, 15)
                timed = "error" not in row and "out" not in row
                add(row | rates(row, workloads.BY_NAME[row["workload"]], products) if timed else row)
        executables = list(executables)
    for workload in accuracy:
        for implementation in options.implementations:
            found = compare.errors(implementation, workload, "bfloat16")
            add(dict(workload=workload.name, implementation=implementation) | found)
    for (name, workload, _, num_operands), pair in zip(calls, executables, strict=True):
        *operands, cotangent = workload.operands(jnp.bfloat16)
        if num_operands == 3:
            del operands[1]
        products = (4, 15) if num_operands == 4 else (2, 7)
        row = dict(workload=workload.name, implementation=name)
        add(row | time_row(pair, workload, operands, cotangent, products))
    print(f"{kind}, jax {jax.__version__}, bfloat16; ratio = time / {BASELINE}")
    print(
        f"{'workload':<16}{'implementation':<28}{'fwd ms':>9}{'TF/s':>7}{'ratio':>7}"
        f"{'fwd+bwd':>9}{'TF/s':>7}{'ratio':>7}"
    )
    baseline = {row["workload"]: row for row in rows if row["implementation"] == BASELINE and "error" not in row}
    for row in sorted(rows, key=lambda r: options.workloads.index(r["workload"])):
        line = f"{row['workload']:<16}{row['implementation']:<28}"
        if "error" in row:
            print(line + row["error"])
            continue
        if "out" in row:
            print(line + "  ".join(f"{result} {row[result]:.2e}" for result in compare.RESULTS))
            continue
        for part in ("forward", "total"):
            base = baseline.get(row["workload"])
            ratio = f"{row[part + '_ms'] / base[part + '_ms']:7.2f}" if base else " " * 7
            line += f"{row[part + '_ms']:9.3f}{row[part + '_tflops']:7.0f}{ratio}"
        print(line)


if __name__ == "__main__":
    main()
