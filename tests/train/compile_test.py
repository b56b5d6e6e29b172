"""The update of a preset compiled for H100s that are not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import tiny
from parallax_jax.model import TransformerLM
from train.gpus import gpu_devices
from train.optimizer import learning_rate_schedule, make_optimizer
from train.state import abstract_state, make_train_step


@pytest.mark.compile
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_update_compiles_for_h100s(sizes):
    count = int(np.prod(sizes))
    devices = np.array(gpu_devices(count)).reshape(sizes)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    config = dataclasses.replace(tiny.config, seq_len=128)
    shape = dataclasses.replace(
        config.resolved_model("gpu"), num_heads=4, num_kv_heads=2, head_dim=64, implementation="xla"
    )
    model, optimizer = TransformerLM(shape), make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(model, optimizer, mesh)
    step = make_train_step(model, optimizer, learning_rate_schedule(config.optimizer, config.steps), abstract)
    sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    rows = jax.ShapeDtypeStruct((1, config.batch_size, config.seq_len), jnp.int32, sharding=sharding)
    compiled = step.lower(abstract, dict.fromkeys(("inputs", "targets", "segment_ids"), rows)).compile()
    text = compiled.as_text()
    assert "bf16[" in text and ("all-reduce" in text) == (count > 1)
    params = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert compiled.memory_analysis().alias_size_in_bytes >= 8 * params / count, "the state's memory is reused"
