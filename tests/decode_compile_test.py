"""XLA's own GPU compiler on the decode kernels, for GPUs that are not there: no spill, no shared-memory overflow."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.decode_step import PAPER
from parallax_jax import parallax_decode
from parallax_jax.cache import init_cache
from parallax_jax.model import TransformerLM
from parallax_jax.sampling import Draws, Sampling, decode_steps
from tests.mosaic_gpu_compile_test import SERIALISED
from train.gpus import gpu_devices

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("new", "page_size"), [(1, 64), (1, 16), (16, 48)])
@pytest.mark.parametrize("batch", [1, 64], ids=["splits", "one_split"])
@pytest.mark.parametrize("card", ["H100", "RTX 4090"])
def test_kernels_fit(card, batch, new, page_size, head_dim, dtype):
    mesh = jax.sharding.Mesh(gpu_devices(1, card), ("x",))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    rows, cache = (batch, new, 12, head_dim), (2 * batch, page_size, 4, head_dim)
    operands = [shape(x, jnp.dtype(dtype)) for x in (rows, rows, cache, cache)]
    step = jax.jit(
        lambda table, *x: parallax_decode(*x, page_table=table, local_window_size=900, implementation="triton")
    )
    with jax.set_mesh(mesh):
        table, lengths = shape((batch, 16), jnp.int32), shape((batch,), jnp.int32)
        lowered = step.trace(table, *operands, lengths).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True})


def step_text(config, batch: int) -> str:
    """A call of 16 steps, compiled for an H100 without spills."""
    mesh = jax.sharding.Mesh(gpu_devices(1), ("x",))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    init = lambda: nn.meta.unbox(TransformerLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])

    def arguments():
        draws = Draws(jax.random.split(jax.random.key(0), batch), jnp.full(1, -1, jnp.int32), jnp.int32(512))
        state = jnp.ones(batch, jnp.int32), jnp.zeros(batch, bool), jnp.int32(16)
        return init(), init_cache(config, batch, 4096), *state, draws

    with jax.set_mesh(mesh):
        traced = decode_steps.trace(config, Sampling(0), 16, *jax.tree.map(place, jax.eval_shape(arguments)))
        compiled = traced.lower(lowering_platforms=("cuda",)).compile(
            compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
        )
    return compiled.as_text()


@pytest.mark.parametrize(
    ("kernels", "batch", "changes"),
    [
        ("one", 1, {}),
        ("one", 1, {"head_dim": 64}),
        ("one", 1, {"local_window_size": 2048}),
        ("one_a_block", 1, {"scan_layers": False}),
        ("five_a_block", 1, {"scan_layers": False, "implementation": "triton"}),
        ("five_a_block", 5, {"scan_layers": False}),
        ("five_a_block", 64, {"scan_layers": False}),
    ],
)
def test_a_step_is_kernels_alone(kernels, batch, changes, capfd, monkeypatch):
    """Nothing lies between them, and the cache, which a loop over tokens carries, is not copied."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    config = dataclasses.replace(PAPER, num_layers=2, vocab_size=512, **changes)
    text = step_text(config, batch)
    mosaic = {"one": 1, "one_a_block": config.num_layers, "five_a_block": 0}[kernels]
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == (0 if mosaic else 5 * config.num_layers)
    assert text.count('custom_call_target="mosaic_gpu_v2"') == mosaic
    if mosaic:
        report = "".join(capfd.readouterr())
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
        assert not SERIALISED.findall(report)
    shape = *([config.num_layers] if config.scan_layers else []), batch, config.local_window_size or 4096, 8
    assert f"bf16[{','.join(map(str, shape))},{config.head_dim}]" in text
    copied = re.findall(r"= \(?(\S+?)\{?[\d,]*\}? copy(?:-start)?\(", text)
    assert set(copied) <= {"s32[]", f"s32[{batch}]", f"pred[{batch}]"}
    assert '"known_trip_count":{"n":"16"}' in text  # so the host does not wait for each token
