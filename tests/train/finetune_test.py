import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import finetune
from parallax_jax import TransformerLM, load_pretrained
from train import diagnose
from train.config import Config, ConfigError, MeshConfig, OptimizerConfig, parse_command_line
from train.data import load_corpus
from train.loop import train as run_training
from train.metrics import read_metrics
from train.optimizer import make_optimizer, stop_frozen
from train.run import load_checkpoint
from train.state import abstract_state, init_state, make_mesh
from train.tokenizer import ByteTokenizer, FileTokenizer, train_bpe

QWEN3 = Path(__file__).parents[1] / "fixtures" / "qwen3_byte_tiny"
TEXT = np.frombuffer(Path(dataclasses.__file__).read_bytes()[: 4 * 65], np.uint8).reshape(4, 65).astype(np.int32)


@pytest.fixture(scope="module")
def converted():
    return load_pretrained(QWEN3, attention="parallax", dtype="float32")


def loss_curves(config, optimizer_config, starts):
    """Losses of one batch before each update, and the parameters after the last, from each (parameters, steps)."""
    optimizer = make_optimizer(optimizer_config, 1000)
    model = TransformerLM(dataclasses.replace(config, implementation="reference"))

    def loss(params):
        logits = model.apply({"params": stop_frozen(optimizer_config, params)}, TEXT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TEXT[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for params, steps in starts:
        state, losses = optimizer.init(params), []
        for _ in range(steps):
            params, state, value = step(params, state)
            losses.append(float(value))
        yield np.array(losses), params


@pytest.mark.parametrize(
    "optimizer", [finetune.config.optimizer, OptimizerConfig("adamw", 1e-3, probe_norm_rate=10.0, base_rate=0.1)]
)
def test_probe_leaves_softmax_smoothly(optimizer, converted):
    config, params = converted
    alone = dataclasses.replace(optimizer, base_rate=0.0)
    # The other way to start from softmax attention, W_R = 0 under a norm of gain 1, jumps.
    attention = params["layers"]["attention"]
    zero = {"kernel": jnp.zeros_like(attention["probe"]["kernel"])}
    one = {"scale": jnp.ones_like(attention["probe_norm"]["scale"])}
    jumping = {**params, "layers": {**params["layers"], "attention": {**attention, "probe": zero, "probe_norm": one}}}
    (losses, trained), (jump, _) = loss_curves(config, alone, [(params, 8), (jumping, 2)])
    falls = -np.diff(losses)
    assert (falls > 0).all(), losses
    assert falls.max() < 0.1, "no jump either way"
    assert abs(jump[0] - losses[0]) < 1e-4 and jump[1] > jump[0] + 1
    before, after = flatten_dict(params), flatten_dict(trained)
    moved = {name[-2] for name in before if (np.asarray(before[name]) != np.asarray(after[name])).any()}
    assert moved == {"probe", "probe_norm"}


def test_gradient_reaches_the_gain_first_and_the_projection_next(converted):
    config, params = converted
    model = TransformerLM(dataclasses.replace(config, implementation="reference"))

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = model.apply({"params": params}, TEXT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TEXT[:, 1:]).mean()

    at_start = gradient(params)["layers"]["attention"]
    assert at_start["probe_norm"]["scale"].any(-1).all() and not at_start["probe"]["kernel"].any()
    params = jax.tree.map(lambda p: p, params)
    params["layers"]["attention"]["probe_norm"]["scale"] += 0.01
    assert gradient(params)["layers"]["attention"]["probe"]["kernel"].any((1, 2, 3)).all()


def test_rates_of_probe_and_rest(converted):
    _, params = converted
    grads = jax.tree.map(lambda p: jnp.ones_like(p), params)

    def update(**changes):
        optimizer = make_optimizer(OptimizerConfig("adamw", weight_decay=0.1, decay_fraction=0.0, **changes), 100)
        return flatten_dict(optimizer.update(grads, optimizer.init(params), params)[0])

    plain, scaled = update(), update(probe_rate=3.0, base_rate=0.5, probe_norm_rate=0.15)
    for name, value in plain.items():
        factor = {"probe": 3.0, "probe_norm": 10.0}.get(name[-2], 0.5)
        np.testing.assert_allclose(scaled[name], factor * value, rtol=1e-5, err_msg=str(name))


def test_fine_tunes_the_probe_alone_from_a_folder(tmp_path, capsys):
    source = Path(dataclasses.__file__).read_text()
    (tmp_path / "text.py").write_text(source * (2_100_000 // len(source)))
    flags = f"--data {tmp_path}/text.py --optimizer.base-rate 0 --steps 3 --seq-len 64 --batch-size 8 --mesh.data 1"
    flags += " --diagnose-rows 2"
    preset, config = parse_command_line(["finetune", "--init-from", str(QWEN3), *flags.split()])
    assert (config.model.num_layers, config.model.width, config.model.vocab_size) == (4, 128, 256)
    assert config.model.attention == "parallax" and config.tokenizer == "bytes"
    assert Config.from_json(config.to_json()) == config
    assert run_training(config, tmp_path / "run", preset) == 0
    first = next(record for record in read_metrics(tmp_path / "run") if "loss" in record)
    assert 1.2 < first["loss"] < 2.2  # the pretrained model's, not that of random weights, above 5
    _, start = load_pretrained(QWEN3, attention="parallax", dtype="float32", seed=config.seed)
    start, end = flatten_dict(start), flatten_dict(load_checkpoint(str(tmp_path / "run")).params)
    moved = {name[-2] for name in start if (np.asarray(start[name]) != np.asarray(end[name])).any()}
    assert moved == {"probe", "probe_norm"}

    diagnose.main([str(tmp_path / "run"), "--rows", "2"])
    statistics = json.loads((tmp_path / "run" / "diagnostics-3.json").read_text())
    assert len(statistics) == 14 and all(len(values) == 4 for values in statistics.values())
    assert min(statistics["correction_ratio"]) > 0 and max(statistics["correction_ratio"]) < 1  # three small steps
    assert (tmp_path / "run" / "diagnostics-3.png").stat().st_size > 10_000
    logged = read_metrics(tmp_path / "run")[-1]
    assert logged["step"] == 3 and logged["correction_ratio/2"] == pytest.approx(statistics["correction_ratio"][2])


def test_softmax_stays_softmax_where_the_preset_says_so():
    _, config = parse_command_line(["laptop_softmax", "--init-from", str(QWEN3)])
    assert config.model.attention == "softmax" and config.model.mlp_width == 384


def test_unusable_folder_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"init_from='/no/such': /no/such does not exist"):
        parse_command_line(["tiny", "--init-from", "/no/such"])
    folder = shutil.copytree(QWEN3, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no eos_token_id, which parts documents: pass --separator"):
        parse_command_line(["tiny", "--init-from", str(folder)])
    _, config = parse_command_line(["tiny", "--init-from", str(folder), "--separator", "0"])
    assert (config.tokenizer, config.separator) == ("pretrained", 0)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_corpus(config)
    with pytest.raises(ValueError, match="tokenizer='pretrained': set init_from"):
        Config(model=finetune.config.model, tokenizer="pretrained")
    with pytest.raises(ValueError, match=r"optimizer\.base_rate=0\.0: .* without a probe"):
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, attention="softmax"),
            optimizer=dataclasses.replace(config.optimizer, base_rate=0.0),
        )


def test_tokenizer_of_the_folder_is_used(tmp_path):
    folder = shutil.copytree(QWEN3, tmp_path / "model")
    train_bpe(["def f(x):\n    return x\n" * 9], 259, folder / "tokenizer.json")
    fields = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [0, 5]}
    (folder / "config.json").write_text(json.dumps(fields))
    _, config = parse_command_line(["tiny", "--init-from", str(folder)])
    assert (config.tokenizer, config.separator) == ("pretrained", 0)
    with pytest.raises(ConfigError, match="the tokenizer has 259 tokens and the model 256: they do not fit"):
        load_corpus(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    tokenizer = load_corpus(config).tokenizer
    assert isinstance(tokenizer, FileTokenizer) and tokenizer.separator == 0
    (ids,) = tokenizer.encode(["def f(x):"])
    assert len(ids) < len("def f(x):") and tokenizer.decode([*ids, 0]) == "def f(x):\ufffd"
    with pytest.raises(ConfigError, match=r"separator=400: .* has no such token"):
        FileTokenizer(folder / "tokenizer.json", 400)


def test_bytes_without_an_id_to_spare_part_documents_with_nul():
    tokenizer = ByteTokenizer(256)
    assert (tokenizer.separator, tokenizer.vocab_size) == (0, 256)
    assert tokenizer.decode([104, 105, 0]) == "hi\ufffd"
    assert ByteTokenizer(5000).vocab_size == 257


def test_mesh_shards_what_is_loaded():
    _, config = parse_command_line(["tiny", "--init-from", str(QWEN3)])
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    model = TransformerLM(config.model)
    optimizer = make_optimizer(config.optimizer, 10)
    abstract = abstract_state(model, optimizer, make_mesh(config))
    state = init_state(model, optimizer, abstract, 0, config.init_from)
    kernel = state.params["layers"]["attention"]["query"]["kernel"]
    assert kernel.sharding == abstract.params["layers"]["attention"]["query"]["kernel"].sharding
    assert kernel.addressable_shards[0].data.shape == (4, 64, 2, 32)
