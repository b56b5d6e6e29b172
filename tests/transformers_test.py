"""Qwen3 folders exchanged with transformers, in the Python that TORCH_PYTHON names (else this one)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parallax_jax import TransformerLM, load_pretrained, save_pretrained

PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)
BASE = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
BASE |= {"num_key_value_heads": 2, "intermediate_size": 80}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "biases": {"attention_bias": True, "num_key_value_heads": 4},
    "windows": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "num_key_value_heads": 1},
}


def peer(*args):
    script = Path(__file__).with_name("transformers_peer.py")
    done = subprocess.run([PYTHON, script, *args], capture_output=True, text=True, check=False)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip("torch and transformers are not installed")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree_both_ways(name, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peer("make", theirs, json.dumps(BASE | VARIANTS[name]))
    config, params = load_pretrained(theirs)
    with np.load(theirs / "expected.npz") as expected:
        ids, logits = expected["ids"].astype(np.int32), expected["logits"]
    np.testing.assert_allclose(TransformerLM(config).apply({"params": params}, ids), logits, atol=1e-4)
    converted, probed = load_pretrained(theirs, attention="parallax")
    np.testing.assert_allclose(TransformerLM(converted).apply({"params": probed}, ids), logits, atol=1e-4)
    save_pretrained(ours, config, params)
    peer("read", ours)
    with np.load(ours / "expected.npz") as read:
        np.testing.assert_allclose(read["logits"], logits, atol=1e-6)
