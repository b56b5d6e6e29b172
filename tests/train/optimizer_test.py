import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

from parallax_jax.model import ModelConfig, TransformerLM
from parallax_jax.sharding import parameter_sharding
from train.config import OptimizerConfig, load_preset
from train.optimizer import MATRIX_AXES, group_of, learning_rate_schedule, make_optimizer, muon_dimensions

MODEL = ModelConfig(vocab_size=260, num_layers=3, width=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40)


def make_params(model=MODEL, seed=0):
    """Random parameters of a model, norms and biases included."""
    abstract = jax.eval_shape(lambda: TransformerLM(model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    leaves, tree = jax.tree.flatten(nn.meta.unbox(abstract)["params"])
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_is_routed(scan_layers):
    model = dataclasses.replace(MODEL, use_bias=True, tie_embeddings=False, scan_layers=scan_layers)
    params = flatten_dict(make_params(model))
    layers = ["layers"] if scan_layers else [f"layers_{i}" for i in range(3)]
    kernels = [("attention", n) for n in ("query", "probe", "key", "value", "out")]
    kernels += [("mlp", n) for n in ("gate", "up", "down")]
    matrices = {(layer, *kernel, "kernel") for layer in layers for kernel in kernels}
    embeddings = {("embed", "embedding"), ("lm_head", "kernel")}
    assert {names for names in params if group_of(names) == "matrix"} == matrices
    assert {names for names in params if group_of(names) == "embedding"} == embeddings
    rest = {names for names in params if group_of(names) == "norm"}
    assert rest == params.keys() - matrices - embeddings
    assert all(names[-1] in ("scale", "bias") for names in rest) and ("final_norm", "scale") in rest


def test_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="layers/attention/gate/kernel"):
        group_of(("layers", "attention", "gate", "kernel"))


@pytest.mark.parametrize("per_head", [False, True])
def test_matrix_axes(per_head):
    shapes = {names: leaf.shape for names, leaf in flatten_dict(make_params()).items() if group_of(names) == "matrix"}
    assert shapes["layers", "attention", "probe", "kernel"] == (3, 24, 4, 8)
    matrices = {}
    for names, shape in shapes.items():
        axes = muon_dimensions(names, per_head)
        sides = [[i % len(shape) for i in (a if isinstance(a, tuple) else (a,))] for a in axes]
        batch = math.prod(n for i, n in enumerate(shape) if i not in sides[0] + sides[1])
        matrices[names[-2]] = (batch, *(math.prod(shape[i] for i in side) for side in sides))
    heads = {
        False: {"query": (3, 24, 32), "key": (3, 24, 16), "value": (3, 24, 16), "out": (3, 32, 24)},
        True: {"query": (12, 24, 8), "key": (6, 24, 8), "value": (6, 24, 8), "out": (12, 8, 24)},
    }[per_head]
    mlp = {"gate": (3, 24, 40), "up": (3, 24, 40), "down": (3, 40, 24)}
    assert matrices == {**heads, "probe": heads["query"], **mlp}


def updates_of(optimizer, params, gradients):
    """Updates of a few steps, the last one's returned."""
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(updates)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("scaling", "consistent_rms"), [("width", None), ("consistent_rms", 0.2)])
def test_equals_optax_muon_where_both_apply(scaling, consistent_rms, per_head):
    params = make_params()
    gradients = [make_params(seed=i) for i in (1, 2, 3)]
    config = OptimizerConfig(
        learning_rate=0.03, scaling=scaling, per_head=per_head, weight_decay=0.1, clip_norm=1e9, decay_fraction=0.0
    )
    projection = MuonDimensionNumbers(1, 3) if per_head else MuonDimensionNumbers(1, (2, 3))
    out = MuonDimensionNumbers(2, 3) if per_head else MuonDimensionNumbers((1, 2), 3)
    attention = {key: {"kernel": projection} for key in ("query", "probe", "key", "value")} | {"out": {"kernel": out}}
    attention |= {f"{name}_norm": {"scale": None} for name in ("query", "probe", "key")}
    mlp = {key: {"kernel": MuonDimensionNumbers(1, 2)} for key in ("gate", "up", "down")}
    norms = {"attention_norm": {"scale": None}, "mlp_norm": {"scale": None}}
    dimensions = {
        "embed": {"embedding": None},
        "layers": {"attention": attention, "mlp": mlp, **norms},
        "final_norm": {"scale": None},
    }
    expected = updates_of(
        optax.contrib.muon(
            0.03, weight_decay=0.1, muon_weight_dimension_numbers=dimensions, consistent_rms=consistent_rms
        ),
        params,
        gradients,
    )
    actual = updates_of(make_optimizer(config, 100), params, gradients)
    for names, update in actual.items():
        if group_of(names) == "matrix":
            np.testing.assert_allclose(update, expected[names], rtol=1e-5, atol=1e-7, err_msg="/".join(names))


def test_matrix_axes_are_those_of_the_model():
    boxed = jax.eval_shape(lambda: TransformerLM(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    for names, box in flatten_dict(boxed).items():
        if group_of(names) == "matrix":
            assert box.names == ("layers", *MATRIX_AXES[names[-2]])


def sharded_update(config, sizes, model=MODEL):
    """The jitted update of an optimizer over a mesh, and its operands there."""
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    optimizer = make_optimizer(config, 100)
    params, gradients = make_params(model), make_params(model, seed=1)
    boxed = jax.eval_shape(lambda: TransformerLM(model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    shardings = jax.tree.map(
        lambda box: parameter_sharding(mesh, box.names, box.value.shape),
        boxed,
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )
    placed = jax.device_put((gradients, params), (shardings, shardings))
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init)(placed[1])
        update = jax.jit(lambda g, s, p: optimizer.update(g, s, p)[0], out_shardings=shardings)
        return update.lower(placed[0], state, placed[1]).compile(), (placed[0], state, placed[1])


@pytest.mark.parametrize(("sizes", "per_head"), [((1, 8, 1, 1), False), ((2, 2, 1, 2), False), ((1, 2, 2, 2), True)])
def test_mesh_shares_the_iterations_and_changes_nothing(sizes, per_head):
    config = OptimizerConfig(per_head=per_head, decay_fraction=0.0, newton_schulz_steps=2)
    update, operands = sharded_update(config, sizes)
    expected = updates_of(make_optimizer(config, 100), make_params(), [make_params(seed=1)])
    for names, actual in flatten_dict(update(*operands)).items():
        np.testing.assert_allclose(actual, expected[names], rtol=1e-4, atol=1e-7, err_msg="/".join(names))
    text = update.as_text()
    assert "all-to-all" in text
    products = [int(n) for n in re.findall(r"= f32\[(\d+),\d+,\d+\]\S* dot\(", text)]
    most = 3 * 16 if per_head else 3 * 3  # heads of attention; query, probe and out, or gate, up and down
    assert products and max(products) == -(-most // 8)
    if sizes == (1, 8, 1, 1):
        assert "all-gather" not in text, "no device needs a matrix that is not of its share"


def test_few_matrices_over_four_devices():
    """XLA for CPUs refused their all-to-all, whose pieces had different layouts."""
    config, model = OptimizerConfig(decay_fraction=0.0, newton_schulz_steps=2), load_preset("tiny").model
    update, operands = sharded_update(config, (1, 4, 1, 1), model)
    expected = updates_of(make_optimizer(config, 100), make_params(model), [make_params(model, seed=1)])
    for names, actual in flatten_dict(update(*operands)).items():
        np.testing.assert_allclose(actual, expected[names], rtol=1e-4, atol=1e-7, err_msg="/".join(names))


def test_bfloat16_iterations_stay_close():
    exact = OptimizerConfig(weight_decay=0.0, decay_fraction=0.0)
    rough = dataclasses.replace(exact, newton_schulz_dtype="bfloat16")
    params, gradients = make_params(), [make_params(seed=3)]
    expected, actual = (updates_of(make_optimizer(config, 100), params, gradients) for config in (exact, rough))
    for names, update in actual.items():
        if group_of(names) == "matrix":
            error = np.linalg.norm(update - expected[names]) / np.linalg.norm(expected[names])
            assert 1e-4 < error < 0.08, names


@pytest.mark.parametrize("name", ["query", "probe", "value", "out"])
def test_projection_is_orthogonalised_as_one_matrix(name):
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, scaling="spectral", decay_fraction=0.0)
    update = updates_of(make_optimizer(config, 10), make_params(), [make_params(seed=4)])
    kernel = np.asarray(update["layers", "attention", name, "kernel"])
    shape = (3, 32, 24) if name == "out" else (3, 24, kernel[0, 0].size)
    for matrix in kernel.reshape(shape):
        singular = np.linalg.svd(matrix, compute_uv=False) / math.sqrt(shape[2] / shape[1])
        assert singular.min() > 0.5 and singular.max() < 1.4


def test_adam_groups_have_their_own_rates_and_decay():
    config = OptimizerConfig(
        learning_rate=0.1, embedding_rate=0.3, norm_rate=0.015, adam_weight_decay=0.0, weight_decay=0.5, adam_eps=1e-12
    )
    params = make_params()
    update = updates_of(make_optimizer(config, 100), params, [make_params(seed=5)])
    # Adam's first step is the sign of the gradient times its rate.
    np.testing.assert_allclose(np.abs(update["embed", "embedding"]), 0.1 * 0.3, rtol=1e-4)
    np.testing.assert_allclose(np.abs(update["final_norm", "scale"]), 0.1 * 0.015, rtol=1e-4)
    np.testing.assert_allclose(np.abs(update["layers", "attention", "probe_norm", "scale"]), 0.1 * 0.015, rtol=1e-4)
    decayed = dataclasses.replace(config, adam_weight_decay=0.2)
    shift = updates_of(make_optimizer(decayed, 100), params, [make_params(seed=5)])["embed", "embedding"]
    np.testing.assert_allclose(
        shift - update["embed", "embedding"], -0.03 * 0.2 * params["embed"]["embedding"], rtol=1e-3, atol=1e-6
    )


def test_adamw_is_optax_adamw():
    params, gradients = make_params(), [make_params(seed=i) for i in (6, 7)]
    config = OptimizerConfig(
        name="adamw",
        learning_rate=3e-4,
        adam_b1=0.9,
        adam_b2=0.95,
        adam_eps=1e-8,
        weight_decay=0.1,
        adam_weight_decay=0.1,
        embedding_rate=1.0,
        norm_rate=1.0,
        clip_norm=1e9,
        decay_fraction=0.0,
    )
    expected = updates_of(optax.adamw(3e-4, 0.9, 0.95, 1e-8, weight_decay=0.1), params, gradients)
    for names, update in updates_of(make_optimizer(config, 100), params, gradients).items():
        np.testing.assert_allclose(update, expected[names], rtol=1e-5, atol=1e-9)


def test_gradients_are_clipped_before_muon():
    params = make_params()
    small, large = make_params(seed=8), jax.tree.map(lambda leaf: 100.0 * leaf, make_params(seed=9))
    config = OptimizerConfig(clip_norm=1.0)
    clipped = [jax.tree.map(lambda leaf, g=g: leaf / optax.tree.norm(g), g) for g in (small, large)]
    expected = updates_of(make_optimizer(dataclasses.replace(config, clip_norm=1e9), 100), params, clipped)
    for names, update in updates_of(make_optimizer(config, 100), params, [small, large]).items():
        np.testing.assert_allclose(update, expected[names], rtol=2e-3, atol=1e-6)


def test_schedules():
    wsd = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=0.2), 100)
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 79: 2.0, 80: 2.0, 90: 1.0, 99: 0.1, 100: 0.0}
    np.testing.assert_allclose([wsd(step) for step in expected], list(expected.values()), rtol=1e-6, atol=1e-7)
    cosine = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=1, schedule="cosine"), 101)
    expected = {0: 0.0, 1: 2.0, 51: 1.0, 101: 0.0}
    np.testing.assert_allclose([cosine(step) for step in expected], list(expected.values()), rtol=1e-5, atol=1e-6)
    constant = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, decay_fraction=0.0), 100)
    assert constant(0) == constant(100) == 2.0
