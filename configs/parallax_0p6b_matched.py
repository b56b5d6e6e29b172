"""`parallax_0p6b` with the attention compute of `softmax_0p6b`: half as wide heads, a wider MLP (its Parallax†)."""

import dataclasses

from configs import parallax_0p6b

config = dataclasses.replace(
    parallax_0p6b.config, model=dataclasses.replace(parallax_0p6b.config.model, head_dim=64, mlp_width=4480)
)
