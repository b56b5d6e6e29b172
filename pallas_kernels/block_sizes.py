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


@dataclasses.dataclass(frozen=True)
class TritonPass:
    """One Triton kernel's launch.

    Attributes:
      block_q: query rows in a tile, a power of two >= 16.
      block_k: keys in a tile, a power of two >= 16.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline along the loop.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class TritonBlockSizes:
    """Launches of the "triton" implementation.

    Attributes:
      forward: the forward pass.
      rows: the backward pass over query rows (dquery, dprobe).
      columns: the backward pass over keys (dkey, dvalue).
    """

    forward: TritonPass = TritonPass(128, 64, 8, 3)
    rows: TritonPass = TritonPass(64, 64, 4, 2)
    columns: TritonPass = TritonPass(32, 64, 4, 3)


@dataclasses.dataclass(frozen=True)
class TritonDecodeBlockSizes:
    """Launch of the "triton" implementation of decode.

    Attributes:
      block_k: keys in a tile, a power of two >= 16; a page holds whole tiles, so paged caches may take a smaller one.
      num_splits: programs that share the keys of one kv head, a power of two.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline along the loop.
    """

    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int
