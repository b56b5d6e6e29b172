"""Named calls of the operator: one list for tests, for `parallax_jax.compare`, for tuning and for benchmarks."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes and masks of one call of `parallax_attention`.

    Attributes:
      name: unique name.
      batch: B.
      queries: T.
      heads: N.
      head_dim: H.
      keys: S, default T.
      kv_heads: K, default N.
      value_dim: Hv, default H.
      scale: see `parallax_attention`.
      is_causal: see `parallax_attention`.
      query_offset: see `parallax_attention`.
      window: local_window_size.
      segments: number of packed segments per row; their borders are random, or even for "even" layouts.
      layout: "packed" (ids ascend), "even" (equal lengths), "scattered" (ids in any order).
      ragged: draws random key_value_seq_lengths, one of them 0 where the batch has more than one row.
    """

    name: str
    batch: int
    queries: int
    heads: int
    head_dim: int
    keys: int | None = None
    kv_heads: int | None = None
    value_dim: int | None = None
    scale: float | None = None
    is_causal: bool = True
    query_offset: int | None = None
    window: int | None = None
    segments: int | None = None
    layout: str = "packed"
    ragged: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of query, probe, key and value."""
        keys, kv_heads = self.keys or self.queries, self.kv_heads or self.heads
        query = (self.batch, self.queries, self.heads, self.head_dim)
        key = (self.batch, keys, kv_heads, self.head_dim)
        return query, query, key, (*key[:3], self.value_dim or self.head_dim)

    @property
    def cotangent_shape(self) -> tuple[int, ...]:
        """Shape of the output and its cotangent."""
        return (self.batch, self.queries, self.heads, self.value_dim or self.head_dim)

    def options(self, seed: int = 0) -> dict:
        """Keyword arguments of the call; random masks follow from the seed."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        options = dict(
            scale=self.scale,
            is_causal=self.is_causal,
            query_offset=self.query_offset,
            local_window_size=self.window,
        )
        if self.segments:
            ids = rng.integers(0, self.segments, (self.batch, self.queries))
            if self.layout == "packed":
                ids = np.sort(ids, axis=1)
            elif self.layout == "even":
                ids = np.broadcast_to(np.arange(self.queries) * self.segments // self.queries, ids.shape)
            options["segment_ids"] = jnp.asarray(ids, jnp.int32)
        if self.ragged:
            lengths = rng.integers(1, (self.keys or self.queries) + 1, self.batch)
            if self.batch > 1:
                lengths[0] = 0
            options["key_value_seq_lengths"] = jnp.asarray(lengths, jnp.int32)
        return {name: value for name, value in options.items() if value is not None}

    def operands(self, dtype, seed: int = 0) -> tuple[jax.Array, ...]:
        """Standard normal (query, probe, key, value, cotangent) in `dtype`."""
        keys = jax.random.split(jax.random.key(seed + zlib.crc32(self.name.encode())), 5)
        shapes = (*self.shapes, self.cotangent_shape)
        draw = lambda k, shape: jax.random.normal(k, shape, jnp.float32).astype(dtype)
        return tuple(draw(k, shape) for k, shape in zip(keys, shapes, strict=True))


# Awkward on purpose: nothing here is a multiple of a tile unless it says so.
CONFORMANCE = (
    Workload("one", 1, 1, 1, 32),
    Workload("seven", 2, 7, 2, 60),
    Workload("mqa", 2, 63, 4, 64, kv_heads=1),
    Workload("gqa_wide_head", 1, 111, 4, 100, kv_heads=2, keys=200),
    Workload("tiles", 1, 128, 2, 128),
    Workload("narrow_value", 1, 200, 2, 128, value_dim=60),
    Workload("wide_value", 2, 111, 2, 32, value_dim=100),
    Workload("head_256", 1, 63, 1, 256, value_dim=256),
    Workload("more_queries", 2, 200, 2, 64, keys=63),
    Workload("one_query", 2, 1, 4, 64, kv_heads=2, keys=111),
    Workload("window_1", 1, 63, 2, 32, window=1),
    Workload("window_20", 1, 200, 2, 64, window=20, kv_heads=1),
    Workload("window_77", 2, 200, 2, 60, window=77),
    Workload("window_offset", 1, 63, 2, 64, keys=200, window=70, query_offset=100),
    Workload("window_full", 1, 111, 2, 32, is_causal=False, window=50),
    Workload("packed", 2, 200, 2, 64, segments=5),
    Workload("packed_even", 1, 256, 2, 64, segments=2, layout="even"),
    Workload("packed_window", 1, 200, 4, 32, segments=3, window=33, kv_heads=2),
    Workload("packed_full", 2, 111, 2, 64, segments=3, is_causal=False),
    Workload("packed_ragged", 3, 111, 2, 32, segments=3, ragged=True),
    Workload("scattered", 2, 200, 2, 32, segments=4, layout="scattered"),
    Workload("ragged", 3, 111, 4, 64, kv_heads=2, keys=200, ragged=True),
    Workload("ragged_full", 3, 63, 2, 60, keys=111, ragged=True, is_causal=False),
    Workload("ragged_window", 3, 63, 2, 64, keys=200, ragged=True, window=90),
    Workload("full", 2, 63, 2, 64, keys=200, is_causal=False),
    Workload("offset_early", 1, 63, 2, 64, keys=200, query_offset=-10),
    Workload("offset_late", 1, 63, 2, 64, keys=111, query_offset=500),
    Workload("negative_scale", 1, 111, 2, 64, scale=-0.3),
    Workload("zero_scale", 1, 63, 2, 32, scale=0.0, window=20),
)

# Where errors are quoted: standard normal inputs, long enough that no row is special.
ACCURACY = (
    Workload("normal_1024", 1, 1024, 4, 128),
    Workload("normal_1024_gqa", 1, 1024, 8, 64, kv_heads=2),
)

# What people train and serve with; timed, tuned and compared, in bfloat16.
TRAINING = (
    Workload("train_2x4096", 2, 4096, 16, 128),
    Workload("train_1x8192", 1, 8192, 16, 128),
    Workload("train_4x2048", 4, 2048, 16, 128),
    Workload("train_1x16384", 1, 16384, 16, 128),
    Workload("d64_2x4096", 2, 4096, 16, 64),
    Workload("gqa_32_8", 2, 4096, 32, 128, kv_heads=8),
    Workload("qwen3_0p6b", 2, 4096, 16, 128, kv_heads=8),
    Workload("window_1024", 1, 16384, 16, 128, window=1024),
    Workload("packed_16x1024", 1, 16384, 16, 128, segments=16, layout="even"),
    Workload("full_2x4096", 2, 4096, 16, 128, is_causal=False),
    Workload("d256_2x4096", 2, 4096, 8, 256),
)

BY_NAME = {workload.name: workload for workload in (*CONFORMANCE, *ACCURACY, *TRAINING)}
