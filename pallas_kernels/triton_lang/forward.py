"""Forward pass: one program per block of query rows and head, one pass over the keys.

The probe scores t are centred on a row's mean of t over the first tile in which it sees a key; unlike the running mean
of `tiles.weigh` that is no work in the loop (`tiles.from_fixed_centre`).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import blocks
from pallas_kernels.block_sizes import TritonPass
from pallas_kernels.triton_lang import common, launch, tiles


@triton.jit
def _step(sums, qr, k_ptr, v_ptr, sight, kv, row, key, may_be_first, masked, call):
    m, d1, d2, o1, o2, centre = sums
    b, end = sight[2], sight[4]
    limit = end if masked else None
    k = common.load_rows(k_ptr, b, key, limit, kv, call.keys, call.kv_heads, call.head_dim, call.block_k)
    s1, s2 = tiles.unstack(tiles.dot(qr, tl.trans(k), call))
    v = common.load_rows(v_ptr, b, key, limit, kv, call.keys, call.kv_heads, call.value_dim, call.block_k)
    visible = None
    if masked:
        rows = (row + tl.arange(0, call.block_q))[:, None]
        keys = (key + tl.arange(0, call.block_k))[None, :]
        visible = common.visible_tile(rows, keys, sight, call)
    m, a, p = tiles.softmax_weights(m, s1, visible, call)
    d1 = a * d1
    if may_be_first:
        centre = tiles.first_mean(centre, d1, p, s2)
    p2 = p * (s2 - centre[:, None])
    p_sum, p2_sum = tiles.sums(p, p2)
    o1 = tiles.add_dot(p, v, o1 * a[:, None], call)
    o2 = tiles.add_dot(p2, v, o2 * a[:, None], call)
    return m, d1 + p_sum, a * d2 + p2_sum, o1, o2, centre


@triton.jit
def parallax_forward(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    offset_ptr,
    lengths_ptr,
    segments_ptr,
    key_segments_ptr,
    spans_ptr,
    out_ptr,
    v_mean_ptr,
    lse_ptr,
    t_mean_ptr,
    call: tl.constexpr,
    group: tl.constexpr,
):
    head, block = common.work_item(tl.program_id(0), call.batch * call.heads, call.row_blocks, group)
    if call.is_causal:
        block = call.row_blocks - 1 - block  # longest rows first
    b, n = head // call.heads, head % call.heads
    kv = n // call.heads_per_kv
    row = block * call.block_q
    limit: tl.constexpr = call.row_limit

    offset, length, end = common.read_mask(offset_ptr, lengths_ptr, b, call)
    bounds = common.key_bounds(row, block, spans_ptr, b, offset, length, call)
    qr = common.load_stacked(q_ptr, r_ptr, b, row, limit, n, call.queries, call.heads, call.head_dim, call.block_q)
    sight = (segments_ptr, key_segments_ptr, b, offset, end)
    m, d1, d2, o1, o2 = tiles.initial_state(call.block_q, call.value_width)
    sums = m, d1, d2, o1, o2, d1
    for part in tl.static_range(3):
        if part == 1 or (part == 0 and call.hides_start) or (part == 2 and call.hides_end):
            for j in tl.range(bounds[part], bounds[part + 1], num_stages=call.num_stages):
                # Where every row sees key 0, its first tile is the first of all.
                may_be_first = True if part != 1 and call.hides_start else j == bounds[1]
                key = j * call.block_k
                sums = _step(sums, qr, k_ptr, v_ptr, sight, kv, row, key, may_be_first, part != 1, call)

    out, v_mean, lse, t_mean = tiles.finish(tiles.from_fixed_centre(*sums))
    common.store_rows(out_ptr, out, b, row, limit, n, call.queries, call.heads, call.value_dim, call.block_q)
    common.store_rows(v_mean_ptr, v_mean, b, row, limit, n, call.queries, call.heads, call.value_dim, call.block_q)
    common.store_stat(lse_ptr, lse, b, n, row, limit, call)
    common.store_stat(t_mean_ptr, t_mean, b, n, row, limit, call)


def _interleaved(heads: int) -> int:
    """Key/value heads whose longest rows start first: at most 32, so that several programs share a tile in L2."""
    return -(-heads // -(-heads // 32))


def forward(query, probe, key, value, mask: blocks.Mask, *, scale: float, config: TritonPass):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    call = common.Call.of(query, key, value, mask, scale, config)
    values = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype)
    stats = jax.ShapeDtypeStruct((call.batch, call.heads, call.queries), jnp.float32)
    return launch.launch(
        parallax_forward,
        (query, probe, key, value, *launch.mask_arrays(mask, mask.row_spans(config.block_q))),
        (values, values, stats, stats),
        programs=call.batch * call.heads * call.row_blocks,
        config=config,
        call=call,
        group=call.heads_per_kv * _interleaved(call.batch * call.kv_heads),
    )
