"""`softmax_0p6b` with as many parameters as `parallax_0p6b`: 24 query heads (the paper's Transformer†)."""

import dataclasses

from configs import softmax_0p6b

config = dataclasses.replace(softmax_0p6b.config, model=dataclasses.replace(softmax_0p6b.config.model, num_heads=24))
