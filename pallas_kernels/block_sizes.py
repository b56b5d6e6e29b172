"""Block sizes: one frozen dataclass per backend, defaults from a tuned table per device, else from a heuristic."""

import dataclasses
import functools
import importlib.resources
import json

from pallas_kernels.device import HOPPER_CORES


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
class _TritonPasses:
    """Launches of a route of the "triton" implementation; which class names them decides the route.

    Attributes:
      forward: the forward pass.
      rows: the backward pass over query rows (dquery, dprobe).
      columns: the backward pass over keys (dkey, dvalue).
    """

    forward: TritonPass
    rows: TritonPass
    columns: TritonPass


class TritonBlockSizes(_TritonPasses):
    """Launches of the "triton" implementation's kernels in Pallas: forward, rows, columns."""


class TritonLangBlockSizes(_TritonPasses):
    """Launches of the "triton" implementation's kernels in the Triton language: forward, rows, columns."""


@dataclasses.dataclass(frozen=True)
class MosaicGpuBlockSizes:
    """Rings of tiles in shared memory, of the "mosaic_gpu" implementation. Tiles are 64 x 64: more spills registers.

    Attributes:
      forward_stages: key and value tiles in flight in the forward pass, at least 2; up to 5 fit at head width 128.
      backward_stages: row tiles in flight in the backward pass; up to 4 fit at head width 64, 2 at 128.
    """

    forward_stages: int = 2
    backward_stages: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (stages := getattr(self, field.name)) < 2:
                raise ValueError(f"{field.name}: needs at least 2, got {stages}")


@dataclasses.dataclass(frozen=True)
class _TritonDecode:
    """Launch of decode by a route of the "triton" implementation; which class names it decides the route.

    Attributes:
      block_k: keys in a tile, a power of two >= 16; a tile may span pages, each row then has its own page's number.
      num_splits: programs that share the keys of one kv head, a power of two.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline along the loop.
      rotate: whether every sequence begins at another tile. Those that begin at the same one and keep step read
        addresses that differ by the size of a sequence's cache, which memory serves more slowly.
    """

    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int
    rotate: bool = False

    @classmethod
    def heuristic(cls, query, key, value, mask, page_table):
        """Launches that fit registers and shared memory; splits until two programs a core run, each with keys enough.

        What a program can have in flight at once it reads alone: a merge would take as long. The arguments are those of
        a backend's `decode`. The numbers come from sweeps (docs/results/decode.md).
        """
        size, row_blocks = decode_rows(query, key, value)
        programs, num_keys, width = _decode_size(query, key, value, mask, page_table)
        programs *= row_blocks
        fewest = 32 if num_keys <= 256 and width >= 128 else 64
        splits = max(1, min(256 // programs, num_keys // fewest, 128))
        splits = 1 << (splits.bit_length() - 1)
        if query.dtype.itemsize == 4:
            return cls(16, splits, 8, 3)
        held = size * width  # elements of each accumulator
        if held > 4096:
            return cls(32 if width <= 128 else 16, splits, 8, 3)
        if held > 2048:
            return cls(32, splits, 4, 3)
        width = max(width, 64)
        if programs <= 128 and num_keys * width <= DECODE_AT_ONCE:
            block_k = min(128, DECODE_AT_ONCE // width)
            return cls(block_k, 1, 4, 2 if num_keys <= block_k else 3)
        if 64 < programs <= 128 and num_keys <= 512 and width == 64:  # a merge would still take longer
            return cls(128, 1, 4, 3)
        if splits == 1 and width <= 128:
            long = num_keys >= DECODE_LONG
            if long and width == 64 and programs > 512:  # enough programs a core without a second warp
                return cls(64, 1, 1, 2, rotate=True)
            if long or (256 < programs <= 1024 and num_keys >= 256):  # with larger tiles 1.3 and 2.6 waves of programs
                return cls(4096 // width, 1, 2, 4, rotate=long)
        keys = num_keys // splits
        if width == 64 and splits > 1 and programs * num_keys * width >= MEMORY_BOUND:
            return cls(64, splits, 2, 4)
        block_k = min(8192 // width, max(fewest, 1 << (keys.bit_length() - 1)))
        num_warps = 4 if keys <= block_k and width >= 128 else 2  # of one tile nothing is left to read meanwhile
        return cls(block_k, splits, num_warps, 2 if keys < 2 * block_k else 3)


class TritonDecodeBlockSizes(_TritonDecode):
    """Launch of decode's kernels in Pallas: block_k, num_splits, num_warps, num_stages, rotate."""


class TritonLangDecodeBlockSizes(_TritonDecode):
    """Launch of decode's kernels in the Triton language: block_k, num_splits, num_warps, num_stages, rotate."""


# What both routes of "triton" agree on in decode.
DECODE_ROW_BYTES = 16384  # of queries that a program holds; larger groups are cut into blocks of rows
MEMORY_BOUND = 1 << 24  # keys times columns of all heads x sequences, more than Hopper's second-level cache holds
DECODE_AT_ONCE = 16384  # keys times columns that a program has in flight at once
DECODE_LONG = 4096  # keys from which on programs that read whole sequences begin at different tiles
DECODE_TURN = 37  # tiles by which the start of a program lies behind that of the one before


def decode_capacity(key, page_table) -> int:
    """Keys that a sequence has room for."""
    return key.shape[1] * (1 if page_table is None else page_table.shape[1])


def _decode_size(query, key, value, mask, page_table) -> tuple[int, int, int]:
    """(kv heads of all sequences, the most keys that one has in sight, columns of a tile)."""
    num_keys = decode_capacity(key, page_table)
    if mask.window is not None:
        num_keys = min(num_keys, mask.window + query.shape[1] - 1)
    return query.shape[0] * key.shape[2], num_keys, _decode_width(key, value)


def _decode_width(key, value) -> int:
    """Columns of the wider tile, powers of two."""
    return max(16, 1 << (max(key.shape[3], value.shape[3]) - 1).bit_length())


def decode_merge(num_splits: int, width: int) -> tuple[int, int]:
    """(columns, warps) of a program that merges the splits of one row of `width` columns, a power of two.

    The more splits, the fewer columns and the more warps: what a thread does one after the other is most of the time.
    """
    if num_splits <= 4:
        return width, 1
    return (min(width, 32), 1) if num_splits <= 16 else (min(width, 16), 4)


def decode_rows(query, key, value) -> tuple[int, int]:
    """(size, number) of the blocks that the query rows of a kv head are cut into: as many rows as registers hold.

    8 where they are so few that queries and probes fit one tile of a tensor core together.
    """
    total = query.shape[1] * query.shape[2] // key.shape[2]
    most = DECODE_ROW_BYTES // (_decode_width(key, value) * query.dtype.itemsize)
    size = 8 if total <= 8 else max(16, min(1 << (total - 1).bit_length(), most))
    return size, -(-total // size)


@dataclasses.dataclass(frozen=True)
class MosaicTpuPass:
    """Tiles of one TPU kernel, in multiples of the 128 lanes.

    Attributes:
      block_q: query rows in a tile.
      block_k: keys in a tile.
    """

    block_q: int
    block_k: int

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 128 or size % 128:
                raise ValueError(f"{name}: must be a multiple of 128, got {size}")


@dataclasses.dataclass(frozen=True)
class MosaicTpuBlockSizes:
    """Tiles of the "mosaic_tpu" implementation.

    Attributes:
      forward: the forward pass.
      rows: the backward pass over query rows (dquery, dprobe).
      columns: the backward pass over keys (dkey, dvalue).
    """

    forward: MosaicTpuPass
    rows: MosaicTpuPass
    columns: MosaicTpuPass


@dataclasses.dataclass(frozen=True)
class MosaicTpuDecodeBlockSizes:
    """Tiles of the "mosaic_tpu" implementation of decode.

    Attributes:
      block_k: keys of all kv heads that one step reads, a multiple of 16; in pages as many whole pages, at least one,
        or a part of a larger page.
    """

    block_k: int

    def __post_init__(self):
        if self.block_k < 16 or self.block_k % 16:
            raise ValueError(f"block_k: must be a multiple of 16, got {self.block_k}")


@dataclasses.dataclass(frozen=True)
class MosaicGpuDecodeBlockSizes:
    """Launch of the "mosaic_gpu" implementation of decode.

    Attributes:
      block_k: keys of a tile: 32, 64 or 128.
      num_splits: programs that share the keys of a kv head, a cluster: 1 to 8.
      num_groups: warpgroups of a program, each with tiles of its own: 1 or 2.
      num_stages: tiles of keys and values that a warpgroup has under way.
    """

    block_k: int
    num_splits: int
    num_groups: int
    num_stages: int

    def __post_init__(self):
        allowed = {"block_k": (32, 64, 128), "num_splits": range(1, 9), "num_groups": (1, 2), "num_stages": range(1, 9)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed are {', '.join(map(str, values))}")

    @property
    def num_parts(self) -> int:
        """Warpgroups that share the keys of a kv head."""
        return self.num_splits * self.num_groups

    @classmethod
    def heuristic(cls, query, key, value, mask, page_table) -> "MosaicGpuDecodeBlockSizes":
        """As many programs a head as find room, with tiles as large as leaves every program one.

        The arguments are those of a backend's `decode`. The numbers come from sweeps (docs/results/decode.md).
        """
        programs, num_keys, width = _decode_size(query, key, value, mask, page_table)
        fits = page_table is None or key.shape[1] % 128 == 0 or 128 % key.shape[1] == 0
        launch = cls._of_many if programs > HOPPER_CORES else cls._of_few
        return launch(programs, num_keys, width, 128 if fits else 64)

    @classmethod
    def _of_few(cls, programs: int, num_keys: int, width: int, block_k: int) -> "MosaicGpuDecodeBlockSizes":
        """The launch where each head has a core or several.

        Clusters of more than two programs need their cores in one part of the chip: a quarter of all is left to choose
        from, or programs are small enough that several run on a core. Long heads of 128 are then shared by fewer.
        """
        if HOPPER_CORES // 12 < programs <= HOPPER_CORES * 3 // 8 and (num_keys >= 4096 or programs > 32):
            if width == 128 and num_keys >= 8192:
                splits = max(4, HOPPER_CORES * 9 // 8 // programs)
            else:
                quarters = (9 if num_keys >= 4096 else 6) if width == 64 else 7 if programs <= 32 else 6
                splits = HOPPER_CORES * quarters // 4 // programs
            splits = min(8, splits, -(-num_keys // block_k))
            is_alone = splits * programs <= HOPPER_CORES
            return cls(block_k, splits, 1, 2 if is_alone and width == 64 else 1)
        splits = max(min(8, HOPPER_CORES * 3 // 4 // programs), 2 if 2 * programs <= HOPPER_CORES else 1)
        is_far, is_wide = programs * num_keys * width >= MEMORY_BOUND, width == 128
        if is_far and is_wide and splits == 1:
            block_k = 64
        at_once = max(splits, min(4, HOPPER_CORES // programs))  # where each has one tile
        while block_k > 32 and programs < 32 and num_keys * 2 < at_once * block_k:
            block_k //= 2
        num_tiles = -(-num_keys // block_k)
        most = -(-num_tiles // (at_once if num_tiles <= at_once else splits))  # tiles of a program
        splits = -(-num_tiles // most)
        can_pair = splits <= 2 if most == 2 else most > 3 and (splits > 2 or not is_wide)
        can_pair &= 2 * splits <= num_tiles and most * block_k >= 256 and not (is_far and splits <= 2)
        groups = 2 if can_pair else 1
        room = 3 * 16384 // (groups * block_k * width)  # in shared memory, for tiles of each group
        most_stages = 1 if can_pair and most <= 4 else 2
        return cls(block_k, splits, groups, min(-(-most // groups), room, most_stages))

    @classmethod
    def _of_many(cls, programs: int, num_keys: int, width: int, block_k: int) -> "MosaicGpuDecodeBlockSizes":
        """The launch where there are more heads x sequences than cores.

        Several programs run on a core, each with a single tile of keys and one of values on its way: with more, memory
        is slower. Long heads of 128 that do not all find a place at once are shared by two programs.
        """
        is_crowded = programs > 3 * HOPPER_CORES
        if width == 64:
            return cls(64 if num_keys >= 4096 and is_crowded else block_k, 1, 1, 1)
        if num_keys < 2048:
            return cls(block_k, 1, 1, 1)
        return cls(block_k, 2, 1, 1) if is_crowded else cls(64, 1, 1, 1)

    @classmethod
    def outrun(cls, query, key, value, mask, page_table) -> str | None:
        """Why other kernels are faster, or None: they split keys of few heads among more programs."""
        programs, num_keys, width = _decode_size(query, key, value, mask, page_table)
        keys = num_keys / cls.heuristic(query, key, value, mask, page_table).num_splits  # of a program
        is_slow = programs < 8 and keys > (512 if programs >= 4 else 256)
        # Clusters leave some of the cores idle, which memory forgives up to so many keys.
        has_clusters = width == 128 and 16 < programs <= HOPPER_CORES * 3 // 8
        is_slow |= has_clusters and programs * num_keys * width >= 6 * MEMORY_BOUND
        if page_table is not None:
            # A tile in several pages starts late, and the few tiles of few programs do not hide it.
            hides_two = width == 128 and programs <= 8 and key.shape[1] >= 64
            is_slow |= key.shape[1] < 128 and programs <= 16 and keys >= 2048 and not hides_two
            is_slow |= key.shape[1] < 16  # which nobody timed
        return f"slower with {programs} heads x sequences of {num_keys} keys" if is_slow else None


KIB = 1024
# Shared memory that one program may take, by a part of the device's name.
SHARED_MEMORY = {"H100": 227 * KIB, "H200": 227 * KIB, "GH200": 227 * KIB, "B200": 227 * KIB, "A100": 163 * KIB}
SMALLEST_SHARED_MEMORY = 99 * KIB  # compute capability 8.6, 8.9 and 12.0: the consumer cards, A10, L4, L40

# (bits, tile width) -> launches of forward, rows and columns. Those of 16 bits compile for Hopper without a spill in
# plain causal and full calls. Only (16, 128) comes from timings on an H100 (docs/results/triton.md).
_HOPPER = {
    (16, 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    (16, 128): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 64, 4, 2)),
    (16, 256): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    (32, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (32, 128): ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 4, 2)),
    (32, 256): ((32, 16, 8, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
}


def shared_memory_limit(device_kind: str) -> int:
    """Bytes of shared memory that one program may take."""
    return next((size for name, size in SHARED_MEMORY.items() if name in device_kind), SMALLEST_SHARED_MEMORY)


def triton_shared_memory(name: str, launch: TritonPass, bits: int, width: int) -> int:
    """Bytes of shared memory that a kernel's tiles take, an estimate from above."""
    rows, keys = launch.block_q, launch.block_k
    # Tiles held through the loop, and tiles of one step of it (the pipeline holds `num_stages` of these).
    held, step = {"forward": (2 * rows, 2 * keys), "rows": (3 * rows, 2 * keys), "columns": (2 * keys, 3 * rows)}[name]
    return (held + step * launch.num_stages) * width * bits // 8 + rows * keys * bits // 8


def _fit(name: str, launch: TritonPass, bits: int, width: int, limit: int) -> TritonPass:
    """The launch with fewer stages, then smaller tiles, until it fits."""
    while triton_shared_memory(name, launch, bits, width) > limit:
        if launch.num_stages > 2:
            launch = dataclasses.replace(launch, num_stages=launch.num_stages - 1)
        elif max(launch.block_q, launch.block_k) > 16:
            larger = "block_q" if launch.block_q >= launch.block_k else "block_k"
            launch = dataclasses.replace(launch, **{larger: getattr(launch, larger) // 2}, num_warps=4)
        else:
            break
    return launch


@functools.cache
def _tuned() -> dict[str, dict]:
    """Tuned tables by a part of the device's name, as `python -m benchmarks.tune` writes them."""
    files = importlib.resources.files("pallas_kernels").joinpath("tuned").iterdir()
    tables = (json.loads(file.read_text()) for file in files if file.name.endswith(".json"))
    return {table["device"]: table for table in tables}


# The same for the kernels in the Triton language, from the registers and spills that ptxas reports: none was timed.
_HOPPER_LANG = {
    (16, 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    (16, 128): ((128, 64, 8, 3), (128, 64, 8, 2), (32, 64, 4, 3)),
    (16, 256): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (32, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (32, 128): ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 4, 2)),
    (32, 256): ((32, 16, 8, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
}
_PASSES = ("forward", "rows", "columns")
_TILE_WIDTHS = (64, 128, 256)


def _table(device_kind: str) -> dict:
    """The device's tuned table, empty where there is none."""
    return next((table for device, table in _tuned().items() if device in device_kind), {})


def _launches(backend: str, heuristic: dict, device_kind: str, bits: int, head_dim: int, value_dim: int):
    width = next(w for w in _TILE_WIDTHS if max(head_dim, value_dim) <= w)
    tuned = _table(device_kind).get(backend, {}).get(f"{bits}-bit {width}")
    if tuned is not None:
        return [TritonPass(*tuned[name]) for name in _PASSES]
    limit = shared_memory_limit(device_kind)
    launches = (TritonPass(*launch) for launch in heuristic[bits, width])
    return [_fit(name, launch, bits, width, limit) for name, launch in zip(_PASSES, launches, strict=True)]


@functools.cache
def triton_block_sizes(device_kind: str, bits: int, head_dim: int, value_dim: int) -> TritonBlockSizes:
    """Launches for a device: tuned if a table has them, else Hopper's, made to fit the device's shared memory.

    Args:
      device_kind: as `jax.Device.device_kind` names it.
      bits: of an element, 16 or 32.
      head_dim: H.
      value_dim: Hv.
    """
    return TritonBlockSizes(*_launches("triton", _HOPPER, device_kind, bits, head_dim, value_dim))


@functools.cache
def triton_lang_block_sizes(device_kind: str, bits: int, head_dim: int, value_dim: int) -> TritonLangBlockSizes:
    """`triton_block_sizes` for the kernels in the Triton language."""
    return TritonLangBlockSizes(*_launches("triton_lang", _HOPPER_LANG, device_kind, bits, head_dim, value_dim))


def faster(backends: tuple[str, ...], passes: tuple[str, ...], device_kind: str, bits: int, width: int) -> list[str]:
    """`backends`, by the tuned table's time for these passes together; those that it does not hold keep their order.

    Args:
      backends: names of the table's sections.
      passes: of "forward", "rows", "columns" and "decode".
      device_kind: as `jax.Device.device_kind` names it.
      bits: of an element, 16 or 32.
      width: the larger of H and Hv.
    """
    times = _table(device_kind).get("milliseconds", {})
    key = f"{bits}-bit {next(w for w in _TILE_WIDTHS if width <= w)}"

    def milliseconds(backend: str) -> float:
        found = times.get(backend, {}).get(key, {})
        return sum(found.get(name, float("inf")) for name in passes)

    return sorted(backends, key=milliseconds)


# Vector memory of a TPU core, by the device's name as JAX gives it; a kernel may take three quarters of it.
VMEM = {"TPU v5 lite": 128 << 20, "TPU v5": 64 << 20, "TPU v6 lite": 128 << 20, "TPU7x": 64 << 20}
SMALLEST_VMEM = 16 << 20


def vmem_limit(device_kind: str) -> int:
    """Bytes of vector memory that one TPU kernel may take."""
    return VMEM.get(device_kind, SMALLEST_VMEM) * 3 // 4


@functools.cache
def mosaic_tpu_block_sizes(device_kind: str, bits: int, head_dim: int, value_dim: int) -> MosaicTpuBlockSizes:
    """Tiles for a TPU, from the roofline in docs/results/mosaic_tpu.md: nothing here was timed on one.

    Args:
      device_kind: as `jax.Device.device_kind` names it.
      bits: of an element, 16 or 32.
      head_dim: H.
      value_dim: Hv.
    """
    if vmem_limit(device_kind) < 32 << 20 or bits == 32 or max(head_dim, value_dim) > 128:
        return MosaicTpuBlockSizes(*(MosaicTpuPass(256, 512),) * 3)
    return MosaicTpuBlockSizes(MosaicTpuPass(512, 1024), MosaicTpuPass(512, 1024), MosaicTpuPass(512, 512))
