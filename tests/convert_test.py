import json
from pathlib import Path

import numpy as np

from parallax_jax.convert import main
from parallax_jax.pretrained import load_pretrained

QWEN3 = Path(__file__).parent / "fixtures" / "qwen3_byte_tiny"


def test_converts_with_tokenizer_and_special_tokens(tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (source / name).write_bytes((QWEN3 / name).read_bytes())
    fields = json.loads((source / "config.json").read_text()) | {"eos_token_id": 7}
    (source / "config.json").write_text(json.dumps(fields))
    (source / "tokenizer.json").write_text("{}")
    assert main([str(source), str(target), "--attention", "parallax", "--seed", "3"]) == 0
    assert "4 layers of parallax attention, width 128" in capsys.readouterr().out
    fields = json.loads((target / "config.json").read_text())
    assert fields["architectures"] == ["ParallaxForCausalLM"] and fields["dtype"] == "bfloat16"
    assert (fields["eos_token_id"], fields["max_position_embeddings"]) == (7, 512)
    assert (target / "tokenizer.json").exists() and (target / "generation_config.json").exists()
    _, params = load_pretrained(target)
    _, direct = load_pretrained(source, attention="parallax", seed=3)
    probe, same = (p["layers"]["attention"]["probe"]["kernel"].astype(np.float32) for p in (params, direct))
    np.testing.assert_array_equal(probe, same)


def test_one_line_for_what_cannot_be_converted(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/none does not exist: a folder with config.json and safetensors is needed\n"
    )
    assert not (tmp_path / "out").exists()
