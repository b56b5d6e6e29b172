import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from parallax_jax.model import TransformerLM
from train.__main__ import main
from train.config import (
    Config,
    ConfigError,
    LaunchConfig,
    MeshConfig,
    difference,
    load_preset,
    parse_command_line,
    preset_names,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_survive_json(name):
    config = load_preset(name)
    assert Config.from_json(config.to_json()) == config
    assert parse_command_line([name]) == (name, config)


def test_default_preset_is_laptop():
    assert parse_command_line([]) == ("laptop", load_preset("laptop"))


def test_flags_override_every_level():
    name, config = parse_command_line(
        ["tiny", "--steps", "7", "--model.attention", "softmax", "--optimizer.schedule", "cosine", "--data", "x"]
    )
    assert name == "tiny" and (config.steps, config.data) == (7, "x")
    assert (config.model.attention, config.optimizer.schedule) == ("softmax", "cosine")
    assert config.model.width == load_preset("tiny").model.width
    assert difference(load_preset("tiny"), config) == "model.attention is 'parallax' there and 'softmax' here"
    elsewhere = {"run_dir": "elsewhere", "mesh": MeshConfig(fsdp=4), "launch": LaunchConfig("host:1", 2, 0)}
    assert difference(config, dataclasses.replace(config, **elsewhere, profile=5)) is None


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["tiny", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for flag in ("--steps", "--data", "--model.width", "--optimizer.per-head", "--mesh.data", "--run-dir"):
        assert flag in text


BAD = {
    "tinny": "unknown preset 'tinny': choose one of .*tiny.*did you mean tiny",
    "tiny --stepz 3": "Unrecognized options: --stepz, 3; perhaps you meant --steps",
    "tiny --model.widht 3": "Unrecognized options: --model.widht",
    "tiny --steps x": "Error parsing --steps: .*'x'",
    "tiny --steps 0": "steps=0: it must be 1 or more",
    "tiny --optimizer.name sgd": "invalid choice 'sgd' .*muon",
    "tiny --model.num-kv-heads 3": "num_kv_heads=3 is not allowed: it must be a divisor of num_heads=2",
    "tiny --model.vocab-size 99": "model.vocab_size=99: it must be 256 or more",
    "tiny --batch-size 9 --accumulation-steps 2": "batch_size=9: it must be a multiple of accumulation_steps=2",
    "tiny --data /no/such/text": "data='/no/such/text': no such file or folder",
    "tiny --mesh.data 1000": "mesh data=1000 .* needs 1000 devices and there are",
    "tiny --mesh.data 1 --mesh.fsdp 3": "batch_size / accumulation_steps=8 must be a multiple of 3",
    "tiny --mesh.data 1 --mesh.tensor 3": "model.num_heads=2 must be a multiple of 3",
    "tiny --mesh.data 1 --mesh.context 3": "seq_len=64 must be a multiple of 6",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_writes_nothing(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=BAD[line]) as error:
        main(line.split())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unusable_run_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for folder in ("file/run", "other", "file"):
        with pytest.raises(ConfigError, match=rf"run_dir='{folder}' cannot be made .*: choose another"):
            main(["tiny", "--mesh.data", "1", "--run-dir", folder])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other", "thesis.tex"]


@pytest.mark.parametrize(
    "arguments", [["train", "nothing"], ["train.evaluate", "no/run"], ["train.generate", "no/run"]]
)
def test_commands_exit_with_code_2_and_one_line(arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_softmax_preset_has_as_many_parameters():
    def count(name):
        model = TransformerLM(load_preset(name).model)
        abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
        return sum(leaf.size for leaf in jax.tree.leaves(abstract))

    assert count("laptop") == pytest.approx(1e6, rel=0.05)
    assert count("laptop_softmax") == pytest.approx(count("laptop"), rel=1e-3)
