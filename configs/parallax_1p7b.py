"""Parallax with 1.8 B parameters, the paper's larger model: twice the width and twice the tokens of `parallax_0p6b`."""

import dataclasses

from configs import parallax_0p6b

config = dataclasses.replace(
    parallax_0p6b.config,
    model=dataclasses.replace(parallax_0p6b.config.model, width=2048, mlp_width=6144),
    batch_size=1920,
    accumulation_steps=60,
)
