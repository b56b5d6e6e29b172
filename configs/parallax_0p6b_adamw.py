"""`parallax_0p6b` with the paper's AdamW (table 2b); `--optimizer.schedule cosine --optimizer.warmup-steps 200` too."""

import dataclasses

from configs import parallax_0p6b
from train.config import OptimizerConfig

config = dataclasses.replace(
    parallax_0p6b.config,
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=3e-4,
        adam_b1=0.9,
        adam_b2=0.95,
        adam_eps=1e-8,
        adam_weight_decay=0.1,
        embedding_rate=1.0,
        norm_rate=1.0,
    ),
)
