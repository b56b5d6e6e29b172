"""Errors of every implementation against the reference: `python -m parallax_jax.compare`.

Prints a table of relative Frobenius errors of the output and the four gradients, against the reference in float64 on
the same inputs. The exit code is 1 when an error is over its bound.
"""

import argparse
import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device
from pallas_kernels.block_sizes import triton_block_sizes, triton_lang_block_sizes
from parallax_jax import workloads
from parallax_jax.attention import BACKENDS, parallax_attention
from parallax_jax.reference import parallax_reference

DEFAULT_WORKLOADS = [w.name for w in (*workloads.CONFORMANCE, *workloads.ACCURACY)]
RESULTS = ("out", "dquery", "dprobe", "dkey", "dvalue")

# What `--implementations` takes beside the implementations: the two routes of "triton", named by their block sizes.
ROUTES = {"triton_pallas": triton_block_sizes, "triton_lang": triton_lang_block_sizes}

# (output, gradients). float16 has three more bits than bfloat16.
BOUNDS = {
    "bfloat16": (3.5e-3, 5e-3),
    "float16": (4.5e-4, 6.5e-4),
    "float32": (2e-5, 2e-5),
    "float64": (1e-13, 1e-13),
}
# XLA sums each row in one reduction. The Hopper kernels keep weights in 16 bits between products, which costs bfloat16
# nothing but is one more rounding of float16: over the seven keys of the smallest workload, 6.6e-4.
BOUNDS_OF = {("xla", "float32"): (2e-6, 1e-5), ("mosaic_gpu", "float16"): (4.5e-4, 7e-4)}

# Results that cancel to nothing (a row with one key has no query gradient) have no relative error: an element of the
# expected result counts with at least this size, where inputs are standard normal.
SMALLEST_ELEMENT = 0.1


def bounds(implementation: str, dtype) -> tuple[float, float]:
    """Largest allowed error of (the output, each gradient)."""
    name = jnp.dtype(dtype).name
    return BOUNDS_OF.get((implementation, name), BOUNDS[name])


def options_of(implementation: str, workload: workloads.Workload, dtype) -> dict:
    """Options of `parallax_attention` that take an implementation, or one of `ROUTES`."""
    if implementation not in ROUTES:
        return dict(implementation=implementation)
    query, _, _, value = workload.shapes
    sizes = ROUTES[implementation](device.target()[1], 8 * jnp.dtype(dtype).itemsize, query[-1], value[-1])
    return dict(implementation="triton", block_sizes=sizes)


def relative_error(result, expected) -> float:
    """Frobenius norm of the difference over that of `expected`; infinite where the result is not finite."""
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    if not np.isfinite(result).all():
        return float("inf")
    floor = SMALLEST_ELEMENT * np.sqrt(expected.size)
    return float(np.linalg.norm(result - expected) / max(np.linalg.norm(expected), floor))


def value_and_gradients(attention, operands, cotangent) -> tuple[jax.Array, ...]:
    """(out, dquery, dprobe, dkey, dvalue) of attention(*operands)."""

    def run(operands, cotangent):
        out, vjp = jax.vjp(attention, *operands)
        return out, *vjp(cotangent)

    return jax.jit(run)(operands, cotangent)


def expected(workload: workloads.Workload, dtype, seed: int = 0) -> tuple[np.ndarray, ...]:
    """What `value_and_gradients` should give, from the reference in float64 on the CPU."""
    operands = [np.asarray(x, np.float64) for x in workload.operands(dtype, seed)]
    options = {k: np.asarray(v) if isinstance(v, jax.Array) else v for k, v in workload.options(seed).items()}
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        *operands, cotangent = (jnp.asarray(x) for x in operands)
        attention = lambda *x: parallax_reference(*x, **options)
        return tuple(np.asarray(x) for x in value_and_gradients(attention, operands, cotangent))


def errors(implementation: str, workload: workloads.Workload, dtype, seed: int = 0, **options) -> dict[str, float]:
    """Error of each of `RESULTS`. `options` go to `parallax_attention`."""
    *operands, cotangent = workload.operands(dtype, seed)
    options = options_of(implementation, workload, dtype) | workload.options(seed) | options
    attention = lambda *x: parallax_attention(*x, **options)
    results = value_and_gradients(attention, operands, cotangent)
    for name, result, operand in zip(RESULTS[1:], results[1:], operands, strict=True):
        assert result.dtype == operand.dtype and result.shape == operand.shape, name
    return {
        name: relative_error(x, y) for name, x, y in zip(RESULTS, results, expected(workload, dtype, seed), strict=True)
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m parallax_jax.compare", description=__doc__.split("\n\n")[0])
    platform, kind = device.target()
    native = [name for name, (_, platforms) in BACKENDS.items() if platform in platforms]
    native = [x for name in native for x in (ROUTES if name == "triton" else [name])]
    names = [*BACKENDS, *ROUTES]
    parser.add_argument("--implementations", nargs="+", choices=names, default=native, help=f"default: {native}")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--workloads", nargs="+", default=DEFAULT_WORKLOADS, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the errors here")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.workloads if name not in workloads.BY_NAME]
    if unknown:
        parser.error(f"--workloads: unknown {unknown[0]!r}, allowed are {', '.join(workloads.BY_NAME)}")

    print(f"{kind} ({platform}), jax {jax.__version__}: relative Frobenius error against float64")
    print(f"{'implementation':<15}{'dtype':<10}{'workload':<16}" + "".join(f"{name:>10}" for name in RESULTS))
    rows, refused, over = [], {}, 0
    for implementation in options.implementations:
        for dtype in options.dtypes:
            allowed = bounds(implementation, dtype)
            for name in options.workloads:
                row = dict(implementation=implementation, dtype=dtype, workload=name)
                try:
                    found = errors(implementation, workloads.BY_NAME[name], dtype, options.seed)
                except NotImplementedError as error:
                    refused.setdefault(f"{implementation}: {error}", []).append(f"{name} in {dtype}")
                    continue
                passed = all(e <= allowed[min(i, 1)] for i, e in enumerate(found.values()))
                over += not passed
                rows.append(row | found | {"passed": passed})
                cells = "".join(f"{e:>10.1e}" for e in found.values())
                print(f"{implementation:<15}{dtype:<10}{name:<16}{cells}{'' if passed else '  over'}", flush=True)
    for reason, calls in refused.items():
        print(f"not run ({len(calls)}, such as {calls[0]}): {reason}")
    print(f"{len(rows)} compared, {over} over their bound, {sum(map(len, refused.values()))} not supported")
    if options.json:
        report = dict(device=kind, platform=platform, jax=jax.__version__, seed=options.seed, rows=rows)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if over or not rows else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated.*")
    sys.exit(main())
