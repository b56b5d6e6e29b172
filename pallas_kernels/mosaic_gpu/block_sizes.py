"""Launch parameters of the "mosaic_gpu" implementation."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MosaicGpuBlockSizes:
    """Depth of each kernel's ring of tiles in shared memory. Tiles are 64 x 64: that is what the registers hold.

    Attributes:
      forward_stages: key and value tiles in flight in the forward pass, at least 2; up to 5 fit at head width 128.
      row_stages: the same in the backward pass over rows (dquery, dprobe); up to 4 fit at head width 64, 3 at 128.
      column_stages: row tiles in flight in the backward pass over keys (dkey, dvalue); up to 3 fit at head width 128.
    """

    forward_stages: int = 2
    row_stages: int = 2
    column_stages: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (stages := getattr(self, field.name)) < 2:
                raise ValueError(f"{field.name}: needs at least 2, got {stages}")
