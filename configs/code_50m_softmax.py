"""`code_50m` with softmax attention; the probe's parameters are in the wider MLP (0.1 % fewer in all)."""

import dataclasses

from configs import code_50m

config = dataclasses.replace(
    code_50m.config,
    model=dataclasses.replace(code_50m.config.model, attention="softmax", mlp_width=1536 + 168),
)
