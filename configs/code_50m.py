"""49 M parameters on the source of the installed Python packages, 100 to 200 MB of it: minutes on one H100."""

from parallax_jax.model import ModelConfig
from train.config import Config, OptimizerConfig

config = Config(
    model=ModelConfig(
        vocab_size=16384, num_layers=12, width=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_width=1536
    ),
    optimizer=OptimizerConfig(learning_rate=0.01, decay_fraction=0.5, weight_decay=0.1),
    data="site-packages",
    tokenizer="bpe",
    seq_len=2048,
    batch_size=64,
    steps=1200,
    eval_interval=200,
    checkpoint_interval=600,
)
