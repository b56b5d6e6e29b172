import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.blocks import Mask
from parallax_jax import ModelConfig, TransformerLM, compare, generate, parallax_attention, parallax_decode
from parallax_jax.cache import init_cache, init_paged_cache
from parallax_jax.sharding import MeshAxes, attend_per_device, embed_per_device, mesh_axes, on_mesh, parameter_sharding

NAMES = ("data", "fsdp", "context", "tensor")
BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 4, 48, 8, 2, 16
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def make_mesh(sizes, kind=AUTO, names=NAMES):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


@pytest.fixture
def rng(request):
    return np.random.default_rng(list(request.node.nodeid.encode()))


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def operands(rng):
    shapes = [(BATCH, TOKENS, HEADS, HEAD_DIM)] * 2 + [(BATCH, TOKENS, KV_HEADS, HEAD_DIM)] * 2
    return [draw(rng, *shape) for shape in shapes]


def place(mesh, arrays, *specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def masks(rng):
    """Packed rows whose segments end anywhere, a window over them, a full mask, and lengths."""
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (BATCH, TOKENS))), jnp.int32)
    return {
        "causal": {},
        "packed": {"segment_ids": ids},
        "window": {"segment_ids": ids, "local_window_size": 7},
        "full": {"segment_ids": ids, "is_causal": False},
        "lengths": {"key_value_seq_lengths": jnp.asarray([0, 48, 20, 33], jnp.int32)},
    }


def check_attention(rng, sizes, kind, mask, **options):
    """Output and all gradients on a mesh are those of one device, and lie on it as they should."""
    options |= masks(rng)[mask]
    inputs, cotangent = operands(rng), draw(rng, BATCH, TOKENS, HEADS, HEAD_DIM)

    @jax.jit
    def run(cotangent, *inputs):
        return compare.value_and_gradients(functools.partial(parallax_attention, **options), inputs, cotangent)

    expected = run(cotangent, *inputs)
    kv_heads = "tensor" if KV_HEADS % sizes[3] == 0 else None
    rows, keys = (P(("data", "fsdp"), "context", heads) for heads in ("tensor", kv_heads))
    mesh = make_mesh(sizes, kind)
    with jax.set_mesh(mesh):
        actual = run(*place(mesh, [cotangent, *inputs], rows, rows, rows, keys, keys))
    for name, x, y in zip(compare.RESULTS, actual, expected, strict=True):
        assert compare.relative_error(jax.device_get(x), jax.device_get(y)) <= 2e-6, name
    assert actual[0].sharding.is_equivalent_to(NamedSharding(mesh, rows), 4)


# Together: every axis alone and with others, key/value heads split and shared, an odd number of devices in a zigzag.
CASES = [
    ((2, 1, 2, 2), AUTO, "packed"),
    ((1, 1, 2, 4), EXPLICIT, "packed"),
    ((1, 2, 4, 1), EXPLICIT, "window"),
    ((1, 1, 1, 8), AUTO, "lengths"),
    ((1, 1, 3, 2), AUTO, "causal"),
    ((1, 1, 8, 1), AUTO, "full"),
]


@pytest.mark.parametrize(("sizes", "kind", "mask"), CASES)
def test_attention_is_that_of_one_device(rng, sizes, kind, mask):
    check_attention(rng, sizes, kind, mask)


ALL_MESHES = [
    (data, fsdp, context, tensor)
    for data in (1, 2, 4)
    for fsdp in (1, 2, 4)
    for context in (1, 2, 3, 4, 6, 8)
    for tensor in (1, 2, 4, 8)
    if 1 < data * fsdp * context * tensor <= 8 and data * fsdp <= BATCH
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("sizes", ALL_MESHES)
def test_every_mesh_that_fits(rng, sizes, kind):
    for mask in masks(rng):
        check_attention(rng, sizes, kind, mask)


def test_reference_on_a_mesh(rng):
    check_attention(rng, (1, 1, 2, 4), AUTO, "packed", implementation="reference")


def test_causal_work_is_even(rng):
    """Every device visits as many keys with its early as it misses with its late queries."""
    seen = []

    def attend(query, probe, key, value, mask):
        jax.debug.callback(lambda start: seen.append(int(start) + query.shape[1]), mask.offset)
        return query

    with jax.set_mesh(make_mesh((4,), names=("context",))):
        query, probe, key, value = operands(rng)
        out = jax.jit(lambda *x: attend_per_device(attend, *x, Mask(jnp.int32(0))))(query, probe, key, value)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, query)  # and the chunks come back to their places
    assert sorted(seen) == [TOKENS // 8 * i for i in range(1, 9)]


def test_other_axis_names(rng):
    """`mesh_axes` says which axes split what; a jitted function is traced anew under others."""
    query, probe, key, value = operands(rng)
    attention = jax.jit(parallax_attention)
    expected = attention(query, probe, key, value)
    for axes, spec in [
        (MeshAxes(batch=("x",), heads=("y",)), P("x", None, "y")),
        (MeshAxes(batch=(), sequence=("y",), heads=("x",)), P(None, "y", "x")),
    ]:
        mesh = make_mesh((2, 4), names=("x", "y"))
        with jax.set_mesh(mesh), mesh_axes(axes):
            out = attention(query, probe, key, value)
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
        assert compare.relative_error(jax.device_get(out), expected) <= 1e-6


def test_rows_that_do_not_divide_are_repeated(rng):
    inputs = [x[:2] for x in operands(rng)]
    with jax.set_mesh(make_mesh((2, 4, 1, 1))):
        out = jax.jit(parallax_attention)(*inputs)
    assert out.sharding.spec == P("data")
    assert compare.relative_error(jax.device_get(out), parallax_attention(*inputs)) <= 1e-6


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((1, 1, 8, 1), {}, r"query: 40 tokens are no multiple of 16, for mesh axes \('context',\)"),
        ((1, 1, 8, 1), {"is_causal": False, "query_offset": 0, "keys": 41}, "key: 41 tokens are no multiple of 8"),
        ((1, 1, 1, 3), {}, r"query: 4 heads over 2 of keys do not divide by 3, mesh axes \('tensor',\)"),
    ],
)
def test_errors(sizes, changes, message):
    keys = changes.pop("keys", 40)
    query, key = jnp.ones((1, 40, 4, 8)), jnp.ones((1, keys, 2, 8))
    with jax.set_mesh(make_mesh(sizes)), pytest.raises(ValueError, match=message):
        parallax_attention(query, query, key, key, **changes)


def test_axes_may_not_collide():
    with pytest.raises(ValueError, match="sequence: mesh axis 'tensor' already splits heads"):
        MeshAxes(sequence=("tensor",))
    with pytest.raises(ValueError, match="embed: mesh axis 'x' already splits mlp"):
        MeshAxes(mlp=("x",), embed=("x",))


@pytest.mark.parametrize(("sizes", "kind"), [((2, 1, 1, 4), AUTO), ((2, 2, 1, 2), EXPLICIT)])
def test_decode_is_that_of_one_device(rng, sizes, kind):
    """Contiguous and paged; key/value heads split and shared."""
    query, probe = (draw(rng, BATCH, 2, HEADS, HEAD_DIM) for _ in range(2))
    caches = [draw(rng, BATCH, 32, KV_HEADS, HEAD_DIM) for _ in range(2)]
    lengths = jnp.asarray([2, 32, 9, 17], jnp.int32)
    pages = [x.reshape(8, 16, KV_HEADS, HEAD_DIM)[::-1] for x in caches]
    table = jnp.arange(7, -1, -1, dtype=jnp.int32).reshape(BATCH, 2)
    decode = jax.jit(parallax_decode)
    expected = decode(query, probe, *caches, lengths)
    mesh = make_mesh(sizes, kind)
    kv_heads = "tensor" if KV_HEADS % sizes[3] == 0 else None
    rows, keys, pool = P(("data", "fsdp"), None, "tensor"), P(("data", "fsdp"), None, kv_heads), P(None, None, kv_heads)
    with jax.set_mesh(mesh):
        query, probe = place(mesh, [query, probe], rows, rows)
        contiguous = decode(query, probe, *place(mesh, caches, keys, keys), lengths)
        paged = decode(query, probe, *place(mesh, pages, pool, pool), lengths, page_table=table)
    for out in (contiguous, paged):
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, rows), 4)
        assert compare.relative_error(jax.device_get(out), jax.device_get(expected)) <= 1e-6


# Columns split over devices that hold other rows, other tokens of the same rows, and the same tokens.
@pytest.mark.parametrize(
    ("vocab", "rows", "sizes", "embed"),
    [(24, 8, (2, 2, 1, 2), ("fsdp",)), (27, 8, (1, 2, 2, 2), ("fsdp", "context")), (24, 1, (1, 4, 1, 2), ("fsdp",))],
)
def test_embedding(rng, vocab, rows, sizes, embed):
    table, cotangent = draw(rng, vocab, 16), draw(rng, rows, 6, 16)
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, 6)), jnp.int32)

    def run(table):
        out, vjp = jax.vjp(lambda t: embed_per_device(t, tokens, jnp.float32, split_sequence=True), table)
        return out, vjp(cotangent)[0]

    expected = run(table)
    mesh = make_mesh(sizes)
    with mesh_axes(MeshAxes(embed=embed)):
        sharding = parameter_sharding(mesh, ("vocab", "embed"), table.shape)
        out, grad = jax.jit(on_mesh(mesh, run), out_shardings=(None, sharding))(jax.device_put(table, sharding))
    assert sharding.spec == P("tensor" if vocab == 24 else None, embed)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_allclose(grad, expected[1], rtol=1e-6, atol=1e-6)


CONFIG = ModelConfig(
    vocab_size=62, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=64, remat="attention"
)


@functools.cache
def boxed_params(config):
    return jax.jit(TransformerLM(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def params_on(mesh, config=CONFIG):
    """Parameters large enough that tokens differ, on one device for mesh None."""

    def put(box):
        sharding = None if mesh is None else parameter_sharding(mesh, box.names, box.value.shape)
        return jax.device_put(4 * box.value, sharding)

    return jax.tree.map(put, boxed_params(config), is_leaf=lambda x: hasattr(x, "names"))


@pytest.mark.parametrize(("sizes", "kv_heads", "paged"), [((2, 2, 1, 2), "tensor", False), ((2, 1, 1, 4), None, True)])
def test_generation_is_that_of_one_device(sizes, kv_heads, paged):
    prompts, new = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]], 4
    expected = generate(CONFIG, params_on(None), prompts, max_new_tokens=new)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        cache = init_cache(CONFIG, 4, 16)
        if paged:
            cache = init_paged_cache(CONFIG, jnp.arange(4, dtype=jnp.int32)[:, None], num_pages=4, page_size=16)
        wanted = P(None, None if paged else ("data", "fsdp"), None, kv_heads)
        assert cache.key.sharding.is_equivalent_to(NamedSharding(mesh, wanted), 5)
        assert generate(CONFIG, params_on(mesh), prompts, max_new_tokens=new, cache=cache) == expected


def test_what_a_layer_compiles_to():
    """Weights are gathered over fsdp, keys and values over context; the remat policy sees into the map."""
    mesh = make_mesh((1, 2, 2, 2))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def loss(params, tokens):
        return jnp.sum(TransformerLM(CONFIG).apply({"params": params}, tokens, method="hidden"))

    text = jax.jit(on_mesh(mesh, jax.grad(loss))).lower(params_on(mesh), tokens).compile().as_text()
    gathered = set(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather", text))
    keys = "f32[2,32,1,16]"  # rows of a device, all tokens, heads of a device
    assert keys in gathered
    weights = {"f32[32,2,16]", "f32[32,1,16]", "f32[2,16,32]", "f32[32,32]"}
    assert gathered - {keys} <= weights | {"s32[4,16]"}, "tokens alone may travel beside them"
    assert "shard_map/jit(forward)" in text and "rematted_computation/layers/attention/shard_map" in text
    assert not re.search(r"rematted_computation\S*/jit\(forward\)", text), (
        "the remat policy does not see inside the map"
    )
