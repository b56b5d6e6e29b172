"""Every kernel on a GPU: `pytest -m gpu`. Conformance, and sizes that only a large GPU holds."""

import dataclasses
import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import decode_step
from pallas_kernels import device, triton_routes
from pallas_kernels.block_sizes import (
    MosaicGpuDecodeBlockSizes,
    TritonDecodeBlockSizes,
    TritonLangDecodeBlockSizes,
    triton_lang_block_sizes,
)
from parallax_jax import compare, parallax_attention, parallax_decode, parallax_reference
from parallax_jax.attention import BACKENDS
from parallax_jax.model import TransformerLM
from parallax_jax.workloads import BY_NAME, CONFORMANCE, Workload
from tests import decode_conformance, mosaic_gpu_layer_test
from tests.conformance import Conformance
from tests.decode_conformance import HOPPER_CASES, DecodeConformance

pytestmark = pytest.mark.gpu
KERNELS = [*(name for name, (_, platforms) in BACKENDS.items() if platforms == ("gpu",)), "triton_lang"]


def options(implementation: str) -> dict:
    """Options that take an implementation for heads of 128 in bfloat16; "triton_lang" is a route of "triton"."""
    if implementation != "triton_lang":
        return dict(implementation=implementation)
    return dict(implementation="triton", block_sizes=triton_lang_block_sizes(device.target()[1], 16, 128, 128))


class TestTriton(Conformance):
    implementation = "triton"


class TestMosaicGpu(Conformance):
    implementation = "mosaic_gpu"
    dtype = jnp.bfloat16
    half_workloads = tuple(w.name for w in CONFORMANCE if w.head_dim <= 128)


class TestTritonDecode(DecodeConformance):
    implementation = "triton"
    block_sizes = tuple(TritonDecodeBlockSizes(*sizes, 2, 2) for sizes in ((16, 1), (32, 2), (16, 32)))


@pytest.fixture
def only_triton_lang(monkeypatch):
    """No other route of "triton": a test that passes ran the kernels in the Triton language."""
    monkeypatch.delitem(triton_routes.ROUTES, "triton")


@pytest.mark.usefixtures("only_triton_lang")
class TestTritonLang(Conformance):
    implementation = "triton"


@pytest.mark.usefixtures("only_triton_lang")
class TestTritonLangDecode(DecodeConformance):
    implementation = "triton"
    block_sizes = tuple(
        TritonLangDecodeBlockSizes(*sizes, 2, 2, rotate)
        for *sizes, rotate in ((16, 1, False), (16, 1, True), (32, 2, False), (16, 32, True))
    )


@pytest.mark.parametrize(
    ("case", "block_k", "splits", "groups"),
    [
        (case, block_k, splits, groups)
        for case, block_k, splits, groups in itertools.product(HOPPER_CASES, (32, 64, 128), (1, 2, 3, 5), (1, 2))
        if splits * groups <= -(-case.S // block_k)  # each warpgroup needs a tile
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_mosaic_gpu_decode(case, block_k, splits, groups):
    """Every way to share the keys, with what no sequence owns poisoned; over 20 runs the bits stay."""
    operands, lengths, table = decode_conformance.draw(case)
    stages = 1 if block_k * case.H * groups > 16384 else 2  # what shared memory has room for
    sizes = MosaicGpuDecodeBlockSizes(block_k, splits, groups, stages)
    options = dict(local_window_size=case.window, implementation="mosaic_gpu", block_sizes=sizes)
    decode = jax.jit(lambda *x, table: parallax_decode(*x, page_table=table, **options))
    out = decode(*operands, lengths, table=table)
    expected = decode_conformance.expected(case, operands, table)
    assert decode_conformance.error(out, expected) <= decode_conformance.TOLERANCE[case.dtype]
    assert all(jnp.array_equal(out, decode(*operands, lengths, table=table)) for _ in range(20))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("programs", [1, 5, 12, 24, 40, 64, 100, 132, 300])
@pytest.mark.parametrize("num_keys", [40, 136, 640, 2056, 4096])
def test_mosaic_gpu_decode_at_its_own_launch(num_keys, programs, width, kv_heads=1):
    """Ragged lengths, against "xla": both round weights and output, 3e-3 to 5e-3 apart."""
    operands = [bfloat16(i, programs, n, kv_heads, width) for i, n in enumerate((1, 1, num_keys, num_keys))]
    lengths = jax.random.randint(jax.random.key(9), (programs,), 1, num_keys + 1)
    decode = lambda implementation: parallax_decode(*operands, lengths, implementation=implementation)
    assert compare.relative_error(decode("mosaic_gpu"), decode("xla")) <= 7e-3


@pytest.mark.parametrize(
    ("num_keys", "batch", "width"),
    [
        (264, 60, 128),
        (520, 40, 64),
        (136, 120, 128),
        (248, 260, 64),
        (4104, 30, 128),
        (2056, 50, 128),
        (8200, 70, 64),
        (4096, 32, 64),
    ],
)
def test_mosaic_gpu_decode_of_more_heads_than_cores(num_keys, batch, width):
    """Several programs on a core, heads of one program and of two."""
    test_mosaic_gpu_decode_at_its_own_launch(num_keys, batch, width, kv_heads=8)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("rows", range(1, 9))
def test_mosaic_gpu_decode_of_several_rows(rows, width):
    """Every number of queries for a kv head: fewer than four repeat each other, more take two products."""
    operands = [bfloat16(i, 3, n, heads, width) for i, (n, heads) in enumerate(((1, 2 * rows),) * 2 + ((640, 2),) * 2)]
    decode = lambda implementation: parallax_decode(*operands, jnp.asarray([640, 1, 77]), implementation=implementation)
    assert compare.relative_error(decode("mosaic_gpu"), decode("xla")) <= 7e-3


@pytest.mark.parametrize("num_keys", [512, 2048])
def test_mosaic_gpu_decode_mapped(num_keys):
    """`jax.vmap` gives the bits of its parts, in clusters as well."""
    operands = [bfloat16(i, 3, 2, n, 4, 64) for i, n in enumerate((1, 1, num_keys, num_keys))]
    lengths = jnp.asarray([[num_keys, 7], [300, 0], [1, 500]], jnp.int32)
    decode = jax.jit(functools.partial(parallax_decode, implementation="mosaic_gpu"))
    mapped = jax.vmap(decode)(*operands, lengths)
    assert all(jnp.array_equal(mapped[i], decode(*(x[i] for x in operands), lengths[i])) for i in range(3))


def test_mosaic_gpu_decode_in_a_loop():
    """Steps that depend on one another, one after the other on the device, give the bits that they give alone."""
    query, *rest = (bfloat16(i, 4, n, 8, 128) for i, n in enumerate((1, 1, 1024, 1024)))

    def step(i, query):
        out = parallax_decode(query, *rest, jnp.full(4, 900, jnp.int32) + 3 * i, implementation="mosaic_gpu")
        return (query - out).astype(query.dtype)

    together, alone = jax.jit(lambda query: jax.lax.fori_loop(0, 40, step, query))(query), query
    for i in range(40):
        alone = jax.jit(step)(jnp.int32(i), alone)
    assert jnp.array_equal(together, alone)


WITHOUT_PALLAS_TRITON = """
import sys

sys.modules["jax.experimental.pallas.triton"] = None
import jax, optax
from parallax_jax import ModelConfig, TransformerLM

config = ModelConfig(vocab_size=64, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128,
                     implementation="triton")
model, optimizer = TransformerLM(config), optax.sgd(0.5)
tokens = jax.random.randint(jax.random.key(0), (2, 65), 0, 64)
params = model.init(jax.random.key(1), tokens[:, :-1])["params"]
state = optimizer.init(params)

def loss(params):
    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

@jax.jit
def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

losses = []
for _ in range(5):
    params, state, value = step(params, state)
    losses.append(float(value))
print(losses)
assert losses[-1] < losses[0] - 0.05 and "pallas_kernels.triton_lang" in sys.modules
"""


def test_a_model_trains_without_pallas_triton():
    """What a JAX that has dropped Pallas' Triton backend leaves: "triton" through jax-triton."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_PALLAS_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def bfloat16(key: int, *shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


@pytest.mark.parametrize("implementation", KERNELS)
def test_memory_is_linear_in_length(implementation):
    """Forward and backward at 131072 tokens; nothing grows with the square."""

    def step(length):
        shape = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16)
        loss = lambda *x: jnp.sum(parallax_attention(*x, **options(implementation)).astype(jnp.float32))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*[shape] * 4).compile()
        memory = compiled.memory_analysis()
        return compiled, memory.temp_size_in_bytes + memory.output_size_in_bytes

    (_, half), (compiled, whole) = step(65536), step(131072)
    assert whole <= 2.1 * half
    grads = compiled(*(bfloat16(i, 1, 131072, 8, 128) for i in range(4)))
    assert all(jnp.isfinite(x.astype(jnp.float32)).all() for x in grads)


@pytest.mark.parametrize("implementation", KERNELS)
def test_more_than_two_to_the_31_elements(implementation):
    """Right values at both ends of arrays whose offsets overflow 32 bits; a window keeps the work small."""
    length, window, edge = 65600, 64, 256
    operands = [bfloat16(i, 2, length, 128, 128) for i in range(4)]
    assert operands[0].size > 2**31
    attention = lambda *x: parallax_attention(*x, **options(implementation), local_window_size=window)
    loss = lambda *x: jnp.sum(attention(*x).astype(jnp.float32))
    out = jax.jit(attention)(*operands)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(*operands)
    for batch, rows, head in ((0, slice(0, edge), 0), (1, slice(length - edge, length), 127)):
        some = [x[batch : batch + 1, rows, head : head + 1].astype(jnp.float32) for x in operands]
        reference = lambda *x: parallax_reference(*x, local_window_size=window)
        expected, vjp = jax.vjp(reference, *some)
        seen = slice(window, None) if batch else slice(0, edge)  # rows whose whole window lies in the piece
        found = out[batch : batch + 1, rows, head : head + 1]
        assert compare.relative_error(found[:, seen], expected[:, seen]) <= 3.5e-3
        for x, y in zip(grads, vjp(jnp.ones_like(expected)), strict=False):
            found = x[batch : batch + 1, rows, head : head + 1]
            assert compare.relative_error(found[:, seen], y[:, seen]) <= 5e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(48, 12), (32, 16)])
def test_programs_in_chunks_of_heads(heads, kv_heads):
    """Hopper's backward pass starts more chunks than one, and for 48 heads on 12 goes through rows both ways."""
    workload = Workload("chunks", 1, 2048, heads, 128, kv_heads=kv_heads)
    found = compare.errors("mosaic_gpu", workload, jnp.dtype(jnp.bfloat16))
    assert max(found.values()) <= max(compare.bounds("mosaic_gpu", jnp.dtype(jnp.bfloat16))), found


@pytest.mark.parametrize(
    ("implementation", "workload"), [*((name, "normal_1024") for name in KERNELS), ("mosaic_gpu", "gqa_32_8")]
)
def test_one_bit_pattern_in_a_thousand_runs(implementation, workload):
    *operands, cotangent = BY_NAME[workload].operands(jnp.bfloat16)
    attention = lambda *x: parallax_attention(*x, **options(implementation))

    @jax.jit
    def checksums(operands, cotangent):
        out, vjp = jax.vjp(attention, *operands)
        bits = [jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (out, *vjp(cotangent))]
        weights = [jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) * 2 + 1 for x in bits]
        return jnp.stack([jnp.sum(x * w) for x, w in zip(bits, weights, strict=True)])

    first = checksums(operands, cotangent)
    different = sum(bool((checksums(operands, cotangent) != first).any()) for _ in range(1000))
    assert different == 0


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_a_fused_step_is_as_exact_as_the_blocks(batch):
    errors = decode_step.check(decode_step.PAPER, batch, 512)
    assert errors["fused_error"] <= 1.2 * errors["blocks_error"], errors


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (0, {}),
        (1, {"num_layers": 1}),
        (64, {"num_layers": 3, "scan_layers": False}),
        (1000, {"num_layers": 7}),
        (1000, {"head_dim": 64}),
        (1000, {"attention": "softmax"}),
        (1000, {"width": 2048, "mlp_width": 6144}),
        (1023, {}),
        (1024, {}),
        (100, {"local_window_size": 512}),
        (1300, {"local_window_size": 512}),
    ],
    ids=str,
)
def test_blocks_in_one_kernel(length, changes):
    """At the paper's widths; of the 16 programs that share a head's keys some have none."""
    config = dataclasses.replace(decode_step.PAPER, num_layers=2, vocab_size=512)
    mosaic_gpu_layer_test.check(dataclasses.replace(config, **changes), length, 1024)


@pytest.mark.parametrize("batch", [1, 2])
def test_whichever_program_merges_the_bits_are_the_same(batch):
    """Splits end in any order, programs meet in any order, and counters are left ready for the next call."""
    config = dataclasses.replace(decode_step.PAPER, num_layers=4, vocab_size=512)
    config, params = decode_step.model(config, batch, 2048)
    cache = decode_step.random_cache(config, batch, 2048, 2000)
    call = jax.jit(lambda token: TransformerLM(config).apply({"params": params}, token, cache=cache)[0])
    tokens = jnp.asarray([[3], [5]], jnp.int32)[:batch]
    outs = jnp.stack([call(tokens) for _ in range(300)])
    assert bool(jnp.isfinite(outs).all())
    assert bool((outs == outs[0]).all())
