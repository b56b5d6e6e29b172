"""Decode timings beside every peer that is installed: `python -m benchmarks.decode [SET ...] [--json PATH]`.

Sums of GPU kernel times by CUPTI, all in one process on one GPU. Peers: the published CuTe and Triton kernels of
Parallax (parallax-kernel), and softmax decode by cuDNN (jax.nn) and FlashAttention-3 (flash-attn3-jax), the best of
its split counts. A ratio above 1 says that the peer takes longer.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp

from benchmarks.timing import jax_kernels, torch_kernels
from pallas_kernels.block_sizes import TritonDecodeBlockSizes
from pallas_kernels.blocks import Mask
from pallas_kernels.triton.decode import heuristic
from parallax_jax import parallax_decode


@dataclasses.dataclass(frozen=True)
class Shape:
    """One new token for each of `batch` sequences of `length` keys."""

    batch: int
    length: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int | None = None

    @property
    def bytes(self) -> int:
        """Keys and values, bfloat16."""
        return 4 * self.batch * self.length * self.kv_heads * self.head_dim

    def __str__(self):
        page = f" page {self.page_size}" if self.page_size else ""
        return f"B {self.batch} L {self.length} heads {self.heads}:{self.kv_heads} D {self.head_dim}{page}"


def paper_grid() -> list[Shape]:
    """The paper's grid, one kv head a row: batch x heads 1 to 2048, context 128 to 32768, D 64 and 128."""
    rows, lengths = [2**i for i in range(12)], [2**i for i in range(7, 16)]
    return [
        Shape(max(1, r // 8), length, min(r, 8), min(r, 8), d)
        for d, length, r in itertools.product((64, 128), lengths, rows)
    ]


SETS = {
    "main": [Shape(b, length) for b in (1, 32) for length in (512, 1024, 4096, 16384)],
    "single": [Shape(1, length) for length in (512, 1024, 4096, 16384)],
    "gqa": [Shape(32, 4096, h, k) for h, k in ((8, 8), (32, 8), (16, 8), (64, 8), (8, 1))],
    "paged": [Shape(32, 4096, page_size=p) for p in (None, 16, 64, 256)]
    + [Shape(1, 16384, page_size=p) for p in (None, 64)],
    "long": [Shape(1, 131072), Shape(4, 131072), Shape(8, 65536)],
    "paper": paper_grid(),
}


def draw(shape: Shape):
    """Query, probe, caches (standard normal, bfloat16), lengths and page table of `parallax_decode`."""
    rows = (shape.batch, 1, shape.heads, shape.head_dim)
    if shape.page_size is None:
        cache, table = (shape.batch, shape.length, shape.kv_heads, shape.head_dim), None
    else:
        pages = shape.length // shape.page_size
        cache = (shape.batch * pages, shape.page_size, shape.kv_heads, shape.head_dim)
        order = jax.random.permutation(jax.random.key(1), shape.batch * pages)
        table = order.astype(jnp.int32).reshape(shape.batch, pages)
    keys = jax.random.split(jax.random.key(0), 4)
    operands = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, (rows, rows, cache, cache), strict=True)]
    return *operands, jnp.full(shape.batch, shape.length, jnp.int32), table


def ours(implementation: str, block_sizes=None) -> Callable:
    """The function of `draw`'s results to time."""

    def decode(query, probe, key, value, lengths, table):
        options = dict(page_table=table, implementation=implementation, block_sizes=block_sizes)
        return parallax_decode(query, probe, key, value, lengths, **options)

    return decode


def cudnn(shape: Shape) -> list[Callable]:
    """Softmax decode by cuDNN."""
    return [lambda query, _, key, value, *__: jax.nn.dot_product_attention(query, key, value, implementation="cudnn")]


def flash_attention_3(shape: Shape) -> list[Callable]:
    """Softmax decode by FlashAttention-3, with every split count that may be its fastest."""
    from flash_attn3_jax import flash_mha_with_kvcache

    if shape.head_dim != 128:
        raise NotImplementedError("128 only")

    def decode(splits, query, _, key, value, lengths, __):
        return flash_mha_with_kvcache(query, key, value, cache_seqlens=lengths, num_splits=splits)

    most = max(1, 264 // (shape.batch * shape.kv_heads))
    splits = [s for s in (1, 2, 4, 8, 16, 32) if s == 1 or (shape.length // s >= 128 and most / 6 <= s <= most)]
    return [functools.partial(decode, s) for s in splits]


def torch_operands(shape: Shape):
    """Operands as torch tensors."""
    import torch

    normal = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    rows = (shape.batch, 1, shape.heads, shape.head_dim)
    cache = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
    return normal(*rows), normal(*rows), normal(*cache), normal(*cache)


def published_cute(shape: Shape):
    """The published CuTe kernel, Hopper."""
    import parallax.cute

    # The package rebinds the module's name to a function.
    module = sys.modules[f"{parallax.cute.__name__}.parallax_decode"]
    operands = torch_operands(shape)
    return torch_kernels(lambda: module.parallax_attn_with_kvcache(*operands))


def published_triton(shape: Shape):
    """The published Triton kernel."""
    from parallax.triton import parallax_decode as published

    operands = torch_operands(shape)
    return torch_kernels(lambda: published(*operands))


TORCH_PEERS = {"cute": published_cute, "published_triton": published_triton}
JAX_PEERS = {"cudnn": cudnn, "fa3": flash_attention_3}
PEERS = [*TORCH_PEERS, *JAX_PEERS]


def read_bandwidth() -> float:
    """Bytes per second of a read-only pass over 4 GiB."""
    x = jnp.ones((1 << 31,), jnp.bfloat16)
    time, _ = jax_kernels(lambda x: jnp.max(x), x, iterations=5)
    return x.nbytes / time * 1e6


def compile_all(shapes: list[Shape], peers: list[str]) -> dict:
    """(shape, name) -> its compiled calls, side by side: a list, or the reason why there is none."""

    def compiled(job):
        shape, name = job
        try:
            if name in JAX_PEERS:
                calls = [] if shape.page_size else JAX_PEERS[name](shape)
            else:
                calls = [ours(name)]
            args = jax.eval_shape(functools.partial(draw, shape))
            return [jax.jit(call).lower(*args).compile() for call in calls]
        except Exception as error:  # a peer that cannot run this shape costs its column, not the table
            return repr(error)[:200]

    jobs = [(shape, name) for shape in shapes for name in ("triton", "xla", *peers)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(compiled, jobs), strict=True))


def bench(shape: Shape, peers: list[str], calls: dict, bandwidth: float) -> dict:
    """One row of the table: times in us, ratios, relative Frobenius error against "xla"."""
    args = draw(shape)
    (call,), (reference,) = calls[shape, "triton"], calls[shape, "xla"]
    time, kernels = jax_kernels(call, *args)
    out, expected = (x(*args).astype(jnp.float32) for x in (call, reference))
    row = {"shape": str(shape), **dataclasses.asdict(shape), "us": time, "kernels": kernels}
    row["error"] = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
    row["bandwidth_share"] = shape.bytes / time * 1e6 / bandwidth
    for name in peers:
        found = calls[shape, name]
        try:
            if isinstance(found, str):
                raise RuntimeError(found)
            if found:
                row[name] = min(jax_kernels(call, *args)[0] for call in found)
        except Exception as error:  # a peer that cannot run this shape costs its column, not the table
            row[f"{name}_failed"] = repr(error)[:200]
    return row


def bench_torch(row: dict, shape: Shape, peers: list[str]) -> None:
    """Adds the times of torch peers to a row."""
    for name in peers if shape.page_size is None else ():
        try:
            row[name], _ = TORCH_PEERS[name](shape)
        except Exception as error:
            row[f"{name}_failed"] = repr(error)[:200]


def show(row: dict) -> None:
    """Prints a row."""
    peers = [f"{name} {row[name]:.2f} ({row[name] / row['us']:.2f}x)" for name in PEERS if name in row]
    failed = [f"{name} failed: {row[f'{name}_failed'][:60]}" for name in PEERS if f"{name}_failed" in row]
    share = f"{100 * row['bandwidth_share']:.0f} % of read bandwidth"
    print(f"{row['shape']:36} {row['us']:9.2f} us  {share}  error {row['error']:.1e}  ", *peers, *failed, flush=True)


def sweep(shape: Shape, keep: int = 6) -> list[tuple[float, TritonDecodeBlockSizes]]:
    """Times block sizes and prints the best."""
    programs = shape.batch * shape.kv_heads
    splits = [s for s in (1, 2, 4, 8, 16, 32, 64) if 64 <= programs * s <= 2048 and shape.length // s >= 32]
    candidates = [
        TritonDecodeBlockSizes(block_k, s, warps, stages)
        for block_k, s, warps, stages in itertools.product((16, 32, 64, 128), splits, (1, 2, 4, 8), (2, 3, 4, 5))
        if block_k * shape.head_dim * 4 * stages <= 200_000
        and block_k * s <= shape.length
        and block_k * warps <= 512
        and (s == 1 or (block_k >= 32 and warps >= 2 and stages <= 3))  # few programs: latency counts
    ]
    args = draw(shape)

    def compiled(sizes):
        with contextlib.suppress(Exception):
            return jax.jit(ours("triton", sizes)).lower(*args).compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        functions = list(pool.map(compiled, candidates))
    times = []
    for sizes, function in zip(candidates, functions, strict=True):
        if function is not None:
            times.append((jax_kernels(function, *args, iterations=8)[0], sizes))
    times.sort(key=lambda pair: pair[0])
    chosen = heuristic(args[0], *args[2:4], Mask(None, args[4]), args[5])
    for time, sizes in [x for i, x in enumerate(times) if i < keep or x[1] == chosen]:
        default = "  (the default)" if sizes == chosen else ""
        print(f"  {shape}: {time:8.2f} us  {sizes}{default}", flush=True)
    return times


def main() -> None:
    """Runs the sets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["main"], help=f"of {', '.join(SETS)}")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="which peers to time")
    parser.add_argument("--sweep", action="store_true", help="time block sizes instead")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    unknown = set(args.sets) - set(SETS)
    if jax.default_backend() != "gpu":
        parser.error(f"times GPU kernels, and this is a {jax.default_backend()}")
    if unknown:
        parser.error(f"unknown set {unknown.pop()!r}, choose from {', '.join(SETS)}")
    shapes = list(itertools.chain.from_iterable(SETS[name] for name in args.sets))
    if args.sweep:
        for shape in shapes:
            sweep(shape)
        return
    bandwidth = read_bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s")
    # A peer draws its own operands beside ours.
    limit = jax.devices()[0].memory_stats()["bytes_limit"] / 2.5
    for shape in shapes:
        if shape.bytes > limit:
            print(f"{shape}: skipped, its keys and values take {shape.bytes / 2**30:.0f} GiB")
    shapes = [shape for shape in shapes if shape.bytes <= limit]
    jax_peers, torch_peers = ([name for name in args.peers if name in peers] for peers in (JAX_PEERS, TORCH_PEERS))
    calls = compile_all(shapes, jax_peers)
    # All of JAX first: once torch's profiler has started, JAX's cannot.
    rows = [bench(shape, jax_peers, calls, bandwidth) for shape in shapes]
    for shape, row in zip(shapes, rows, strict=True):
        bench_torch(row, shape, torch_peers)
        show(row)
    for name in PEERS:
        ratios = [row[name] / row["us"] for row in rows if name in row]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            at_least = sum(ratio >= 1 for ratio in ratios) / len(ratios)
            print(
                f"{name}: geometric mean {mean:.2f}x over {len(ratios)} shapes, {100 * at_least:.0f} % at 1.0 or more"
            )
    if args.json:
        record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "read_bandwidth": bandwidth}
        with open(args.json, "w") as file:
            json.dump({**record, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
