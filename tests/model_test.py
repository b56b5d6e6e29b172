import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax_jax.cache import init_cache
from parallax_jax.estimators import ESTIMATORS, Solver
from parallax_jax.model import REMAT_POLICIES, ModelConfig, TransformerLM, segment_positions, unstack_layers

# The dense operator compiles fastest; the tests of rematerialisation take the real one.
TINY = ModelConfig(
    vocab_size=37,
    num_layers=3,
    width=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    mlp_width=40,
    rope_theta=1e4,
    implementation="reference",
)
BLOCKWISE = dataclasses.replace(TINY, implementation="xla")
NAMED = ("attention", "dots")  # the policies that keep residuals by name
TOKENS = jax.random.randint(jax.random.key(0), (2, 17), 0, 37)


def init(config):
    return nn.meta.unbox(jax.jit(TransformerLM(config).init)(jax.random.key(1), TOKENS)["params"])


def apply(config, params, tokens=TOKENS, *args, **kwargs):
    return jax.jit(lambda p, t: TransformerLM(config).apply({"params": p}, t, *args, **kwargs))(params, tokens)


@pytest.fixture(scope="module")
def params():
    # Larger than the initial ones, so that attention is far from uniform.
    return jax.tree.map(lambda p: p * 6 if p.ndim > 2 else p, init(TINY))


def count(c):
    attention = c.width * c.head_dim * ((2 + (c.attention == "parallax")) * c.num_heads + 2 * c.num_kv_heads)
    norms = c.head_dim * (2 * c.qk_norm + (c.probe_norm and c.attention == "parallax")) + 2 * c.width
    biases = c.use_bias * (
        c.head_dim * ((1 + (c.attention == "parallax")) * c.num_heads + 2 * c.num_kv_heads)
        + 2 * c.width
        + 2 * c.mlp_width
    )
    layer = attention + norms + biases + 3 * c.width * c.mlp_width
    return c.num_layers * layer + c.width + c.vocab_size * c.width * (1 + (not c.tie_embeddings))


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention": "softmax"}, {"use_bias": True, "tie_embeddings": False, "probe_norm": False, "qk_norm": False}],
)
def test_parameter_count(changes):
    config = dataclasses.replace(TINY, **changes)
    shapes = jax.eval_shape(TransformerLM(config).init, jax.random.key(0), TOKENS)
    assert sum(x.size for x in jax.tree.leaves(nn.meta.unbox(shapes))) == count(config)


def test_paper_size():
    # 596 M parameters of the softmax model, 58.7 M more for the probe (paper, table 5).
    config = ModelConfig(151936, 28, 1024, 16, 8, 128, 3072, probe_norm=False, attention="softmax")
    assert count(config) == 596_049_920
    assert count(dataclasses.replace(config, attention="parallax")) - count(config) == 28 * 1024 * 16 * 128


def test_tree_and_logical_axes():
    config = dataclasses.replace(TINY, tie_embeddings=False)
    boxed = jax.eval_shape(TransformerLM(config).init, jax.random.key(0), TOKENS)["params"]
    names = {
        jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(boxed)
    }
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(names) == len(boxes) == 3 + 13
    assert all(isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in boxes)
    specs = nn.get_partition_spec(boxed)
    assert specs["embed"]["embedding"] == jax.P("vocab", "embed")
    assert specs["lm_head"]["kernel"] == jax.P("embed", "vocab")
    assert specs["final_norm"]["scale"] == jax.P("norm")
    assert specs["layers"]["attention"]["probe"]["kernel"] == jax.P("layers", "embed", "heads", "head_dim")
    assert specs["layers"]["attention"]["key"]["kernel"] == jax.P("layers", "embed", "kv_heads", "head_dim")
    assert specs["layers"]["attention"]["out"]["kernel"] == jax.P("layers", "heads", "head_dim", "embed")
    assert specs["layers"]["mlp"]["down"]["kernel"] == jax.P("layers", "mlp", "embed")
    assert nn.meta.unbox(boxed)["layers"]["attention"]["query"]["kernel"].shape == (3, 24, 4, 10)


def test_logits_are_float32_and_causal(params):
    for dtype in ("float32", "bfloat16"):
        assert apply(dataclasses.replace(TINY, dtype=dtype), params).dtype == jnp.float32
    logits = apply(TINY, params)
    later = apply(TINY, params, TOKENS.at[:, 9].add(1) % 37)
    np.testing.assert_array_equal(logits[:, :9], later[:, :9])
    assert (jnp.abs(logits[:, 9:] - later[:, 9:]).max(-1) > 0).all()


def test_bfloat16_is_close(params):
    exact, low = apply(TINY, params), apply(dataclasses.replace(TINY, dtype="bfloat16"), params)
    assert jnp.linalg.norm(low - exact) < 0.05 * jnp.linalg.norm(exact)


def test_window_limits_what_a_token_sees(params):
    config = dataclasses.replace(TINY, local_window_size=3, num_layers=3)
    logits, other = apply(config, params), apply(config, params, TOKENS.at[:, 4].add(1) % 37)
    # Three layers with window 3 reach 6 tokens back.
    np.testing.assert_array_equal(logits[:, 11:], other[:, 11:])
    assert (logits[:, 10] != other[:, 10]).any(-1).all()


def test_windows_by_layer(params):
    alike = dataclasses.replace(TINY, local_window_size=3)
    config, unstacked = unstack_layers(alike, params)
    config = dataclasses.replace(config, local_window_size=(3, 3, 3))
    np.testing.assert_allclose(apply(config, unstacked), apply(alike, params), rtol=1e-5, atol=1e-6)
    config = dataclasses.replace(config, local_window_size=(3, None, 2))
    logits, other = apply(config, unstacked), apply(config, unstacked, TOKENS.at[:, 4].add(1) % 37)
    assert (logits[:, 16] != other[:, 16]).any(-1).all()  # the middle layer sees everything
    cache = init_cache(config, 2, 17)
    assert not cache.ring
    outputs = []
    for chunk in jnp.split(TOKENS, [9, 10, 13], axis=1):
        out, cache = TransformerLM(config).apply({"params": unstacked}, chunk, cache=cache)
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("use_bias", "count"), [(True, 8), ("attention", 5), ("qkv", 4), (False, 0)])
def test_which_projections_have_a_bias(use_bias, count):
    shapes = jax.eval_shape(TransformerLM(dataclasses.replace(TINY, use_bias=use_bias)).init, jax.random.key(0), TOKENS)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    biases = [name for name in names if "bias" in name]
    assert len(biases) == count
    assert any("'mlp'" in name for name in biases) == (use_bias is True)
    assert any("'out'" in name for name in biases) == (use_bias in (True, "attention"))


def test_packed_equals_separate_documents(params):
    segment_ids = jnp.asarray([[3] * 5 + [4] * 12, [1] * 11 + [2] * 4 + [0] * 2], jnp.int32)
    packed = apply(TINY, params, segment_ids=segment_ids)
    for row, start, end in ((0, 0, 5), (0, 5, 17), (1, 0, 11), (1, 11, 15)):
        alone = apply(TINY, params, TOKENS[row : row + 1, start:end])
        np.testing.assert_allclose(packed[row, start:end], alone[0], rtol=1e-3, atol=1e-4)


def test_segment_positions():
    ids = jnp.asarray([[5, 5, 1, 1, 1, 5, 0]], jnp.int32)
    assert segment_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0, 0]]


def test_hidden_then_logits_is_the_call(params):
    for config in (TINY, dataclasses.replace(TINY, tie_embeddings=False)):
        p = params if config.tie_embeddings else init(config)
        hidden = apply(config, p, method="hidden")
        assert hidden.shape == (2, 17, 24)
        chunk = apply(config, p, hidden[:, 3:8], method="logits")
        np.testing.assert_allclose(chunk, apply(config, p)[:, 3:8], rtol=1e-5, atol=1e-5)


def test_probe_gain_zero_equals_softmax(params):
    params = jax.tree.map(lambda p: p, params)
    params["layers"]["attention"]["probe_norm"]["scale"] *= 0
    attention = {k: v for k, v in params["layers"]["attention"].items() if not k.startswith("probe")}
    softmax = {**params, "layers": {**params["layers"], "attention": attention}}
    expected = apply(dataclasses.replace(TINY, attention="softmax"), softmax)
    np.testing.assert_allclose(apply(TINY, params), expected, rtol=1e-5, atol=1e-5)
    assert not init(dataclasses.replace(TINY, probe_norm_init=0.0))["layers"]["attention"]["probe_norm"]["scale"].any()


def gradient(config, params):
    def loss(p):
        logits = TransformerLM(config).apply({"params": p}, TOKENS)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], -1).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def test_remat_policies_agree(params):
    loss, grads = gradient(TINY, params)
    assert all(float(jnp.linalg.norm(g)) > 0 for g in jax.tree.leaves(grads))
    for config in (dataclasses.replace(TINY, remat="full"), *(dataclasses.replace(BLOCKWISE, remat=r) for r in NAMED)):
        other_loss, other = gradient(config, params)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), other, grads)


def test_scan_equals_unrolled(params):
    loss, grads = gradient(TINY, params)
    flat = {k: v for k, v in params.items() if k != "layers"}
    flat |= {f"layers_{i}": jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(3)}
    other_loss, other = gradient(dataclasses.replace(TINY, scan_layers=False, remat="full"), flat)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for i in range(3):
        expected = jax.tree.map(lambda p, i=i: p[i], grads["layers"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), other[f"layers_{i}"], expected
        )


def test_remat_keeps_what_its_name_says(params, capsys):
    def saved(remat):
        config = dataclasses.replace(BLOCKWISE, remat=remat, scan_layers=False, num_layers=1)
        flat = {k: v for k, v in params.items() if k != "layers"}
        flat["layers_0"] = jax.tree.map(lambda p: p[0], params["layers"])
        jax.ad_checkpoint.print_saved_residuals(
            lambda p: TransformerLM(config).apply({"params": p}, TOKENS, method="hidden").sum(), flat
        )
        lines = capsys.readouterr().out.splitlines()
        return len(lines), sum("named 'parallax_" in line for line in lines)

    counts = {remat: saved(remat) for remat in REMAT_POLICIES}
    assert counts["full"][1] == 0
    assert counts["attention"] == (counts["full"][0] + 4, 4)
    assert counts["dots"][1] == 4
    assert counts["full"][0] < counts["attention"][0] < counts["dots"][0] < counts["none"][0]


def test_works_through_the_nnx_bridge():
    with nnx.use_eager_sharding(False):
        model = nnx.bridge.ToNNX(TransformerLM(TINY), rngs=nnx.Rngs(0)).lazy_init(TOKENS)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        np.testing.assert_allclose(model(TOKENS), apply(TINY, params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_kv_heads", 3, "a divisor of num_heads=4"),
        ("num_layers", 0, "an integer >= 1"),
        ("head_dim", 9, "an even integer up to 256"),
        ("head_dim", 258, "an even integer up to 256"),
        ("attention", "gated", f"one of {', '.join(ESTIMATORS)}"),
        ("remat", "some", "one of none, full, attention, dots"),
        ("dtype", "float8", "one of float32, bfloat16, float16"),
        ("local_window_size", 0, "None or an integer >= 1"),
        ("local_window_size", (4, 4), "one for each of 3"),
        ("local_window_size", (4, None, 4), "the same for all layers, or scan_layers=False"),
        ("use_bias", "mlp", "a bool, 'attention' or 'qkv'"),
        ("rope_theta", -1.0, "a number > 0"),
        ("norm_eps", 0.0, "a number > 0"),
        ("qk_norm_eps", 0.0, "None or a number > 0"),
    ],
)
def test_bad_config_names_field_value_and_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, **{field: value})
    assert str(error.value) == f"{field}={value!r} is not allowed: it must be {allowed}"


def test_config_as_json():
    config = dataclasses.replace(
        TINY, attention="lla", solver=Solver(ridge=0.5), local_window_size=(3,) * TINY.num_layers
    )
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
