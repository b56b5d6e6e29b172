"""Forward pass: one program per block of query rows and head, one pass over the keys (`tiles.update`)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import TritonPass
from pallas_kernels.triton import common


def _kernel(q_ref, r_ref, k_ref, v_ref, mask, spans, out_ref, v_mean_ref, lse_ref, t_mean_ref, *, config, scale, group):
    batch, num_queries, num_heads, _ = q_ref.shape
    num_keys, num_kv_heads = k_ref.shape[1:3]
    num_blocks = pl.cdiv(num_queries, config.block_q)
    head, block = common.work_item(pl.program_id(0), batch * num_heads, num_blocks, group)
    if mask.is_causal:
        block = num_blocks - 1 - block  # longest rows first
    b, n = lax.div(head, num_heads), lax.rem(head, num_heads)
    kv = lax.div(n, num_heads // num_kv_heads)
    row = block * config.block_q
    row_limit = num_queries if num_queries % config.block_q else None

    sight = common.Sight.read(mask, spans, b, block, num_queries, num_keys)
    precision = tiles.dot_precision(q_ref.dtype)
    q = common.load_rows(q_ref, b, row, config.block_q, n, row_limit)
    r = common.load_rows(r_ref, b, row, config.block_q, n, row_limit)

    def step(j, state, masked):
        key = j * config.block_k
        key_limit = sight.end if masked else None
        k = common.load_rows(k_ref, b, key, config.block_k, kv, key_limit).T
        s1, s2 = common.dot(q, k, precision), common.dot(r, k, precision)
        visible = sight.visible(row, key, config, 1) if masked else None
        v = common.load_rows(v_ref, b, key, config.block_k, kv, key_limit)
        times_value = lambda p: common.dot(p.astype(v.dtype), v, precision)
        return tiles.update(state, s1, s2, scale * tiles.LOG2_E, visible, times_value)

    state = common.over_blocks(
        sight.bounds(blocks.key_bounds, row, config),
        step,
        tiles.initial_state((config.block_q,), common.padded(v_ref.shape[3])),
        masked_start=sight.hides_start,
        masked_end=mask.is_causal or sight.hides_keys or num_keys % config.block_k != 0,
    )
    out, v_mean, lse, t_mean = tiles.finish(state)
    common.store_rows(out_ref, b, row, n, out, row_limit)
    common.store_rows(v_mean_ref, b, row, n, v_mean, row_limit)
    common.store_stat(lse_ref, b, n, row, lse, row_limit)
    common.store_stat(t_mean_ref, b, n, row, t_mean, row_limit)


def forward(query, probe, key, value, mask: blocks.Mask, *, scale: float, config: TritonPass, interpret: bool):
    """Returns (out, v_mean, lse, t_mean); see `tiles.finish`."""
    batch, num_queries, num_heads, _ = query.shape
    heads_per_kv = num_heads // key.shape[2]
    group = heads_per_kv * common.work_group(
        batch * key.shape[2], key.shape[1] * (key.shape[3] + value.shape[3]) * key.dtype.itemsize
    )
    values = jax.ShapeDtypeStruct((batch, num_queries, num_heads, value.shape[3]), query.dtype)
    stats = jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, config=config, scale=scale, group=group),
        out_shape=(values, values, stats, stats),
        grid=common.grid_size(batch, num_heads, pl.cdiv(num_queries, config.block_q)),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="parallax_forward",
    )(query, probe, key, value, mask, mask.row_spans(config.block_q))
