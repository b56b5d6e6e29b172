import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from parallax_jax import ModelConfig, TransformerLM, load_pretrained, save_pretrained
from parallax_jax.pretrained import pretrained_config

FIXTURES = Path(__file__).parent / "fixtures"
QWEN3, SHARDED, FLA = (FIXTURES / n for n in ("qwen3_byte_tiny", "qwen3_byte_tiny_sharded", "fla_parallax_tiny"))
TINY = ModelConfig(
    vocab_size=37, num_layers=3, width=24, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=40, rope_theta=1e4
)


def logits(config, params, tokens):
    config = dataclasses.replace(config, implementation="reference")
    return jax.jit(lambda p, t: TransformerLM(config).apply({"params": p}, t))(params, tokens)


def expected(folder):
    with np.load(folder / "expected.npz") as file:
        return file["ids"].astype(np.int32), file["logits"]


def random_params(config, seed=0):
    """Parameters with every norm and bias perturbed, so that a forgotten one shows."""
    shapes = jax.eval_shape(TransformerLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes))
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(1 + rng.normal(size=leaf.shape) / 3, leaf.dtype)
    return tree.unflatten([draw(leaf) for leaf in leaves])


def assert_same(params, other):
    a, b = flatten_dict(params), flatten_dict(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name].astype(jnp.float32), b[name].astype(jnp.float32), err_msg=str(name))


@pytest.fixture(scope="module")
def qwen3():
    return load_pretrained(QWEN3)


def test_qwen3_gives_the_logits_of_transformers_and_converted_the_same_bits(qwen3):
    tokens, reference = expected(QWEN3)
    config, params = qwen3
    assert config == ModelConfig(
        256, 4, 128, 4, 2, 32, 384, attention="softmax", rope_theta=1e4, param_dtype="bfloat16"
    )
    softmax = logits(config, params, tokens)
    np.testing.assert_allclose(softmax, reference, atol=1e-4)
    converted, probed = load_pretrained(QWEN3, attention="parallax")
    assert converted.attention == "parallax" and converted.probe_norm and converted.probe_norm_init == 0
    probe = probed["layers"]["attention"]["probe"]["kernel"].astype(jnp.float32)
    assert 0.019 < probe.std() < 0.021 and not probed["layers"]["attention"]["probe_norm"]["scale"].any()
    assert len({float(layer.sum()) for layer in probe}) == 4, "each layer has a projection of its own"
    np.testing.assert_array_equal(logits(converted, probed, tokens), softmax)


def test_shards_are_the_same_model(qwen3):
    config, params = load_pretrained(SHARDED)
    assert config == qwen3[0]
    assert_same(params, qwen3[1])


def test_flash_linear_attention_model_gives_its_logits():
    tokens, reference = expected(FLA)
    config, params = load_pretrained(FLA)
    assert config.attention == "parallax" and config.qk_norm_eps == 1e-5
    np.testing.assert_allclose(logits(config, params, tokens), reference, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(dtype, qwen3):
    config, params = load_pretrained(QWEN3, dtype=dtype)
    assert config.dtype == config.param_dtype == dtype
    assert_same(params, jax.tree.map(lambda p: p.astype(dtype), qwen3[1]))


def test_lands_on_the_target_sharding(qwen3):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axes = {"query": (None, "fsdp", "tensor"), "key": (None, "fsdp"), "out": (None, "tensor", None, "fsdp")}
    axes |= {"gate": (None, "fsdp", "tensor"), "down": (None, "tensor", "fsdp"), "embed": (None, "fsdp")}
    place = lambda path, _: NamedSharding(
        mesh, PartitionSpec(*next((axes[k.key] for k in path if k.key in axes and path[-1].key != "scale"), ()))
    )
    shardings = jax.tree.map_with_path(place, qwen3[1])
    _, params = load_pretrained(QWEN3, shardings=shardings)
    assert jax.tree.all(jax.tree.map(lambda p, s: p.sharding == s, params, shardings))
    assert params["layers"]["attention"]["query"]["kernel"].addressable_shards[0].data.shape == (4, 64, 1, 32)
    assert_same(params, qwen3[1])
    probe = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    replicated = load_pretrained(QWEN3, attention="parallax", shardings=probe.update(spec=PartitionSpec()))[1]
    assert replicated["layers"]["attention"]["probe"]["kernel"].sharding.is_fully_replicated


VARIANTS = {
    "Qwen3ForCausalLM": [
        {"attention": "softmax"},
        {"attention": "softmax", "tie_embeddings": False, "head_dim": 10, "param_dtype": "bfloat16"},
        {"attention": "softmax", "use_bias": "attention", "local_window_size": 5},
        {"attention": "softmax", "local_window_size": (None, 5, 5), "scan_layers": False, "rope_theta": 1e6},
    ],
    "ParallaxForCausalLM": [
        {"qk_norm_eps": 1e-5},
        {"qk_norm": False, "probe_norm": False, "use_bias": "qkv", "tie_embeddings": False, "local_window_size": 5},
    ],
    "TransformerLM": [
        {"head_dim": 10},
        {"probe_norm": False, "use_bias": True},
        {"probe_rope": False, "local_window_size": (None, 5, 4), "scan_layers": False},
        {"attention": "softmax", "qk_norm": False, "qk_norm_eps": 1e-4},
    ],
}


@pytest.mark.parametrize(
    ("architecture", "changes"), [(name, changes) for name, variants in VARIANTS.items() for changes in variants]
)
def test_export_and_import_are_exact(architecture, changes, tmp_path):
    config = dataclasses.replace(TINY, **changes)
    params = random_params(config)
    save_pretrained(tmp_path / "model", config, params, extra={"eos_token_id": 3}, max_shard_bytes=9000)
    files = sorted((tmp_path / "model").iterdir())
    assert len(files) > 3 and all(file.stat().st_size < 12000 for file in files)
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert fields["architectures"] == [architecture] and fields["eos_token_id"] == 3
    loaded, again = load_pretrained(tmp_path / "model")
    unset = {"qk_norm_eps": None} if config.qk_norm_eps is None else {}
    if not config.qk_norm and architecture == "ParallaxForCausalLM":
        unset = {"qk_norm_eps": None}  # nothing is normed with it
    assert dataclasses.replace(loaded, **unset) == config
    assert_same(again, params)


def test_unstacked_layers_are_saved_alike(tmp_path):
    config = dataclasses.replace(TINY, scan_layers=False, qk_norm_eps=1e-5)
    params = random_params(config)
    save_pretrained(tmp_path / "model", config, params)
    loaded, again = load_pretrained(tmp_path / "model")
    assert loaded.scan_layers
    np.testing.assert_array_equal(
        again["layers"]["attention"]["out"]["kernel"][2], params["layers_2"]["attention"]["out"]["kernel"]
    )


def test_save_refuses_a_full_folder_and_other_parameters(tmp_path):
    with pytest.raises(ValueError, match=r"params: embed/embedding is \(37, 24\), the configuration needs \(37, 26\)"):
        save_pretrained(tmp_path / "model", dataclasses.replace(TINY, width=26, num_heads=2), random_params(TINY))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(tmp_path, TINY, random_params(TINY))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the sharded Qwen3 that a test may break."""
    return Path(shutil.copytree(SHARDED, tmp_path / "model"))


@pytest.fixture
def single(tmp_path) -> Path:
    """A copy of the Qwen3 in one file."""
    return Path(shutil.copytree(QWEN3, tmp_path / "model"))


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_rope_theta_in_the_older_spelling(single):
    fields = json.loads((single / "config.json").read_text())
    theta = fields.pop("rope_parameters")["rope_theta"]
    fields["torch_dtype"] = fields.pop("dtype")
    del fields["layer_types"]
    (single / "config.json").write_text(json.dumps(fields | {"rope_theta": theta, "rope_scaling": None}))
    assert pretrained_config(single) == pretrained_config(QWEN3)


def test_windows_by_layer_as_transformers_4_derives_them(single):
    edit(single, use_sliding_window=True, sliding_window=64, max_window_layers=3, layer_types=None)
    config, params = load_pretrained(single)
    assert config.windows == (None, None, None, 64) and not config.scan_layers
    assert "layers_3" in params


def test_tied_model_may_store_its_head(single, qwen3):
    edit_tensors(single, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same(load_pretrained(single)[1], qwen3[1])
    edit_tensors(single, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight is not model\.embed_tokens\.weight"):
        load_pretrained(single)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_experts": 8}, "num_experts=8 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has 'linear_attention'"),
        ({"head_dim": 33}, "head_dim=33 is not allowed"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architecture 'Qwen3MoeForCausalLM' is none of"),
        ({"hidden_size": "128"}, "config.json: "),
    ],
)
def test_unsupported_fields_are_refused_by_name(fields, message, single):
    edit(single, **fields)
    with pytest.raises(ValueError) as error:
        load_pretrained(single)
    assert message in str(error.value) and "config.json" in str(error.value)


def test_parallax_is_not_read_as_softmax():
    with pytest.raises(ValueError, match="attention='softmax'"):
        load_pretrained(FLA, attention="softmax")


def test_missing_shard(folder):
    (folder / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00005\.safetensors is missing: it holds model\.layers"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("left", [0.9, 0.02])
def test_truncated_file(left, folder):
    file = folder / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"model-00003-of-00005\.safetensors: not a whole safetensors file") as error:
        load_pretrained(folder)
    assert "model.layers." in str(error.value)


def test_tensor_of_another_shape(single):
    name = "model.layers.2.self_attn.q_proj.weight"
    edit_tensors(single, lambda t: t.update({name: t[name].T[:, :96].copy()}))
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: {name} is \(128, 96\), config\.json asks for \(128, 128"
    ):
        load_pretrained(single)


def test_missing_and_extra_tensors(single):
    edit_tensors(single, lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"the tensor model\.layers\.3\.mlp\.up_proj\.weight is missing"):
        load_pretrained(single)
    edit(single, num_hidden_layers=3, layer_types=None)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: model\.layers\.3\.\S+ is no part of the model \(10 such"
    ):
        load_pretrained(single)


def test_index_and_shard_disagree(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00005.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"00001-of-00005\.safetensors: model\.norm\.weight, which the index lists"):
        load_pretrained(folder)
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in '\.\./elsewhere\.safetensors'"):
        load_pretrained(folder)


class Trap:
    """Unpickling it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_opened(name, single, tmp_path):
    (single / "model.safetensors").unlink()
    (single / name).write_bytes(pickle.dumps(Trap(tmp_path / "touched")))
    with pytest.raises((FileNotFoundError, ValueError), match=name.replace(".", r"\.")):
        load_pretrained(single)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_pretrained(single / name)


def test_integer_tensor(single):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(single, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=rf"{name} is I8, not one of F32, F16, BF16"):
        load_pretrained(single)
