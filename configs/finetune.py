"""Fine-tunes a pretrained model that `--init-from FOLDER` names, the new probe faster than the rest.

The rest moves at a tenth of the rate; `--optimizer.base-rate 0` freezes it. The gain of the probe's norm starts from 0
and grows by up to 0.01 per update, so the model leaves softmax attention within a hundred of them.
"""

import dataclasses

from configs import laptop
from train.config import OptimizerConfig

config = dataclasses.replace(
    laptop.config,
    optimizer=OptimizerConfig(
        learning_rate=5e-3, probe_norm_rate=2.0, base_rate=0.1, decay_fraction=0.5, weight_decay=0.01
    ),
)
