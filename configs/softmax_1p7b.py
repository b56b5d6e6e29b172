"""`parallax_1p7b` with softmax attention: the paper's Transformer, without the probe's parameters."""

import dataclasses

from configs import parallax_1p7b

config = dataclasses.replace(
    parallax_1p7b.config, model=dataclasses.replace(parallax_1p7b.config.model, attention="softmax")
)
