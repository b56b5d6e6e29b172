"""Parallax with 0.6 B parameters as in the paper (arXiv 2605.29157, tables 2 and 5): 20,000 updates of 3.93 M tokens.

The paper trained on 78.6 B tokens of Ultra-FineWeb with Qwen's tokenizer, on one node of 8 H100s, the parameters split
over all of them: `--mesh.fsdp 8`. Pass `--data`. A part of the batch is 32 rows, 4 for each of 8 devices: with fewer
devices raise `--accumulation-steps`.
"""

from parallax_jax.model import ModelConfig
from train.config import Config, OptimizerConfig

config = Config(
    model=ModelConfig(
        vocab_size=151936,
        num_layers=28,
        width=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=3072,
        scan_unroll=28,
    ),
    optimizer=OptimizerConfig(newton_schulz_dtype="bfloat16"),
    tokenizer="bpe",
    seq_len=4096,
    batch_size=960,
    accumulation_steps=30,
    steps=20_000,
    eval_interval=500,
    checkpoint_interval=500,
)
