"""One million parameters on bytes: a few minutes on two CPU cores."""

from parallax_jax.model import ModelConfig
from train.config import Config, OptimizerConfig

config = Config(
    model=ModelConfig(vocab_size=257, num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=448),
    optimizer=OptimizerConfig(learning_rate=0.02, decay_fraction=0.5, weight_decay=0.01),
    seq_len=256,
    batch_size=12,
    steps=240,
    eval_interval=80,
    checkpoint_interval=80,
)
