"""Where arrays lie on a mesh of devices, and the operator run by each device on its share.

XLA cannot split a kernel, so under the ambient mesh (`jax.set_mesh`) `parallax_attention` and `parallax_decode` run
inside `jax.shard_map`, over all axes that are not manual already. Automatic axes are used as `mesh_axes` says, explicit
axes as the query's own type says.

- batch: rows; no communication. Rows that do not divide are repeated on the devices of the axes left out.
- heads: query heads. Key/value heads divide among the devices, or, where there are fewer of them than devices, every
  device holds them all and uses the one that its query heads share; their gradients are then summed over the devices.
- sequence: context parallelism. Arrays lie in their natural order; keys and values are gathered whole, their gradients
  reduced and scattered. Under a causal mask late rows see more keys than early ones, so for the time of the call the
  sequence is cut into 2n chunks and device i takes queries and probes of chunks i and 2n - 1 - i: all work the same.
  Decoding does not use these axes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.blocks import Mask


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The axes of a mesh that split each logical axis of arrays. A mesh need not have them all.

    Attributes:
      batch: rows of tokens, activations and caches.
      sequence: tokens within a row.
      heads: query heads and key/value heads, of activations and of parameters.
      mlp: hidden units, likewise.
      vocab: rows of the embedding and of the output projection.
      embed: width of the parameters; with the axes of `sequence` too, devices that share a row also share these.

    Raises:
      ValueError: one mesh axis would split two axes of an array.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    sequence: tuple[str, ...] = ("context",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)

    def __post_init__(self):
        together = [("batch", "sequence", name) for name in ("heads", "mlp", "vocab")]
        for names in (*together, ("embed", "heads"), ("embed", "mlp"), ("embed", "vocab")):
            for a, b in itertools.combinations(names, 2):
                if common := set(getattr(self, a)) & set(getattr(self, b)):
                    raise ValueError(f"{a}: mesh axis {min(common)!r} already splits {b} of the same arrays")


mesh_axes = jax.make_user_context(MeshAxes())
"""The `MeshAxes` in force: `mesh_axes.value`; others inside `with mesh_axes(MeshAxes(...)):`."""


def on_mesh(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """`function`, traced with `mesh` as the ambient one: for a `jax.jit` whose caller need not set it."""

    @functools.wraps(function)
    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return run


def parameter_sharding(mesh: jax.sharding.Mesh, names: Sequence[str | None], shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies whose axes have these logical names; an axis that does not divide stays whole."""
    return NamedSharding(mesh, _parameter_spec(mesh, names, shape))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks XLA to split the axes of `x` as `mesh_axes` says for these logical names, None staying whole.

    A mesh axis that two of them name goes to the later one. Does nothing without a mesh, and leaves manual and explicit
    axes as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = _of_type(mesh, AxisType.Auto)
    if not left:
        return x
    spec = []
    for name, size in reversed([*zip(names, x.shape, strict=True)]):
        wanted = () if name is None else getattr(mesh_axes.value, name)
        spec.append(_divide(mesh, [axis for axis in wanted if axis in left], size))
        left = left.difference(spec[-1])
    return lax.with_sharding_constraint(x, P(*reversed(spec)))


def embed_per_device(table, tokens, dtype, *, split_sequence: bool):
    """Rows of an embedding in `dtype`, (B, T, D), each device reading its own part of the table.

    XLA left alone gathers the table whole where the vocabulary is split. Here the tokens go to the columns, and then
    columns change places with rows.
    """
    mesh = _mesh(table)
    if not _free(mesh):
        return jnp.take(table, tokens, axis=0).astype(dtype)
    rules, (vocab, columns) = mesh_axes.value, map(_names, _parameter_spec(mesh, ("vocab", "embed"), table.shape))
    batch = _divide(mesh, rules.batch, tokens.shape[0])
    sequence = _divide(mesh, rules.sequence, tokens.shape[1]) if split_sequence else ()
    where = lambda axis: 0 if axis in batch else 1 if axis in sequence else None  # which of their tokens differ

    def local(table, tokens):
        for axis in columns:
            if where(axis) is not None:
                tokens = lax.all_gather(tokens, axis, axis=where(axis), tiled=True)
        ids = tokens - (lax.axis_index(vocab) * len(table) if vocab else 0)
        here = (ids >= 0) & (ids < len(table))
        x = jnp.where(here[..., None], jnp.take(table, ids, axis=0, mode="clip"), 0.0).astype(dtype)
        x = lax.psum(x, vocab) if vocab else x
        for axis in reversed(columns):
            if where(axis) is None:
                x = lax.all_gather(x, axis, axis=2, tiled=True)
            else:
                x = lax.all_to_all(x, axis, split_axis=where(axis), concat_axis=2, tiled=True)
        return x

    rows = P(batch, sequence)
    return _shard_map(mesh, local, (P(vocab, columns), rows), rows)(table, tokens)


def splits_sequence(query) -> bool:
    """Whether `attend_per_device` would split the tokens of these queries."""
    mesh = _mesh(query)
    return bool(_free(mesh)) and _count(mesh, _axes_of(mesh, query)[1]) > 1


def attend_per_device(attend: Callable, query, probe, key, value, mask: Mask):
    """`attend(query, probe, key, value, mask)` by each device on its rows, heads and share of the sequence.

    Raises:
      ValueError: heads or tokens do not divide among the devices.
    """
    mesh = _mesh(query)
    if not _free(mesh):
        return attend(query, probe, key, value, mask)
    batch, sequence, heads = _axes_of(mesh, query)
    kv_heads = _kv_axes(mesh, heads, query.shape[2], key.shape[2])
    count = _count(mesh, sequence)
    chunks = 2 * count if mask.is_causal and count > 1 else count
    for name, x, needed in (("query", query, chunks), ("key", key, count)):
        if x.shape[1] % needed:
            raise ValueError(f"{name}: {x.shape[1]} tokens are no multiple of {needed}, for mesh axes {sequence}")

    def local(query, probe, key, value, mask):
        key, value = (_own_kv_head(x, heads, _count(mesh, heads), kv_heads) for x in (key, value))
        if count == 1:
            return attend(query, probe, key, value, mask)
        key, value = (lax.all_gather(x, sequence, axis=1, tiled=True) for x in (key, value))
        device, size = lax.axis_index(sequence), query.shape[1]
        if not mask.is_causal:
            return attend(query, probe, key, value, _rows_of(mask, device * size, size))
        shares = zip(*(_to_zigzag(x, sequence, count) for x in (query, probe)), strict=True)
        places = device, 2 * count - 1 - device
        out = [
            attend(*rows, key, value, _rows_of(mask, place * (size // 2), size // 2))
            for place, rows in zip(places, shares, strict=True)
        ]
        return _from_zigzag(*out, sequence, count)

    rows, keys = P(batch, sequence, heads), P(batch, sequence, kv_heads)
    return _shard_map(mesh, local, (rows, rows, keys, keys, _mask_specs(mask, batch)), rows)(
        query, probe, key, value, mask
    )


def decode_per_device(decode: Callable, query, probe, key, value, mask: Mask, page_table):
    """`decode(query, probe, key, value, mask, page_table)` by each device on its sequences and heads.

    A contiguous cache is split like the queries. The pool of a paged cache is split over heads alone: any sequence may
    own any page.

    Raises:
      ValueError: heads do not divide among the devices.
    """
    mesh = _mesh(query)
    if not _free(mesh):
        return decode(query, probe, key, value, mask, page_table)
    batch, _, heads = _axes_of(mesh, query)
    kv_heads = _kv_axes(mesh, heads, query.shape[2], key.shape[2])

    def local(query, probe, key, value, mask, page_table):
        key, value = (_own_kv_head(x, heads, _count(mesh, heads), kv_heads) for x in (key, value))
        return decode(query, probe, key, value, mask, page_table)

    rows, keys = P(batch, None, heads), P(None if page_table is not None else batch, None, kv_heads)
    pages = None if page_table is None else P(batch)
    specs = rows, rows, keys, keys, _mask_specs(mask, batch), pages
    return _shard_map(mesh, local, specs, rows)(query, probe, key, value, mask, page_table)


def write_per_device(write: Callable, cache, new, position):
    """`write(cache, new, position)` of keys or values (B, T, K, H) into a contiguous cache, split as for decoding."""
    mesh = _mesh(new)
    if not _free(mesh):
        return write(cache, new, position)
    batch, _, heads = _axes_of(mesh, new)
    rows = P(batch, None, () if new.shape[2] % _count(mesh, heads) else heads)
    return _shard_map(mesh, write, (rows, rows, P(batch)), rows)(cache, new, position)


def rows_of_device(x) -> jax.ShapeDtypeStruct | None:
    """A device's part of rows to be normed (B, T, N, H); None where their tokens do not divide."""
    mesh = _mesh(x)
    if not _free(mesh):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    counts = [_count(mesh, axes) for axes in _row_axes(mesh, x)]
    if x.shape[1] % counts[1]:
        return None
    shape = [size // count for size, count in zip(x.shape, counts, strict=False)]
    return jax.ShapeDtypeStruct((*shape, x.shape[3]), x.dtype)


def norm_per_device(norm: Callable, x, scale, rotation, *others, sums: bool = False):
    """`norm(x, scale, rotation, *others)` by each device on its rows, `rows_of_device`: a pair of results.

    They are rows, as `others` are; with `sums` the second is a sum over rows, and is added up over devices.
    """
    mesh = _mesh(x)
    if not _free(mesh):
        return norm(x, scale, rotation, *others)
    axes = _row_axes(mesh, x)
    rows, used = P(*axes), tuple(itertools.chain(*axes))

    def local(*operands):
        first, second = norm(*operands)
        return first, lax.psum(second, used) if sums else second

    table = None
    if rotation is not None:
        table = (P(axes[0] if rotation[0].shape[0] > 1 else None, axes[1]),) * 2
    in_specs = (rows, P(), table, *(None if y is None else rows for y in others))
    out_specs = rows, P() if sums else rows
    return _shard_map(mesh, local, in_specs, out_specs)(x, scale, rotation, *others)


def _row_axes(mesh, x) -> tuple[tuple[str, ...], ...]:
    """The axes that split batch, sequence and heads of rows to be normed."""
    batch, sequence, heads = _axes_of(mesh, x)
    return tuple(batch), tuple(sequence), tuple(_divide(mesh, heads, x.shape[2]))


def _mesh(x):
    """The ambient mesh, or that of an array with explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(x).sharding.mesh if mesh.empty else mesh


def _of_type(mesh, *types: AxisType) -> set[str]:
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in types}


def _free(mesh) -> set[str]:
    """Axes over which a kernel must be mapped: any that are not manual."""
    return _of_type(mesh, AxisType.Auto, AxisType.Explicit)


def _count(mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _parameter_spec(mesh, names, shape) -> P:
    axes = mesh_axes.value
    known = {**{name: getattr(axes, name) for name in ("heads", "mlp", "vocab", "embed")}, "kv_heads": axes.heads}
    return P(*(_divide(mesh, known.get(name, ()), size) for name, size in zip(names, shape, strict=True)))


def _divide(mesh, axes: Sequence[str], size: int) -> tuple[str, ...]:
    """The axes that the mesh has, without the last ones while they do not divide `size`."""
    axes = tuple(name for name in axes if name in mesh.axis_names)
    while size % _count(mesh, axes):
        axes = axes[:-1]
    return axes


def _axes_of(mesh, query) -> list[tuple[str, ...]]:
    """The axes that split the queries' batch, sequence and heads."""
    typed = [_names(axes) for axes in (*jax.typeof(query).sharding.spec, None, None, None)][:3]
    rules, automatic = mesh_axes.value, _of_type(mesh, AxisType.Auto)
    wanted = [
        (*explicit, *(name for name in axes if name in automatic))
        for explicit, axes in zip(typed, (rules.batch, rules.sequence, rules.heads), strict=True)
    ]
    return [_divide(mesh, wanted[0], query.shape[0]), *wanted[1:]]


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes in an entry of a spec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _kv_axes(mesh, heads: tuple[str, ...], num_heads: int, num_kv_heads: int) -> tuple[str, ...]:
    """The axes that split key/value heads: those of the queries, or none where there are fewer heads than devices."""
    count = _count(mesh, heads)
    if num_heads % count or (num_kv_heads % count and count % num_kv_heads):
        raise ValueError(
            f"query: {num_heads} heads over {num_kv_heads} of keys do not divide by {count}, mesh axes {heads}"
        )
    return () if num_kv_heads % count else heads


def _own_kv_head(x, heads: tuple[str, ...], count: int, kv_heads: tuple[str, ...]):
    """Of key/value heads that are not split, the one that this device's query heads share."""
    if heads == kv_heads:
        return x
    return lax.dynamic_slice_in_dim(x, lax.axis_index(heads) * x.shape[2] // count, 1, 2)


def _mask_specs(mask: Mask, batch: tuple[str, ...]) -> Mask:
    """A tree of specs: `lengths`, `segment_ids` and a decode's `offset` go by batch rows."""
    return jax.tree.map(lambda x: P(batch) if x.ndim else P(), mask)


def _rows_of(mask: Mask, start, size: int) -> Mask:
    """The mask of rows [start, start + size)."""
    ids = mask.segment_ids
    rows = None if ids is None else lax.dynamic_slice_in_dim(ids, start, size, 1)
    return dataclasses.replace(
        mask, offset=mask.offset + start, segment_ids=rows, key_segment_ids=ids, end_aligned=False
    )


def _to_zigzag(x, axis, count: int):
    """From chunks (2i, 2i + 1) of the sequence on device i to chunks (i, 2 count - 1 - i)."""
    even, odd = jnp.split(x, 2, axis=1)
    even, odd = (lax.ppermute(x, axis, _moves(count, first)) for x, first in ((even, 0), (odd, 1)))
    return _swap_on_odd(even, odd, axis)


def _from_zigzag(early, late, axis, count: int):
    """Undoes `_to_zigzag`."""
    even, odd = _swap_on_odd(early, late, axis)
    back = lambda first: [(b, a) for a, b in _moves(count, first)]
    even, odd = (lax.ppermute(x, axis, back(first)) for x, first in ((even, 0), (odd, 1)))
    return jnp.concatenate([even, odd], axis=1)


def _moves(count: int, first: int) -> list[tuple[int, int]]:
    """Where device i sends chunk c = 2i + first. The even chunks go to every device once, and so do the odd ones."""
    chunks = [2 * i + first for i in range(count)]
    return [(i, min(c, 2 * count - 1 - c)) for i, c in enumerate(chunks)]


def _swap_on_odd(x, y, axis):
    """Chunk i of device i is an even one on even devices only."""
    is_odd = lax.axis_index(axis) % 2 == 1
    return jnp.where(is_odd, y, x), jnp.where(is_odd, x, y)


def _shard_map(mesh, local: Callable, in_specs, out_specs) -> Callable:
    """`jax.shard_map` over the axes that are not manual yet; operands with explicit axes are laid out as it needs."""
    explicit = _of_type(mesh, AxisType.Explicit)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=_free(mesh), check_vma=False
    )

    def typed(spec):
        return P(*(tuple(name for name in _names(axes) if name in explicit) for axes in spec))

    def run(*operands):
        if explicit:
            operands = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, typed(spec)), operands, in_specs)
        return mapped(*operands)

    return run
