"""`laptop` with softmax attention; the probe's parameters are in the wider MLP (0.04 % more in all)."""

import dataclasses

from configs import laptop

config = dataclasses.replace(
    laptop.config, model=dataclasses.replace(laptop.config.model, attention="softmax", mlp_width=448 + 43)
)
