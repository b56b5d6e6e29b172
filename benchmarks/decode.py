"""Decode timings beside every peer that is installed: `python -m benchmarks.decode [SET ...] [--json PATH]`.

Sums of GPU kernel times by CUPTI, in one run on one GPU: processes share the compiling and take turns, a shape each, at
timing. Peers: the published CuTe and Triton kernels of Parallax (parallax-kernel), and softmax decode by our own
kernel, cuDNN (jax.nn) and FlashAttention-3 (flash-attn3-jax), the best of its split counts. A ratio above 1 says that
the peer takes longer. `--routes mosaic_gpu triton triton_lang` times ours by Mosaic GPU, Pallas' Triton and in the
Triton language, "default" what `parallax_decode` takes by itself. `--sweep` times launches of Pallas' Triton instead.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import queue
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import jax_kernels, torch_kernels
from pallas_kernels import triton_routes
from pallas_kernels.block_sizes import MosaicGpuDecodeBlockSizes, TritonDecodeBlockSizes, TritonLangDecodeBlockSizes
from pallas_kernels.blocks import Mask
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


MAIN = [Shape(b, length) for b in (1, 32) for length in (512, 1024, 4096, 16384)]
SETS = {
    "main": MAIN,
    "few": [Shape(b, length) for b, length in ((1, 512), (1, 1024), (1, 16384), (32, 4096), (32, 16384))],
    "single": [Shape(1, length) for length in (512, 1024, 4096, 16384)],
    "gqa": [Shape(32, 4096, h, k) for h, k in ((8, 8), (32, 8), (16, 8), (64, 8), (8, 1))],
    "paged": [Shape(32, 4096, page_size=p) for p in (None, 16, 64, 256)]
    + [Shape(1, 16384, page_size=p) for p in (None, 64)],
    "long": [Shape(1, 131072), Shape(4, 131072), Shape(8, 65536)],
    "sweep": [*MAIN, Shape(256, 1024)]
    + [Shape(32, 4096, h, k, d) for h, k, d in ((16, 8, 128), (32, 8, 128), (8, 1, 128), (8, 8, 64))],
    # Whose programs fill the cores unevenly, and the shortest.
    "uneven": [Shape(64, length, head_dim=d) for length, d in ((512, 128), (2048, 128), (256, 64), (1024, 64))]
    + [Shape(16, length) for length in (1024, 8192)]
    + [Shape(b, length, head_dim=64) for b, length in ((128, 4096), (8, 16384), (16, 512), (1, 128))]
    + [Shape(16, 128), Shape(1, 256), Shape(1, 16384, page_size=64)],
    "paper": paper_grid(),
    "paper64": [shape for shape in paper_grid() if shape.head_dim == 64],
    "paper128": [shape for shape in paper_grid() if shape.head_dim == 128],
}
LAUNCHED_BY = {
    "mosaic_gpu": MosaicGpuDecodeBlockSizes,
    "triton": TritonDecodeBlockSizes,
    "triton_lang": TritonLangDecodeBlockSizes,  # another route of "triton"
}
READ_BYTES = [1 << i for i in range(26, 33)]  # of passes that only read
CHECKED_BYTES = 1 << 31  # of keys and values: where there are more, "xla" may not have the memory


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


def ours(implementation: str | None, block_sizes=None) -> Callable:
    """The function of `draw`'s results to time."""

    def decode(query, probe, key, value, lengths, table):
        options = dict(page_table=table, implementation=implementation, block_sizes=block_sizes)
        return parallax_decode(query, probe, key, value, lengths, **options)

    return decode


def default(route: str, arguments):
    """The launch of `draw`'s results that a route takes by itself."""
    query, _, key, value, lengths, table = arguments
    return LAUNCHED_BY[route].heuristic(query, key, value, Mask(None, lengths), table)


def by_route(route: str, arguments) -> Callable:
    """`ours` by a route, at its own launch."""
    if route == "default":
        return ours(None)
    return ours("mosaic_gpu" if route == "mosaic_gpu" else "triton", default(route, arguments))


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


def softmax(shape: Shape) -> list[Callable]:
    """Softmax decode by the kernel that Parallax takes by default, without the probe's part."""
    from pallas_kernels.mosaic_gpu import decode as mosaic_gpu
    from pallas_kernels.triton import decode as triton

    def decode(query, _, key, value, lengths, table):
        operands = query, None, key, value, Mask(None, lengths), table
        options = dict(scale=shape.head_dim**-0.5, block_sizes=None)
        refused = mosaic_gpu.unsupported(*operands, **options) or mosaic_gpu.outrun(*operands)
        return (triton if refused else mosaic_gpu).decode(*operands, **options)

    return [decode]


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
JAX_PEERS = {"softmax": softmax, "cudnn": cudnn, "fa3": flash_attention_3}
PEERS = [*TORCH_PEERS, *JAX_PEERS]


def read_bandwidth(num_bytes: int = READ_BYTES[-1]) -> float:
    """Bytes per second of a read-only pass."""
    x = jnp.ones((num_bytes // 2,), jnp.bfloat16)
    time, _ = jax_kernels(lambda x: jnp.max(x), x, iterations=5)
    return x.nbytes / time * 1e6


def compile_all(jobs: dict, threads: int | None = None) -> dict:
    """Name -> (function, *arguments) becomes name -> executable, or why there is none; side by side."""

    def compiled(job):
        if isinstance(job, str):
            return job
        function, *arguments = job
        try:
            return jax.jit(function).lower(*arguments).compile()
        except Exception as error:  # a call that cannot run costs its place in the table, not the table
            return repr(error)[:200]

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(compiled, jobs.values()), strict=True))


def bench_jobs(shape: Shape, routes: list[str], peers: list[str]) -> dict:
    """What `bench` needs compiled, by shape, name and number."""
    arguments = jax.eval_shape(functools.partial(draw, shape))
    jobs = {(shape, route, 0): (by_route(route, arguments), *arguments) for route in routes}
    jobs[shape, "draw", 0] = (functools.partial(draw, shape),)
    if shape.bytes <= CHECKED_BYTES:
        jobs[shape, "xla", 0] = ours("xla"), *arguments
    for name in () if shape.page_size else peers:
        try:
            jobs |= {(shape, name, i): (call, *arguments) for i, call in enumerate(JAX_PEERS[name](shape))}
        except Exception as error:  # not installed, or not for this shape
            jobs[shape, name, 0] = repr(error)[:200]
    return jobs


def relative_error(x, y) -> float:
    """Of the Frobenius norm, on the host: nothing is compiled for it."""
    x, y = (np.asarray(z).astype(np.float32) for z in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def bench(shape: Shape, routes: list[str], executables: dict, bandwidths: dict[int, float]) -> list[dict]:
    """A row of the table for each route: times in us, relative Frobenius error against "xla", times of the peers."""
    args = executables[shape, "draw", 0]()
    peers = {}
    for name in JAX_PEERS:
        found = [x for (at, peer, _), x in executables.items() if (at, peer) == (shape, name)]
        try:
            if reasons := [x for x in found if isinstance(x, str)]:
                raise RuntimeError(reasons[0])
            if found:
                peers[name] = min(jax_kernels(call, *args)[0] for call in found)
        except Exception as error:  # a peer that cannot run this shape costs its column, not the table
            peers[f"{name}_failed"] = repr(error)[:200]
    reference = executables.get((shape, "xla", 0))
    expected = reference and reference(*args)
    rows = []
    for route in routes:
        call = executables[shape, route, 0]
        if isinstance(call, str):
            raise RuntimeError(f"{route} at {shape}: {call}")
        time, kernels = jax_kernels(call, *args)
        row = {"shape": str(shape), **dataclasses.asdict(shape), "route": route, "us": time, "kernels": kernels}
        if reference:
            row["error"] = relative_error(call(*args), expected)
        speed, longest = shape.bytes / time * 1e6, max(bandwidths)
        row["bandwidth_share"] = speed / bandwidths[longest]
        if (size := min(shape.bytes, longest)) in bandwidths:
            row["bandwidth_share_of_same_size"] = speed / bandwidths[size]
        rows.append(row | peers)
    return rows


def bench_torch(shape: Shape, peers: list[str]) -> dict:
    """Times of torch peers, or why there are none."""
    times = {}
    for name in peers if shape.page_size is None else ():
        try:
            times[name], _ = TORCH_PEERS[name](shape)
        except Exception as error:
            times[f"{name}_failed"] = repr(error)[:200]
    return times


def work(shapes: dict[int, Shape], routes: list[str], peers: list[str], bandwidths: dict[int, float]) -> None:
    """One process's part of `bench_all`."""
    compiled, turn, results = work.shared
    try:
        jax_peers, torch_peers = ([name for name in peers if name in known] for known in (JAX_PEERS, TORCH_PEERS))
        jobs = {key: job for shape in shapes.values() for key, job in bench_jobs(shape, routes, jax_peers).items()}
        executables = compile_all(jobs, threads=2)
        compiled.wait()  # nothing else runs on the GPU while one is timed
        for number, shape in shapes.items():
            with turn:
                results.put((number, bench(shape, routes, executables, bandwidths), not torch_peers))
        # All of JAX first: once torch's profiler has started, JAX's cannot.
        for number, shape in shapes.items() if torch_peers else ():
            with turn:
                results.put((number, [bench_torch(shape, torch_peers)] * len(routes), True))
    except BaseException:
        compiled.abort()
        raise


def share(*values) -> None:
    """Hands a process what it shares with the others."""
    work.shared = values


def bench_all(
    shapes: list[Shape], routes: list[str], peers: list[str], bandwidths: dict[int, float], processes: int
) -> Iterator[tuple[int, list[dict], bool]]:
    """Yields (number of a shape, what is new in its rows, whether they are whole), as they come."""
    context, processes = multiprocessing.get_context("spawn"), max(1, min(processes, len(shapes)))
    results = context.Queue()
    shared = context.Barrier(processes), context.Lock(), results
    with ProcessPoolExecutor(processes, context, share, shared) as pool:
        # A process keeps the memory that it has used: one of them has the largest shapes.
        order = sorted(enumerate(shapes), key=lambda pair: pair[1].bytes)
        bounds = [len(shapes) * i // processes for i in range(processes + 1)]
        parts = [dict(order[first:end]) for first, end in itertools.pairwise(bounds)]
        futures = [pool.submit(work, part, routes, peers, bandwidths) for part in parts]
        while True:
            is_over = all(future.done() for future in futures)  # asked before the last look
            try:
                yield results.get(timeout=1)
            except queue.Empty:
                if is_over:
                    break
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: type(error).__name__ == "BrokenBarrierError"):
            raise error


def show(row: dict) -> None:
    """Prints a row."""
    peers = [f"{name} {row[name]:.2f} ({row[name] / row['us']:.2f}x)" for name in PEERS if name in row]
    failed = [f"{name} failed: {row[f'{name}_failed'][:60]}" for name in PEERS if f"{name}_failed" in row]
    share = f"{100 * row['bandwidth_share']:.0f} % of read bandwidth"
    error = f"error {row['error']:.1e}" if "error" in row else "unchecked"
    print(f"{row['shape']:36} {row['route']:11} {row['us']:9.2f} us  {share}  {error}  ", *peers, *failed, flush=True)


# (keys in a tile of head width 128, warps, stages) by the programs that a core is to hold at once: no more stages than
# its shared memory has room for.
LAUNCHES = {
    1: ((64, 4, 3), (64, 4, 5), (64, 4, 7), (64, 2, 3), (128, 4, 3), (128, 8, 4), (32, 2, 4), (32, 4, 2)),
    2: ((32, 2, 4), (32, 2, 6), (64, 4, 3), (64, 4, 4), (64, 2, 3), (64, 2, 4)),
    4: ((32, 1, 4), (32, 2, 4), (32, 1, 3), (16, 1, 6)),
    8: ((16, 1, 3), (32, 1, 2), (16, 2, 3)),
}


def launches(shape: Shape, cores: int) -> list[TritonDecodeBlockSizes]:
    """Launches worth timing, in one wave of programs or without splits; rotated where sequences run side by side."""
    found = {}
    for splits in (1 << i for i in range(7)):
        programs, keys = shape.batch * shape.kv_heads * splits, shape.length // splits
        a_core = 1 << max(0, math.ceil(programs / cores) - 1).bit_length()
        if keys < 32 or (keys > 512 and 2 * programs <= cores) or (splits > 1 and a_core > 4):
            continue
        held = [a_core] if splits > 1 or a_core == 1 else [n for n in LAUNCHES if 2 <= n <= a_core]
        for block_k, warps, stages in itertools.chain.from_iterable(LAUNCHES.get(n, ()) for n in held):
            block_k = min(block_k * 128 // shape.head_dim, 128 if keys <= 256 else 256)
            if block_k <= keys:
                stages = max(2, min(stages, keys // block_k + 1))
                found[TritonDecodeBlockSizes(block_k, splits, warps, stages, rotate=shape.batch > 1)] = None
    return list(found)


def time_launches(shape: Shape, executables: dict, iterations: int) -> list[tuple[float, TritonDecodeBlockSizes]]:
    """(us, launch) of one shape, best first; `executables` by (shape, launch), and by "draw" and "xla" for launch."""
    args = executables[shape, "draw"]()
    expected = executables[shape, "xla"](*args)
    times = []
    for (at, sizes), function in executables.items():
        if at != shape or sizes in ("draw", "xla"):
            continue
        if isinstance(function, str):
            print(f"  {shape}: refused {sizes}: {function[:80]}", flush=True)
        elif (error := relative_error(function(*args), expected)) > 1e-2:
            print(f"  {shape}: WRONG by {error:.1e}: {sizes}", flush=True)
        else:
            times.append((jax_kernels(function, *args, iterations=iterations)[0], sizes))
    return sorted(times, key=lambda pair: pair[0])


def sweep(shapes: list[Shape], bandwidth: float, keep: int = 3) -> list[dict]:
    """Times launches, then the best of each shape again, with and without rotation; prints those and the default."""
    cores = jax.devices()[0].core_count
    jobs, defaults = {}, {}
    for shape in shapes:
        arguments = jax.eval_shape(functools.partial(draw, shape))
        defaults[shape] = default("triton", arguments)
        jobs[shape, "draw"] = (functools.partial(draw, shape),)
        jobs[shape, "xla"] = ours("xla"), *arguments
        for sizes in (defaults[shape], *launches(shape, cores)):
            jobs[shape, sizes] = ours("triton", sizes), *arguments
    executables = compile_all(jobs)
    first = {shape: time_launches(shape, executables, 8) for shape in shapes}
    best = {
        (shape, dataclasses.replace(sizes, rotate=rotate))
        for shape in shapes
        for _, sizes in first[shape][:keep]
        for rotate in (False, True)
    }
    arguments = {shape: arguments for (shape, name), (_, *arguments) in jobs.items() if name == "xla"}
    missing = {(shape, sizes): (ours("triton", sizes), *arguments[shape]) for shape, sizes in best - jobs.keys()}
    executables |= compile_all(missing)
    again = best | defaults.items() | {(shape, name) for shape in shapes for name in ("draw", "xla")}
    executables = {name: x for name, x in executables.items() if name in again}
    rows = []
    for shape in shapes:
        second = time_launches(shape, executables, 30)
        for us, sizes in second:
            share = 100 * shape.bytes / us * 1e6 / bandwidth
            note = "  (the default)" if sizes == defaults[shape] else ""
            print(f"{shape}: {us:8.2f} us, {share:3.0f} %  {sizes}{note}", flush=True)
        rows += [
            {"shape": str(shape), "us": us, "iterations": iterations, **dataclasses.asdict(sizes)}
            for iterations, times in ((8, first[shape]), (30, second))
            for us, sizes in times
        ]
    return rows


def main() -> None:
    """Runs the sets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["main"], help=f"of {', '.join(SETS)}")
    parser.add_argument(
        "--routes", nargs="+", default=["default"], choices=["default", *LAUNCHED_BY], help="which of ours to time"
    )
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="which peers to time")
    parser.add_argument("--sweep", action="store_true", help="time block sizes instead")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    args = parser.parse_args()
    unknown = set(args.sets) - set(SETS)
    if jax.default_backend() != "gpu":
        parser.error(f"times GPU kernels, and this is a {jax.default_backend()}")
    if unknown:
        parser.error(f"unknown set {unknown.pop()!r}, choose from {', '.join(SETS)}")
    for route in set(args.routes) & set(triton_routes.ROUTES):
        if isinstance(reason := triton_routes.load(f"{triton_routes.ROUTES[route]}.decode"), str):
            parser.error(f"{route}: {reason}")
    shapes = list(dict.fromkeys(itertools.chain.from_iterable(SETS[name] for name in args.sets)))
    bandwidths = {num_bytes: read_bandwidth(num_bytes) for num_bytes in READ_BYTES}
    bandwidth = bandwidths[max(READ_BYTES)]
    record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "read_bandwidth": bandwidth}
    record |= {"read_bandwidths": bandwidths, "rows": []}
    print(f"{record['device']}, jax {jax.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)

    def save() -> None:
        """Writes what there is: a run that is cut off keeps its rows."""
        if args.json:
            with open(args.json, "w") as file:
                json.dump(record, file, indent=1)

    # A peer draws its own operands beside ours.
    limit = jax.devices()[0].memory_stats()["bytes_limit"] / 2.5
    for shape in shapes:
        if shape.bytes > limit:
            print(f"{shape}: skipped, its keys and values take {shape.bytes / 2**30:.0f} GiB")
    shapes = [shape for shape in shapes if shape.bytes <= limit]
    if args.sweep:
        record["rows"] = sweep(shapes, bandwidth)
        save()
        return
    found, rows = {}, []
    for number, news, is_whole in bench_all(shapes, args.routes, args.peers, bandwidths, args.processes):
        found[number] = [row | new for row, new in zip(found.get(number, [{}] * len(news)), news, strict=True)]
        for row in found[number] if is_whole else ():
            show(row)
        record["rows"] = rows = [row for _, of_shape in sorted(found.items()) for row in of_shape]
        save()
    for route, name in itertools.product(args.routes, PEERS):
        ratios = [row[name] / row["us"] for row in rows if row["route"] == route and name in row]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            share = 100 * sum(ratio >= 1 for ratio in ratios) / len(ratios)
            print(
                f"{route}, {name}: geometric mean {mean:.2f}x over {len(ratios)} shapes, {share:.0f} % at 1.0 or more"
            )


if __name__ == "__main__":
    main()
