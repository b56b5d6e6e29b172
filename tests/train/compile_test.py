"""The update of a preset compiled for H100s that are not there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from configs import tiny
from parallax_jax.model import TransformerLM
from train.gpus import gpu_devices
from train.optimizer import learning_rate_schedule, make_optimizer
from train.state import AXES, abstract_state, batch_sharding, make_train_step


@pytest.mark.compile
@pytest.mark.parametrize(
    ("implementation", "sizes"),
    [
        ("xla", (2, 2, 1, 2)),
        ("triton", (1, 2, 2, 2)),
        ("mosaic_gpu", (1, 1, 2, 4)),
    ],
)
def test_update_compiles_for_h100s(implementation, sizes):
    count = math.prod(sizes)
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4, devices=gpu_devices(count))
    config = dataclasses.replace(tiny.config, seq_len=256)
    shape = dataclasses.replace(
        config.resolved_model("gpu"), num_heads=4, num_kv_heads=2, head_dim=64, implementation=implementation
    )
    model, optimizer = TransformerLM(shape), make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(model, optimizer, mesh)
    step = make_train_step(model, optimizer, learning_rate_schedule(config.optimizer, config.steps), abstract)
    shape = (1, config.batch_size, config.seq_len)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    compiled = step.lower(abstract, dict.fromkeys(("inputs", "targets", "segment_ids"), rows)).compile()
    text = compiled.as_text()
    assert "bf16[" in text and ("all-reduce" in text) == (count > 1)
    assert ("parallax_backward" in text) == (implementation != "xla")
    assert all(kernel in text for kernel in ("rms_norm_forward", "rms_norm_backward", "softmax_terms"))
    assert ("collective-permute" in text) == (sizes[2] > 1), "the sequence is exchanged along the context axis"
    params = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert compiled.memory_analysis().alias_size_in_bytes >= 8 * params / count, "the state's memory is reused"
