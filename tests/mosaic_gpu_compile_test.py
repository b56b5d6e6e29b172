"""ptxas on the Hopper kernels, without a GPU: the products overlap, none waits for registers."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import blocks, mosaic_gpu
from pallas_kernels.block_sizes import MosaicGpuDecodeBlockSizes
from pallas_kernels.mosaic_gpu import decode
from train.gpus import gpu_devices

pytestmark = pytest.mark.compile

BATCH, LENGTH, HEADS = 2, 1024, 4
# In the backward pass no product waits at all; in the forward pass one before the loop may (C7517).
SERIALISED = re.compile(r"\(C751\d\)[^\n]*(?:serialized|'parallax_backward_mosaic_gpu_kernel')")
# Both passes hold all that they can in registers and park addresses and constants elsewhere.
SPILLS = re.compile(r"'parallax_\w+_mosaic_gpu_kernel', (\d+) bytes spill stores, (\d+) bytes spill loads")
MOST_SPILLED, MOST_SPILLED_PLAIN = 192, 64  # bytes, with every mask at once and with causal or full masks alone


def compile_kernels(is_causal=True, window=None, packed=False, ragged=False, kv_heads=2, width=128, dtype=jnp.bfloat16):
    """Compiles forward and backward for an H100."""
    mesh = jax.sharding.Mesh(gpu_devices(1), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def run(query, probe, key, value, dout, offset, lengths, segments):
        mask = blocks.Mask(offset, lengths if ragged else None, segments if packed else None, is_causal, window)
        operands = query, probe, key, value, mask
        static = dict(scale=width**-0.5, block_sizes=None)
        results = mosaic_gpu.forward(*operands, **static)
        return results[0], mosaic_gpu.backward(*operands, *results, dout, **static)

    query, key = (
        jax.ShapeDtypeStruct((BATCH, LENGTH, n, width), dtype, sharding=replicated) for n in (HEADS, kv_heads)
    )
    integers = (jax.ShapeDtypeStruct(s, jnp.int32, sharding=replicated) for s in ((), (BATCH,), (BATCH, LENGTH)))
    with jax.set_mesh(mesh):
        jax.jit(run).trace(query, query, key, key, query, *integers).lower(lowering_platforms=("cuda",)).compile()


@pytest.mark.parametrize(
    "call",
    [
        dict(),
        dict(kv_heads=4),
        dict(kv_heads=1),
        dict(is_causal=False),
        dict(is_causal=False, kv_heads=4),
        dict(window=300),
        dict(packed=True),
        dict(ragged=True),
        dict(ragged=True, is_causal=False),
        dict(window=300, packed=True, ragged=True),
        dict(dtype=jnp.float16),
        dict(dtype=jnp.float16, is_causal=False),
        dict(width=64),
        dict(width=64, is_causal=False, kv_heads=4),
        dict(width=64, window=300, packed=True, ragged=True),
    ],
    ids=lambda call: "-".join(f"{name}_{getattr(x, '__name__', x)}" for name, x in call.items()) or "causal",
)
def test_products_overlap(call, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compile_kernels(**call)
    report = capfd.readouterr()
    report = report.out + report.err
    assert report.count("Compiling entry function") == 3
    assert not SERIALISED.findall(report)
    most = MOST_SPILLED if {"window", "packed", "ragged"} & call.keys() else MOST_SPILLED_PLAIN
    assert all(int(size) <= most for sizes in SPILLS.findall(report) for size in sizes)


@pytest.mark.parametrize(
    ("sizes", "call"),
    [
        ((64, 8, 1, 2), {}),
        ((32, 8, 1, 1), dict(num_keys=256)),
        ((128, 6, 2, 2), dict(width=64)),
        ((128, 8, 2, 1), {}),
        ((64, 1, 1, 2), dict(dtype=jnp.float16)),
        ((128, 1, 1, 1), dict(num_keys=256)),
        ((64, 1, 1, 1), dict(width=64)),
        ((64, 1, 2, 2), dict(page_size=64, window=300)),
        ((128, 2, 1, 1), dict(page_size=16)),
        ((64, 3, 2, 2), dict(new=4, heads=2, window=300)),
        ((64, 2, 2, 2), dict(has_probe=False)),
    ],
    ids=str,
)
def test_decode(sizes, call, monkeypatch, capfd):
    """No product waits for registers, and nothing spills."""
    default = dict(num_keys=4096, new=1, heads=1, width=128, dtype=jnp.bfloat16, page_size=None, window=None)
    call = dict(default, has_probe=True) | call
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    mesh = jax.sharding.Mesh(gpu_devices(1), ("x",))
    shape = lambda *x, dtype=call["dtype"]: jax.ShapeDtypeStruct(
        x, dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    query, key, pages = shape(2, call["new"], 4 * call["heads"], call["width"]), (2, call["num_keys"]), None
    if call["page_size"] is not None:
        per_sequence = call["num_keys"] // call["page_size"]
        key, pages = (2 * per_sequence, call["page_size"]), shape(2, per_sequence, dtype=jnp.int32)
    key = shape(*key, 4, call["width"])

    def run(query, probe, key, value, lengths, pages):
        mask = blocks.Mask(None, lengths, window=call["window"])
        probe = probe if call["has_probe"] else None
        launch = MosaicGpuDecodeBlockSizes(*sizes)
        return decode.decode(query, probe, key, value, mask, pages, scale=0.1, block_sizes=launch)

    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(query, query, key, key, shape(2, dtype=jnp.int32), pages)
        traced.lower(lowering_platforms=("cuda",)).compile()
    report = "".join(capfd.readouterr())
    assert report.count("Compiling entry function") == 1
    assert "C75" not in report
    assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"]
