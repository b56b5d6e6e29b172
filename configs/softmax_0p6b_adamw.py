"""`softmax_0p6b` with the optimizer of `parallax_0p6b_adamw`."""

import dataclasses

from configs import parallax_0p6b_adamw, softmax_0p6b

config = dataclasses.replace(softmax_0p6b.config, optimizer=parallax_0p6b_adamw.config.optimizer)
