"""Key/value caches: contiguous, a ring for windowed layers, and paged. Pytrees, made once and updated in place.

Keys and values only: a probe is a second query, needed once. Under jit with the cache donated, an update writes the new
rows and copies nothing.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import Mask
from parallax_jax.decode import decode_at
from parallax_jax.sharding import constrain, write_per_device

if TYPE_CHECKING:
    from parallax_jax.model import ModelConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "lengths", "page_table"],
    meta_fields=["ring"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, or of a model's layers with the same lengths.

    Attributes:
      key: (B, S, K, H), or (num_pages, page_size, K, H) with a page table. A model's cache holds the layers stacked on
        axis 0 where the model scans over them, else a tuple of one array per layer.
      value: likewise, of width Hv.
      lengths: int32 (B,), tokens seen by each sequence.
      page_table: int32 (B, pages_per_sequence) as in `parallax_decode`, or None.
      ring: key s sits in row s % S, S being the window: older keys are overwritten, a sequence may be of any length.
    """

    key: Float[Array, "..."] | tuple
    value: Float[Array, "..."] | tuple
    lengths: Int[Array, " B"]
    page_table: Int[Array, "B P"] | None = None
    ring: bool = False

    @property
    def capacity(self) -> float:
        """Tokens that a sequence may have."""
        if self.ring:
            return math.inf
        page_size = jax.tree.leaves(self.key)[0].shape[-3]
        return page_size if self.page_table is None else self.page_table.shape[1] * page_size

    def grown(self, num_tokens: int, num_new: Int[Array, " B"] | None = None) -> Int[Array, " B"]:
        """Lengths after `num_tokens` more, `num_new` of them real; ValueError where they are known not to fit."""
        lengths = self.lengths + (num_tokens if num_new is None else num_new)
        if not isinstance(lengths, jax.core.Tracer) and int(lengths.max()) > self.capacity:
            raise ValueError(f"cache: has room for {self.capacity} tokens of a sequence, got {lengths.max()}")
        return lengths

    def attend(
        self,
        query: Float[Array, "B T N H"],
        probe: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        num_new: Int[Array, " B"] | None = None,
        *,
        local_window_size: int | None = None,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], "KVCache"]:
        """Appends the keys and values of T new tokens, then attends from those to everything their sequences hold.

        Args:
          query: queries of the new tokens.
          probe: their probes.
          key: their keys.
          value: their values.
          num_new: how many of a row's T tokens are new, the rest being padding at its end; None for all.
          local_window_size: as in `parallax_decode`.
          implementation: as in `parallax_decode`.

        Returns:
          The output, of which padding rows mean nothing, and the new cache.

        Raises:
          ValueError: the dtypes differ, or a sequence would outgrow the cache and that is known, outside jit. Inside,
            what does not fit is dropped and never lands on another sequence.
        """
        if key.dtype != self.key.dtype:
            raise ValueError(f"cache: holds {self.key.dtype}, got keys of {key.dtype}")
        lengths = self.grown(key.shape[1], num_new)
        attend = self._attend_ring if self.ring else self._attend
        out, new_key, new_value = attend(query, probe, key, value, lengths, local_window_size, implementation)
        return out, dataclasses.replace(self, key=new_key, value=new_value, lengths=lengths)

    def _attend(self, query, probe, key, value, lengths, window, implementation):
        position = self.lengths[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)
        is_new = position < lengths[:, None]
        if self.page_table is None:
            position = jnp.where(is_new & (position < self.key.shape[1]), position, self.key.shape[1])
            new_key, new_value = self._write(key, value, position)
        else:
            place = self._place(position, is_new)
            new_key, new_value = (
                x.at[place].set(new, mode="drop") for x, new in ((self.key, key), (self.value, value))
            )
        mask = Mask(self.lengths, lengths, window=window)
        options = {"scale": query.shape[-1] ** -0.5, "implementation": implementation}
        return decode_at(query, probe, new_key, new_value, mask, self.page_table, **options), new_key, new_value

    def _place(self, position, is_new):
        """Page of each token and its row there; out of range, where nothing is written, for tokens without a place."""
        num_pages, page_size = self.key.shape[:2]
        pages = self.page_table.shape[1]
        page = jnp.take_along_axis(self.page_table, jnp.minimum(position // page_size, pages - 1), axis=1)
        has_place = is_new & (position < pages * page_size) & (page >= 0)
        return jnp.where(has_place, page, num_pages), position % page_size

    def _write(self, key, value, position):
        """Key and value with the rows of a contiguous cache replaced; none where `position` is out of range."""

        def write(cache, new, position):
            sequence = jnp.arange(cache.shape[0], dtype=jnp.int32)[:, None]
            return cache.at[sequence, position].set(new, mode="drop")

        pairs = ((self.key, key), (self.value, value))
        return [write_per_device(write, cache, new, position) for cache, new in pairs]

    def _attend_ring(self, query, probe, key, value, lengths, window, implementation):
        size, num_new = self.key.shape[1], key.shape[1]
        index = jnp.arange(num_new, dtype=jnp.int32)
        position = self.lengths[:, None] + index
        # Of more new tokens than the ring holds only the last are kept.
        keep = (position < lengths[:, None]) & (position >= lengths[:, None] - size)
        new_key, new_value = self._write(key, value, jnp.where(keep, position % size, size))
        options = {"scale": query.shape[-1] ** -0.5, "implementation": implementation}
        if num_new == 1:
            # The ring is the window: every key in it is visible, in whatever order.
            mask = Mask(jnp.minimum(self.lengths, size - 1), jnp.minimum(lengths, size))
            return decode_at(query, probe, new_key, new_value, mask, **options), new_key, new_value
        # A chunk sees the window before it and itself: lay both out in order.
        before = jnp.minimum(self.lengths, size - 1)[:, None]
        slot = jnp.arange(size - 1 + num_new, dtype=jnp.int32)
        old = (self.lengths[:, None] - before + slot) % size
        order = jnp.where(slot < before, old, jnp.minimum(size + slot - before, size + num_new - 1))
        straight = lambda ring, new: jnp.take_along_axis(
            jnp.concatenate([ring, new], axis=1), order[..., None, None], axis=1
        )
        mask = Mask(before[:, 0], before[:, 0] + lengths - self.lengths, window=window)
        keys, values = straight(self.key, key), straight(self.value, value)
        return decode_at(query, probe, keys, values, mask, **options), new_key, new_value


def init_cache(config: "ModelConfig", batch_size: int, capacity: int) -> KVCache:
    """An empty contiguous cache for `TransformerLM(config)`, in its compute dtype.

    A model whose layers share a window smaller than `capacity` gets a ring of it, and so sequences of any length.

    Args:
      config: the model.
      batch_size: sequences.
      capacity: tokens that each sequence may have.
    """
    window = config.windows[0]
    ring = window is not None and window < capacity and len(set(config.windows)) == 1
    shape = (batch_size, window if ring else capacity, config.num_kv_heads, config.head_dim)
    lengths = jnp.zeros(batch_size, jnp.int32)
    return KVCache(_layers(config, shape, "batch"), _layers(config, shape, "batch"), lengths, ring=ring)


def init_paged_cache(
    config: "ModelConfig", page_table: Int[Array, "B P"], *, num_pages: int, page_size: int
) -> KVCache:
    """An empty paged cache for `TransformerLM(config)`, in its compute dtype. All layers share the page table.

    Args:
      config: the model.
      page_table: int32 (B, pages_per_sequence); key s of sequence b is row s % page_size of page
        page_table[b, s // page_size]. An id that is not in [0, num_pages) stands for no page: nothing is written there.
        It may be replaced between steps (`dataclasses.replace`), to hand out pages as sequences grow.
      num_pages: pages in each layer's pool.
      page_size: tokens in a page.

    Raises:
      ValueError: the page table is not int32 (B, P), or gives one page to two places.
    """
    ids = np.asarray(page_table)
    if ids.ndim != 2 or ids.dtype != np.int32:
        raise ValueError(f"page_table: must be int32 (B, pages_per_sequence), got {ids.dtype} of shape {ids.shape}")
    ids, counts = np.unique(ids[(ids >= 0) & (ids < num_pages)], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"page_table: page {ids[counts > 1][0]} is given out {counts.max()} times")
    shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
    lengths = jnp.zeros(len(page_table), jnp.int32)
    return KVCache(_layers(config, shape, None), _layers(config, shape, None), lengths, jnp.asarray(page_table))


def _layers(config: "ModelConfig", shape: tuple[int, ...], leading: str | None):
    axes = (leading, None, "heads", None)
    if config.scan_layers:
        return _zeros((config.num_layers, *shape), config.dtype, (None, *axes))
    return tuple(_zeros(shape, config.dtype, axes) for _ in range(config.num_layers))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, axes):
    return constrain(jnp.zeros(shape, dtype), *axes)
