"""Block sizes: one frozen dataclass per backend, defaults from a tuned table per device, else from a heuristic."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class XlaBlockSizes:
    """Tiles of the "xla" implementation.

    Attributes:
      block_q: query rows in a tile.
      block_k: keys in a tile.
    """

    block_q: int = 512
    block_k: int = 512
