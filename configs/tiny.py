"""For tests: seconds on one CPU core, and learns next to nothing."""

from parallax_jax.model import ModelConfig
from train.config import Config, OptimizerConfig

config = Config(
    model=ModelConfig(vocab_size=257, num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64),
    optimizer=OptimizerConfig(learning_rate=0.02),
    seq_len=64,
    batch_size=8,
    steps=20,
    log_interval=5,
    eval_interval=10,
    eval_batches=2,
    checkpoint_interval=5,
)
