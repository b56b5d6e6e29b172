"""The TPU kernels compiled for TPUs that are not there, alone and inside a sharded update."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import tpu_compile
from configs import tiny
from pallas_kernels.block_sizes import vmem_limit
from parallax_jax import layers, parallax_attention
from parallax_jax.model import TransformerLM
from train.optimizer import learning_rate_schedule, make_optimizer
from train.state import abstract_state, make_train_step

pytestmark = pytest.mark.compile
TOPOLOGIES = ["v5e:2x2", "v6e:2x2"]
KERNELS = {"parallax_forward", "parallax_backward_rows", "parallax_backward_columns"}


@pytest.mark.parametrize("workload", tpu_compile.ATTENTION, ids=lambda w: w.name)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_attention_compiles(topology, workload):
    sizes = tpu_compile.kernels(tpu_compile.compile_attention(topology, workload))
    assert set(sizes) == KERNELS
    assert max(sizes.values()) <= vmem_limit(tpu_compile.tpu_mesh(topology).devices[0].device_kind)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_float32_compiles(topology):
    workload = next(w for w in tpu_compile.ATTENTION if w.name == "d256")
    assert set(tpu_compile.kernels(tpu_compile.compile_attention(topology, workload, jnp.float32))) == KERNELS


@pytest.mark.parametrize("name", tpu_compile.DECODE)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_decode_compiles(topology, name):
    compiled = tpu_compile.compile_decode(topology, name)
    assert set(tpu_compile.kernels(compiled)) == {"parallax_forward" if name == "prefill" else "parallax_decode"}
    if name not in ("prefill", "d64"):
        assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20, "the cache is read where it lies"


@pytest.mark.parametrize(("topology", "sizes"), [("v5e:2x2", (2, 1, 2)), ("v6e:4x4", (4, 2, 2))])
def test_sharded_update_compiles(topology, sizes, monkeypatch):
    """Batch and heads split over the mesh: each device runs the kernels on its own part."""
    devices = tpu_compile.tpu_mesh(topology).devices.reshape(sizes)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")

    def sharded(*operands, segment_ids, **options):
        if segment_ids is None:  # shapes of the parameters, from one row
            return parallax_attention(*operands, **options)
        call = lambda ids, *x: parallax_attention(*x, segment_ids=ids, **options)
        specs = dict(mesh=mesh, in_specs=(rows, *(heads,) * 4), out_specs=heads, check_vma=False)
        return jax.shard_map(call, **specs)(segment_ids, *operands)

    monkeypatch.setattr(layers, "parallax_attention", sharded)
    config = dataclasses.replace(tiny.config, seq_len=512)
    shape = dataclasses.replace(
        tiny.config.model, num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", implementation="mosaic_tpu"
    )
    model, optimizer = TransformerLM(shape), make_optimizer(config.optimizer, config.steps)
    with jax.numpy_dtype_promotion("standard"):
        abstract = abstract_state(model, optimizer, mesh)
        step = make_train_step(model, optimizer, learning_rate_schedule(config.optimizer, config.steps), abstract)
        sharding = NamedSharding(mesh, P(None, ("data", "fsdp")))
        tokens = jax.ShapeDtypeStruct((1, 8, config.seq_len), jnp.int32, sharding=sharding)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # names the device; nothing is placed on it
            lowered = step.lower(abstract, dict.fromkeys(("inputs", "targets", "segment_ids"), tokens))
    compiled = lowered.compile()
    assert set(tpu_compile.kernels(compiled)) == KERNELS
    assert "all-reduce" in compiled.as_text()
