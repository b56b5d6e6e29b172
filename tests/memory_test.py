"""Host memory of loading a folder in the shape of Qwen3-0.6B, 1.2 GB of random bfloat16."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 28, 1024, 16, 8, 128, 3072, 151936

LOAD = """
import resource, sys, threading, time
import jax, jax.numpy as jnp
from parallax_jax import load_pretrained
jax.config.update("jax_platforms", "cpu")
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
jnp.zeros(1).block_until_ready()
before = peak = resident()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
config, params = load_pretrained(sys.argv[1], attention="softmax")
jax.block_until_ready(params)
done = True
thread.join()
print(before, peak, sum(p.nbytes for p in jax.tree.leaves(params)))
"""


def make_folder(folder):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": WIDTH}
    config |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config |= {"head_dim": HEAD_DIM, "intermediate_size": MLP, "tie_word_embeddings": True, "rope_theta": 1e6}
    tensors = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "model.norm.weight": draw(WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = draw(heads * HEAD_DIM, WIDTH)
        tensors[f"{layer}self_attn.o_proj.weight"] = draw(WIDTH, HEADS * HEAD_DIM)
        tensors |= {f"{layer}mlp.{name}_proj.weight": draw(MLP, WIDTH) for name in ("gate", "up")}
        tensors[f"{layer}mlp.down_proj.weight"] = draw(WIDTH, MLP)
        tensors |= {f"{layer}self_attn.{name}_norm.weight": draw(HEAD_DIM) for name in ("q", "k")}
        tensors |= {f"{layer}{name}_layernorm.weight": draw(WIDTH) for name in ("input", "post_attention")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_loads_in_little_more_than_its_size(tmp_path):
    make_folder(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model"], capture_output=True, text=True, check=True, env=environment
    )
    before, peak, loaded = map(int, done.stdout.split())
    print(
        f"file {size / 1e9:.3f} GB, loaded {loaded / 1e9:.3f} GB, peak {(peak - before) / size:.3f} of the file's size"
    )
    assert abs(loaded - size) < 1e5
    assert peak - before < 1.3 * size
