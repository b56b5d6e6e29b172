"""Checks and times the kernels of `pallas_kernels.rms_norm` on a GPU: `python -m benchmarks.rms_norm --json OUT`.

The shapes are those of the 0.6B preset: heads of query and key, rotated, and the residual stream with a branch. For
each, milliseconds and bytes per second of memory, beside XLA's kernels for the same functions.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels import rms_norm
from parallax_jax import norm

SHAPES = {"query": (16, 128), "key": (8, 128), "stream": (1, 1024)}  # heads and their width


def passes(rotated: bool, kernel: bool):
    """Forward and backward as functions of (x, branch, scale, rotation, dout, dsum)."""

    def forward(x, branch, scale, rotation):
        if rotated:
            return None, norm.rms_norm(x, scale, 1e-6, rotation)
        return norm.residual_norm(x, branch, scale, 1e-6)

    def backward(x, branch, scale, rotation, dout, dsum):
        if kernel:
            call = functools.partial(rms_norm.backward, epsilon=1e-6, interpret=jax.default_backend() == "cpu")
            return call(x, scale, rotation if rotated else None, dout, None if rotated else dsum)
        both = lambda x, scale: forward(x, None, scale, rotation)
        return jax.vjp(both, x, scale)[1]((None if rotated else dsum, dout))

    return forward, backward


def operands(batch: int, seq_len: int, heads: int, width: int):
    """x, branch, scale, rotation, dout and dsum, bfloat16 where the model has it."""
    keys = jax.random.split(jax.random.key(0), 5)
    rows = [jax.random.normal(key, (batch, seq_len, heads, width), jnp.bfloat16) for key in keys[:4]]
    scale = 1 + 0.1 * jax.random.normal(keys[4], (width,))
    rotation = norm.rotary_embedding(jnp.arange(seq_len, dtype=jnp.int32)[None], width, 1e6)
    return rows[0], rows[1], scale, rotation, rows[2], rows[3]


def main():
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--elements", type=int, nargs="+", default=[rms_norm.ELEMENTS], help="of a tile, to compare")
    parser.add_argument("--json")
    args = parser.parse_args()
    by_kernel, rows = norm._by_kernel, []
    for name, (heads, width) in SHAPES.items():
        data = operands(args.batch, args.seq_len, heads, width)
        size = data[0].nbytes
        arrays = {"forward": 2 if heads > 1 else 4, "backward": 3 if heads > 1 else 4}
        expected = {}
        for kernel, elements in [(False, None), *((True, elements) for elements in args.elements)]:
            norm._by_kernel = by_kernel if kernel else lambda x: False
            rms_norm.ELEMENTS = elements
            for label, function in zip(arrays, passes(heads > 1, kernel), strict=True):
                run = jax.jit(function)
                given = data[:4] if label == "forward" else data
                results = run(*given)
                expected.setdefault(label, results)
                for a, b in zip(*map(jax.tree.leaves, (expected[label], results)), strict=True):
                    a, b = (np.asarray(x, np.float32) for x in (a, b))
                    if not np.abs(a - b).max() <= 2**-6 * np.abs(a).max():
                        raise RuntimeError(f"{name} {label}: differs from XLA by {np.abs(a - b).max()}")
                total = timing.milliseconds(run, *given)
                rows.append(
                    {"shape": name, "pass": label, "elements": elements, "ms": total}
                    | {"bytes_per_second": 1e3 * arrays[label] * size / total}
                )
                by = f"kernel, {elements}" if kernel else "XLA"
                print(f"{name:7} {label:9} {by:13} {total:8.4f} ms {rows[-1]['bytes_per_second'] / 1e12:6.2f} TB/s")
    if args.json:
        Path(args.json).write_text(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
