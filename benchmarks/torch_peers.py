"""Times the published PyTorch kernels: `python -m benchmarks.torch_peers WORKLOAD ...` prints one JSON row a line.

Looks for parallax-kernel and flash-linear-attention; softmax attention comes from torch itself. Times are sums of
kernel times from torch's profiler. Only plain causal workloads run: the published window is wrong at tile borders.
For workloads of `workloads.ACCURACY` the row holds errors against float64 instead, on this project's own inputs.
The published kernels are compiled first, by many processes, into Triton's cache: one after another takes minutes.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # jax draws the inputs and computes the float64 reference; the GPU is torch's

import numpy as np
import torch

from parallax_jax import compare, workloads


def kernel_ms(function, iterations: int = 10) -> float:
    """Mean sum of GPU kernel times of one call, in milliseconds."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(iterations):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / iterations / 1e3


# Rows, columns, warps and stages that win on Hopper, of the 36 that the published kernels try.
TILES = [(128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 4), (128, 32, 8, 2), (128, 32, 4, 2)]
TILES += [(64, 128, 8, 2), (64, 32, 4, 2), (128, 128, 8, 2), (32, 64, 4, 2)]


def published_triton(tiles=TILES):
    """parallax-kernel's training kernel on (B, H, L, D), its autotuner limited to some tiles."""
    import parallax.triton.parallax_train as module
    import triton
    from parallax import parallax_func

    configs = [
        triton.Config({"ROW_TILE_SIZE": rows, "COL_TILE_SIZE": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in tiles
    ]
    for name in dir(module):
        if hasattr(getattr(module, name), "configs") and name != "_bwd_preprocess_kernel":
            getattr(module, name).configs = list(configs)
    return parallax_func, True


def published_fla():
    """flash-linear-attention's kernel on (B, T, H, D)."""
    from fla.ops.parallax import parallel_parallax

    return parallel_parallax, False


def softmax(backend):
    def make():
        from torch.nn.attention import sdpa_kernel

        def attention(query, _, key, value):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
                )

        return attention, True

    return make


PEERS = {
    "parallax-kernel (Triton)": published_triton,
    "flash-linear-attention": published_fla,
    "softmax: FlashAttention-2": softmax(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
}


def time_peer(make, workload: workloads.Workload) -> dict:
    """Forward and forward + backward milliseconds."""
    attention, heads_first = make()
    draw = lambda shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    tensors = [draw(shape) for shape in (*workload.shapes, workload.cotangent_shape)]
    if heads_first:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    *operands, cotangent = tensors
    for x in operands:  # the forward pass, too, with what the backward pass needs: the kernels that were compiled
        x.requires_grad_()
    forward = kernel_ms(lambda: attention(*operands))

    def total():
        for x in operands:
            x.grad = None
        attention(*operands).backward(cotangent)

    return dict(forward_ms=forward, total_ms=kernel_ms(total))


def peer_errors(make, workload: workloads.Workload) -> dict:
    """Relative Frobenius errors of the output and the four gradients."""
    attention, heads_first = make()
    arrays = [np.asarray(x, np.float32) for x in workload.operands("bfloat16")]
    *operands, cotangent = (torch.tensor(x, device="cuda", dtype=torch.bfloat16) for x in arrays)
    for x in operands:
        x.requires_grad_()
    swap = (lambda x: x.transpose(1, 2).contiguous()) if heads_first else (lambda x: x)
    out = attention(*(swap(x) for x in operands))
    out.backward(swap(cotangent))
    results = [swap(out), *(x.grad for x in operands)]
    expected = compare.expected(workload, "bfloat16")
    return {
        name: compare.relative_error(x.detach().float().cpu().numpy(), y)
        for name, x, y in zip(compare.RESULTS, results, expected, strict=True)
    }


def runs(workload: workloads.Workload) -> bool:
    """Whether the published kernels take the workload."""
    return not (workload.window or workload.segments or workload.keys) and workload.is_causal


def compile_tile(name: str, index: int) -> None:
    """Fills Triton's cache with the published kernels of one tile."""
    attention, _ = published_triton(TILES[index : index + 1])
    shapes = [(b, h, t, d) for b, t, h, d in workloads.BY_NAME[name].shapes]
    operands = [torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes]
    with contextlib.suppress(Exception):  # a tile that does not fit; the autotuner passes it over, too
        out = attention(*operands)
        out.backward(torch.ones_like(out))  # not of a sum: other strides are another kernel


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("workloads", nargs="+")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=[name for name, make in PEERS.items() if make is not published_fla],
        help="default: all but flash-linear-attention, whose autotuner takes minutes",
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    names = [name for name in options.workloads if runs(workloads.BY_NAME[name])]
    # Processes forked from one that has imported torch and nothing that starts CUDA, which no fork survives.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        list(pool.map(compile_tile, *zip(*itertools.product(names, range(len(TILES))), strict=True)))
    print("compiled", file=sys.stderr, flush=True)
    for name in names:
        workload = workloads.BY_NAME[name]
        for peer in options.peers:
            make, row = PEERS[peer], dict(workload=name, implementation=peer)
            try:
                if workload not in workloads.ACCURACY:
                    row |= time_peer(make, workload)
                elif not peer.startswith("softmax"):
                    row |= peer_errors(make, workload)
                else:
                    continue
            except Exception as error:  # a peer may fail in any way; the table says how
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
