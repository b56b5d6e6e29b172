"""Forward pass: one program per block of query rows and head, one pass over the keys.

It has two forms: that of `tiles.weigh`, and `_fixed_centre`, in which the probe scores t are centred on a row's mean of
t over the first tile (`tiles.from_fixed_centre`) and sums over the keys stay in the threads, so that of what the loop
carries only the maximum waits for other threads. `has_fixed_centre` says which a call takes.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import blocks
from pallas_kernels.block_sizes import TritonPass
from pallas_kernels.triton_lang import common, launch, tiles


@triton.jit
def _fixed_centre(sums, q, r, k, v, visible, is_first, call: tl.constexpr):
    m, d1, d2, o1, o2, centre = sums
    # Two products, not one of [q; r]: the weights need no probe scores, so both never take registers at once.
    s1 = tiles.dot(q, tl.trans(k), call)
    m, a, p = tiles.softmax_weights(m, s1, visible, call)
    d1, d2 = d1 * a[:, None], d2 * a[:, None]
    o1, o2 = o1 * a[:, None], o2 * a[:, None]
    p_sum = tiles.sums_in_threads(p)
    d1 += p_sum
    s2 = tiles.dot(r, tl.trans(k), call)
    if is_first:
        centre = tl.sum(tiles.sums_in_threads(p * s2), 1) / tiles.nonzero(tl.sum(p_sum, 1))
    p2 = p * (s2 - centre[:, None])
    d2 += tiles.sums_in_threads(p2)
    return m, d1, d2, tiles.add_dot(p, v, o1, call), tiles.add_dot(p2, v, o2, call), centre


@triton.jit
def _step(state, q, r, k_ptr, v_ptr, sight, row, j, is_first, masked, call, fixed_centre):
    b, end = sight[2], sight[4]
    key = j * call.block_k
    limit = end if masked else None
    k = common.load_rows(k_ptr, b, key, limit, 0, call.keys, call.kv_heads, call.head_dim, call.block_k)
    if not fixed_centre:  # q is [q; r]
        s1, s2 = tiles.unstack(tiles.dot(q, tl.trans(k), call))
    v = common.load_rows(v_ptr, b, key, limit, 0, call.keys, call.kv_heads, call.value_dim, call.block_k)
    visible = None
    if masked:
        rows = (row + tl.arange(0, call.block_q))[:, None]
        keys = (key + tl.arange(0, call.block_k))[None, :]
        visible = common.visible_tile(rows, keys, sight, call)
    if fixed_centre:
        state = _fixed_centre(state, q, r, k, v, visible, is_first, call)
    else:
        state, p, p2 = tiles.weigh(state, s1, s2, visible, call)
        state = tiles.add_values(state, p, p2, v, call)
    return state


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
    fixed_centre: tl.constexpr,
):
    head, block = common.work_item(tl.program_id(0), call.batch * call.heads, call.row_blocks, group)
    if call.is_causal:
        block = call.row_blocks - 1 - block  # longest rows first
    b, n = head // call.heads, head % call.heads
    # Here and not in `_step`: LLVM would compute it again where a loop has no trip, between the accumulators and a wait
    # for products, and ptxas then serializes them (C7515).
    kv = n // call.heads_per_kv
    k_ptr += kv * call.head_dim
    v_ptr += kv * call.value_dim
    row = block * call.block_q
    limit: tl.constexpr = call.row_limit
    size: tl.constexpr = call.block_q

    offset, length, end = common.read_mask(offset_ptr, lengths_ptr, b, call)
    bounds = common.key_bounds(row, block, spans_ptr, b, offset, length, call)
    state = tiles.initial_state(size, call.value_width)
    if fixed_centre:
        q = common.load_rows(q_ptr, b, row, limit, n, call.queries, call.heads, call.head_dim, size)
        r = common.load_rows(r_ptr, b, row, limit, n, call.queries, call.heads, call.head_dim, size)
        d = tl.zeros([size, 8], tl.float32)
        state = state[0], d, d, state[3], state[4], state[1]
    else:
        q = common.load_stacked(q_ptr, r_ptr, b, row, limit, n, call.queries, call.heads, call.head_dim, size)
        r = q
    sight = (segments_ptr, key_segments_ptr, b, offset, end)
    for part in tl.static_range(3):
        if part == 1 or (part == 0 and call.hides_start) or (part == 2 and call.hides_end):
            for j in tl.range(bounds[part], bounds[part + 1], num_stages=call.num_stages):
                is_first = j == bounds[1]  # of a fixed centre, with which no row's start is hidden
                state = _step(state, q, r, k_ptr, v_ptr, sight, row, j, is_first, part != 1, call, fixed_centre)

    if fixed_centre:
        m, d1, d2, o1, o2, centre = state
        state = tiles.from_fixed_centre(m, tl.sum(d1, 1), tl.sum(d2, 1), o1, o2, centre)
    out, v_mean, lse, t_mean = tiles.finish(state)
    common.store_rows(out_ptr, out, b, row, limit, n, call.queries, call.heads, call.value_dim, size)
    common.store_rows(v_mean_ptr, v_mean, b, row, limit, n, call.queries, call.heads, call.value_dim, size)
    common.store_stat(lse_ptr, lse, b, n, row, limit, call)
    common.store_stat(t_mean_ptr, t_mean, b, n, row, limit, call)


def has_fixed_centre(mask: blocks.Mask, config: TritonPass) -> bool:
    """Whether every row that sees a key sees key 0 and belongs to one warp, on Hopper or later.

    Elsewhere this form spills: for A100 and RTX 4090 where the centre is taken, and where warps share rows.
    """
    is_whole = mask.window is None and mask.segment_ids is None and config.block_q >= 16 * config.num_warps
    return is_whole and (launch.capability() or 90) >= 90


def forward(query, probe, key, value, mask: blocks.Mask, *, scale: float, config: TritonPass):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    call = common.Call.of(query, key, value, mask, scale, config)
    values = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype)
    stats = jax.ShapeDtypeStruct((call.batch, call.heads, call.queries), jnp.float32)
    heads, fixed_centre = call.batch * call.kv_heads, has_fixed_centre(mask, config)
    if fixed_centre and mask.is_causal:  # the longest rows first, of 32 heads at a time: programs share tiles in L2
        group = -(-heads // -(-heads // 32))
    else:
        group = common.work_group(heads, common.nbytes(key, value))
    return launch.launch(
        parallax_forward,
        (query, probe, key, value, *launch.mask_arrays(mask, mask.row_spans(config.block_q))),
        (values, values, stats, stats),
        programs=call.batch * call.heads * call.row_blocks,
        config=config,
        call=call,
        group=call.heads_per_kv * group,
        fixed_centre=fixed_centre,
    )
