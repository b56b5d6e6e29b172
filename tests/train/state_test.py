import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallax_jax.model import TransformerLM
from train.checkpoint import Checkpoints
from train.config import ConfigError, MeshConfig
from train.optimizer import make_optimizer
from train.state import abstract_state, device_batch, init_state, make_mesh, make_train_step, sum_of_losses

SGD = optax.sgd(1.0)


def make_rows(config, rng, rows=8):
    """Random packed rows of unequal real lengths, two documents in each."""
    shape = (rows, config.seq_len)
    batch = {name: rng.integers(0, 257, shape).astype(np.int32) for name in ("inputs", "targets")}
    real = rng.integers(1, config.seq_len + 1, (rows, 1))
    at = np.arange(config.seq_len)
    batch["segment_ids"] = np.where(at < real, 1 + (at > real // 2), 0).astype(np.int32)
    return batch


def one_step(config, rows):
    """State and metrics after one update by plain gradient descent, so that gradients show in the parameters."""
    mesh, model = make_mesh(config), TransformerLM(config.model)
    abstract = abstract_state(model, SGD, mesh)
    state = init_state(model, SGD, abstract, config.seed)
    step = make_train_step(model, SGD, optax.constant_schedule(1.0), abstract)
    state, metrics = step(state, device_batch(mesh, rows, config.accumulation_steps))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return state, metrics


def assert_same_update(a, b, tolerance=1e-5):
    (state_a, metrics_a), (state_b, metrics_b) = a, b
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=tolerance, err_msg=name)
    for x, y in zip(jax.tree.leaves(state_a.params), jax.tree.leaves(state_b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * 0.1)


def test_accumulation_equals_one_big_batch_whatever_the_masks(config):
    rows = make_rows(config, np.random.default_rng(0))
    rows["segment_ids"][:2] = 0  # the first of four parts is padding alone
    whole = one_step(config, rows)
    assert whole[1]["tokens"] == (rows["segment_ids"] > 0).sum()
    assert_same_update(whole, one_step(dataclasses.replace(config, accumulation_steps=4), rows))


def sum_of(model, params, rows):
    with jax.numpy_dtype_promotion("strict"):
        return float(sum_of_losses(model, params, rows, chunk=50))


def test_loss_is_the_sum_over_real_tokens(config):
    rows = make_rows(config, np.random.default_rng(1), rows=2)
    untied = dataclasses.replace(config.model, tie_embeddings=False)
    for model in (TransformerLM(config.model), TransformerLM(untied)):
        params = init_state(model, SGD, abstract_state(model, SGD, make_mesh(config)), 3).params
        logits = model.apply({"params": params}, rows["inputs"], segment_ids=rows["segment_ids"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        expected = np.asarray(losses)[rows["segment_ids"] > 0].sum()
        np.testing.assert_allclose(sum_of(model, params, rows), expected, rtol=1e-5)


def test_rows_without_segment_ids_are_whole_documents(config):
    rows = make_rows(config, np.random.default_rng(5), rows=2)
    model = TransformerLM(config.model)
    params = init_state(model, SGD, abstract_state(model, SGD, make_mesh(config)), 3).params
    rows["segment_ids"] = np.ones_like(rows["inputs"])
    expected = sum_of(model, params, rows)
    del rows["segment_ids"]
    np.testing.assert_allclose(sum_of(model, params, rows), expected, rtol=1e-6)


def test_no_document_sees_another(config):
    rows = make_rows(config, np.random.default_rng(2), rows=2)
    model = TransformerLM(config.model)
    params = init_state(model, SGD, abstract_state(model, SGD, make_mesh(config)), 3).params
    alone = 0.0
    for row in range(2):
        for segment in (1, 2):
            inside = np.flatnonzero(rows["segment_ids"][row] == segment)
            if inside.size:
                alone += sum_of(model, params, {name: value[row : row + 1, inside] for name, value in rows.items()})
    np.testing.assert_allclose(sum_of(model, params, rows), alone, rtol=1e-5)


def shared_heads(config, attention, mesh):
    model = dataclasses.replace(config.model, num_heads=4, num_kv_heads=2, attention=attention)
    return dataclasses.replace(config, model=model, mesh=mesh)


def check_update(config, attention, sizes):
    """The update on a mesh is that of one device, and no device holds more of the parameters than its share."""
    rows = make_rows(config, np.random.default_rng(3))
    state, metrics = one_step(shared_heads(config, attention, MeshConfig(*sizes)), rows)
    kernel = state.params["layers"]["mlp"]["gate"]["kernel"]
    layers, width, hidden = kernel.shape
    assert kernel.addressable_shards[0].data.shape == (layers, width // sizes[1], hidden // sizes[2])
    assert_same_update(one_step(shared_heads(config, attention, MeshConfig(data=1)), rows), (state, metrics))


# data, fsdp, tensor, context: every axis with others, at last with key/value heads that devices share.
@pytest.mark.parametrize(
    ("attention", "sizes"), [("parallax", (2, 2, 2, 1)), ("parallax", (1, 2, 1, 4)), ("softmax", (1, 1, 4, 2))]
)
def test_any_mesh_gives_the_update_of_one_device(config, attention, sizes):
    check_update(config, attention, sizes)


ALL_MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if 1 < np.prod(sizes) <= 8 and sizes[2] < 8]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["parallax", "softmax"])
@pytest.mark.parametrize("sizes", ALL_MESHES)
def test_every_mesh_that_fits(config, attention, sizes):
    check_update(config, attention, sizes)


def test_resume_is_exact_on_the_same_mesh_and_close_on_another(config, tmp_path):
    rows = [make_rows(config, np.random.default_rng(seed)) for seed in range(2)]

    def run(sizes, start):
        """The state and the losses after the updates from `start` on; it is saved after the first."""
        spread = shared_heads(config, "parallax", MeshConfig(*sizes))
        mesh, model = make_mesh(spread), TransformerLM(spread.model)
        optimizer = make_optimizer(spread.optimizer, 2)
        abstract = abstract_state(model, optimizer, mesh)
        step = make_train_step(model, optimizer, optax.constant_schedule(1.0), abstract)
        with Checkpoints(tmp_path, 2) as checkpoints:
            state = checkpoints.restore(abstract, warn=pytest.fail) if start else None
            state = state or init_state(model, optimizer, abstract, spread.seed)
            for i in range(start, 2):
                state, metrics = step(state, device_batch(mesh, rows[i], 1))
                if i == 0:
                    checkpoints.save(state)
        return jax.device_get((state, metrics))

    whole = run((1, 2, 2, 2), 0)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(run((1, 2, 2, 2), 1)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert_same_update(whole, run((2, 1, 1, 4), 1), tolerance=1e-4)


def test_gradients_in_bfloat16(config):
    rows = make_rows(config, np.random.default_rng(6))
    mesh, model = make_mesh(config), TransformerLM(config.resolved_model("gpu"))
    batch = device_batch(mesh, rows, 2)
    after = {}
    for dtype in ("float32", "bfloat16"):
        abstract = abstract_state(model, SGD, mesh)
        step = make_train_step(model, SGD, optax.constant_schedule(1.0), abstract, gradient_dtype=dtype)
        state = init_state(model, SGD, abstract, config.seed)
        before = jax.tree.map(np.asarray, state.params)
        after[dtype] = jax.tree.map(lambda a, b: np.asarray(a) - b, step(state, batch)[0].params, before)
    exact, rough = after.values()
    for names in (("mlp", "gate", "kernel"), ("attention", "probe", "kernel")):
        a, b = (functools.reduce(dict.get, names, tree["layers"]) for tree in (exact, rough))
        assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(a) < 1e-2, names


def test_parameters_and_dtypes(config):
    bf16 = dataclasses.replace(config, dtype="bfloat16").resolved_model("cpu")
    assert bf16.dtype == "bfloat16" and config.resolved_model("cpu").dtype == "float32"
    assert config.resolved_model("gpu").dtype == config.resolved_model("tpu").dtype == "bfloat16"
    model = TransformerLM(bf16)
    state = init_state(model, SGD, abstract_state(model, SGD, make_mesh(config)), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    rows = make_rows(config, np.random.default_rng(4), 1)
    assert sum_of_losses(model, state.params, rows, 4096).dtype == jnp.float32


def test_mesh_takes_all_devices_unless_told(config):
    assert make_mesh(dataclasses.replace(config, mesh=MeshConfig())).devices.shape == (8, 1, 1, 1)
    assert make_mesh(dataclasses.replace(config, mesh=MeshConfig(fsdp=2, context=2))).devices.shape == (2, 2, 2, 1)
    assert make_mesh(config).devices.shape == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="needs 16 devices and there are 8"):
        make_mesh(dataclasses.replace(config, mesh=MeshConfig(fsdp=16)))
