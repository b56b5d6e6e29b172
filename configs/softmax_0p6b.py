"""`parallax_0p6b` with softmax attention: the paper's Transformer, without the probe's parameters."""

import dataclasses

from configs import parallax_0p6b

config = dataclasses.replace(
    parallax_0p6b.config, model=dataclasses.replace(parallax_0p6b.config.model, attention="softmax")
)
