"""The one suite that every implementation of `parallax_attention` passes. A backend's test file subclasses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import Mask
from parallax_jax import compare, parallax_attention, parallax_reference
from parallax_jax.attention import attend
from parallax_jax.workloads import BY_NAME, CONFORMANCE, Workload

# The four-token case with all gradients, worked out in float64 (scale 2 ** -0.5, causal).
GOLDEN = dict(
    query=[[-0.25, 0.5], [0.25, -0.75], [0.75, -0.25], [-0.5, 0.25]],
    probe=[[0, 0.75], [0.75, -0.25], [-0.25, 0.5], [0.5, -0.5]],
    key=[[0.5, -0.5], [0, 0.75], [-0.5, 0.25], [0.75, -0.25]],
    value=[[-0.5, 0.25], [-0.25, 0.5], [0, 0.75], [0.25, -0.75]],
    cotangent=[[0.25, -0.75], [-0.5, 0.25], [0.5, -0.5], [-0.25, 0.5]],
    out=[[-0.5, 0.25], [-0.38243229, 0.36756771], [-0.36558612, 0.38441388], [-0.12194372, 0.47531510]],
    dquery=[[0, 0], [0.00600016, -0.01500039], [0, 0], [-0.06103209, 0.04017388]],
    dprobe=[[0, 0], [-0.00680604, 0.01701511], [0, 0], [0.11163328, -0.06722038]],
    dkey=[
        [-0.01030164, -0.00053679],
        [-0.02171458, 0.02987571],
        [-0.05109347, 0.04128055],
        [0.08310971, -0.07061946],
    ],
    dvalue=[
        [0.28333485, -0.89296103],
        [-0.24412594, 0.22470988],
        [-0.01738874, 0.12461081],
        [-0.02182017, 0.04364034],
    ],
)


def draw(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


class Conformance:
    """Subclasses name the implementation; the rest is capability switches."""

    implementation: str
    dtype = jnp.float32
    """Of every test that does not name one; bfloat16 for kernels that take no float32."""
    half_workloads = tuple(w.name for w in CONFORMANCE)
    """Workloads also run in bfloat16 and float16; interpreted kernels take fewer."""

    def attention(self, *operands, **options):
        return parallax_attention(*operands, implementation=self.implementation, **options)

    @pytest.fixture
    def rng(self, request):
        return np.random.default_rng(list(request.node.nodeid.encode()))

    def operands(self, rng, batch=1, queries=63, heads=2, head_dim=32, keys=None, kv_heads=None, dtype=None):
        keys, kv_heads = keys or queries, kv_heads or heads
        shapes = [(batch, queries, heads, head_dim)] * 2 + [(batch, keys, kv_heads, head_dim)] * 2
        return [draw(rng, *shape, dtype=dtype or self.dtype) for shape in shapes]

    def skip_if_not_taken(self, dtype: str):
        if dtype == "float32" and self.dtype != jnp.float32:
            pytest.skip("takes no float32")

    def bound(self) -> float:
        return compare.bounds(self.implementation, self.dtype)[1]

    def close(self, x, y, **tolerance):
        """Within `tolerance` in float32, within the roundings of the results in half precision."""
        if self.dtype != jnp.float32:
            tolerance = dict(rtol=0, atol=3e-2)
        np.testing.assert_allclose(x.astype(jnp.float32), jnp.asarray(y, jnp.float32), **tolerance)

    def check(self, workload: Workload, dtype):
        allowed = compare.bounds(self.implementation, dtype)
        for i, (name, error) in enumerate(compare.errors(self.implementation, workload, dtype).items()):
            assert error <= allowed[min(i, 1)], f"{name}: {error:.2e} > {allowed[min(i, 1)]:.0e}"

    @pytest.mark.parametrize("workload", CONFORMANCE, ids=lambda w: w.name)
    def test_float32(self, workload):
        self.skip_if_not_taken("float32")
        self.check(workload, jnp.float32)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half(self, half_workload, dtype):
        self.check(BY_NAME[half_workload], jnp.dtype(dtype))

    def test_golden(self):
        case = {name: jnp.asarray(x, self.dtype)[None, :, None] for name, x in GOLDEN.items()}
        operands = [case[name] for name in ("query", "probe", "key", "value")]
        results = compare.value_and_gradients(self.attention, operands, case["cotangent"])
        for name, result in zip(compare.RESULTS, results, strict=True):
            self.close(result, case[name], atol=1e-6, err_msg=name)

    def test_zero_probe_is_softmax(self, rng):
        query, _, key, value = self.operands(rng, batch=2, queries=111, heads=4, kv_heads=2)
        out = self.attention(query, jnp.zeros_like(query), key, value)
        with jax.default_matmul_precision("highest"):
            query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
            softmax = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")
        assert compare.relative_error(out, softmax) <= self.bound()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_first_causal_row_is_its_value(self, rng, dtype):
        self.skip_if_not_taken(dtype)
        operands = self.operands(rng, dtype=jnp.dtype(dtype))
        out, dquery, dprobe, _, _ = compare.value_and_gradients(self.attention, operands, operands[3])
        np.testing.assert_allclose(
            out[:, 0].astype(jnp.float32), operands[3][:, 0].astype(jnp.float32), rtol=2e-6, atol=1e-6
        )
        assert jnp.abs(dquery[:, 0]).max() <= 2e-5
        assert jnp.abs(dprobe[:, 0]).max() <= 2e-5

    def test_shifting_keys_changes_nothing(self, rng):
        query, probe, key, value = self.operands(rng)
        shift = draw(rng, 1, 1, 2, 32, dtype=self.dtype)
        out = self.attention(query, probe, key, value)
        assert compare.relative_error(self.attention(query, probe, key + shift, value), out) <= 5 * self.bound()

    def test_shifting_values_shifts_the_output(self, rng):
        query, probe, key, value = self.operands(rng)
        shift = draw(rng, 1, 1, 2, 32, dtype=self.dtype)
        out = self.attention(query, probe, key, value) + shift
        assert compare.relative_error(self.attention(query, probe, key, value + shift), out) <= self.bound()

    def test_weights_sum_to_one(self, rng):
        query, probe, key, value = self.operands(rng, keys=111)
        size = 5 if self.dtype == jnp.float32 else 1
        out = self.attention(query, size * probe, key, jnp.ones_like(value))
        self.close(out, 1.0, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("case", ["key_offset", "large_probe", "peaked", "sink"])
    def test_cancellation(self, rng, case, dtype):
        """The correction is a difference of terms that a common part of the keys makes large: it must not show."""
        self.skip_if_not_taken(dtype)
        operands = self.operands(rng, queries=200, head_dim=64, dtype=jnp.float32)
        query, probe, key, value = (np.array(x) for x in operands)
        if case == "key_offset":
            key = key + 3 * rng.normal(size=(1, 1, 2, 64))
        elif case == "large_probe":
            probe = 20 * probe
        elif case == "peaked":
            query = 4 * query
        elif case == "sink":
            query, key[:, 0] = query + 1, 1.5
        operands = [jnp.asarray(x, jnp.dtype(dtype)) for x in (query, probe, key, value)]
        expected = self.float64(parallax_reference, operands)
        # float32: scores of size 100 carry an absolute error of 1e-5, whatever is done with them later.
        allowed = compare.bounds(self.implementation, dtype)[0] * (5 if dtype == "float32" else 1)
        out = self.attention(*operands)
        assert compare.relative_error(out, expected) <= allowed

    @staticmethod
    def float64(function, operands):
        operands = [np.asarray(x, np.float64) for x in operands]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(function(*(jnp.asarray(x) for x in operands)))

    def test_packed_equals_apart(self, rng):
        lengths = [50, 1, 60]
        operands = self.operands(rng, queries=sum(lengths))
        ids = jnp.asarray(np.repeat([3, 4, 9], lengths), jnp.int32)[None]
        packed = compare.value_and_gradients(functools.partial(self.attention, segment_ids=ids), operands, operands[0])
        start = 0
        for length in lengths:
            apart = [x[:, start : start + length] for x in operands]
            results = compare.value_and_gradients(self.attention, apart, apart[0])
            for name, x, y in zip(compare.RESULTS, packed, results, strict=True):
                assert compare.relative_error(x[:, start : start + length], y) <= self.bound(), name
            start += length

    def test_share_of_a_packed_row(self, rng):
        """Some of a packed row's queries with all of its keys, as context parallelism computes them."""
        operands, start, stop = self.operands(rng, batch=2, queries=111, heads=4, kv_heads=2), 30, 81
        ids = jnp.asarray(np.sort(rng.integers(0, 5, (2, 111))), jnp.int32)
        cotangent = operands[0].at[:, :start].set(0).at[:, stop:].set(0)
        attention = functools.partial(self.attention, segment_ids=ids)
        whole = compare.value_and_gradients(attention, operands, cotangent)
        mask = Mask(jnp.int32(start), segment_ids=ids[:, start:stop], key_segment_ids=ids)
        part = lambda x: x[:, start:stop]
        attention = lambda *x: attend(self.implementation, 32**-0.5, None, *x, mask)
        query, probe, key, value = operands
        shared = compare.value_and_gradients(attention, (part(query), part(probe), key, value), part(cotangent))
        for name, x, y in zip(compare.RESULTS, shared, whole, strict=True):
            y = y if name in ("dkey", "dvalue") else part(y)
            assert compare.relative_error(x, y) <= self.bound(), name

    def test_window_of_all_keys_is_none(self, rng):
        operands = self.operands(rng, queries=111)
        windowed = self.attention(*operands, local_window_size=111)
        self.close(windowed, self.attention(*operands), rtol=1e-5, atol=1e-6)

    def test_padding_may_hold_anything(self, rng):
        query, probe, key, value = self.operands(rng, batch=3, queries=63, keys=200)
        lengths = jnp.asarray([0, 70, 200], jnp.int32)
        padding = (jnp.arange(200) >= lengths[:, None])[:, :, None, None]
        attention = functools.partial(self.attention, key_value_seq_lengths=lengths)
        clean = compare.value_and_gradients(attention, (query, probe, key, value), query)
        poison = [jnp.where(padding, jnp.asarray([jnp.nan, jnp.inf] * 16, self.dtype), x) for x in (key, value)]
        poisoned = compare.value_and_gradients(attention, (query, probe, *poison), query)
        for name, x, y in zip(compare.RESULTS, poisoned, clean, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
        assert not poisoned[0][0].any() and not poisoned[1][0].any() and not poisoned[3][0].any()

    def test_keys_after_the_last_query_may_hold_anything(self, rng):
        query, probe, key, value = self.operands(rng, queries=7, keys=111)
        attention = functools.partial(self.attention, query_offset=40)
        poison = [jnp.where((jnp.arange(111) >= 47)[:, None, None], jnp.nan, x) for x in (key, value)]
        clean = compare.value_and_gradients(attention, (query, probe, key, value), query)
        poisoned = compare.value_and_gradients(attention, (query, probe, *poison), query)
        for name, x, y in zip(compare.RESULTS, poisoned, clean, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)

    def test_same_bits_every_run(self, rng):
        operands = self.operands(rng, queries=200, heads=4, kv_heads=2)
        first = compare.value_and_gradients(self.attention, operands, operands[0])
        second = compare.value_and_gradients(self.attention, operands, operands[0])
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_vmap(self, rng):
        operands = [draw(rng, 3, *x.shape, dtype=self.dtype) for x in self.operands(rng)]
        offsets = jnp.asarray([0, -5, 20], jnp.int32)

        def attention(offset, *operands):
            return self.attention(*operands, query_offset=offset)

        def loss(*operands):
            return jnp.sum(jnp.square(jax.vmap(attention)(offsets, *operands)))

        mapped = jax.vmap(attention)(offsets, *operands)
        grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*operands)
        for i in range(3):
            one = [x[i] for x in operands]
            single = functools.partial(attention, offsets[i])
            out, *expected = compare.value_and_gradients(single, one, 2 * mapped[i])
            assert compare.relative_error(mapped[i], out) <= self.bound()
            for x, y in zip(grads, expected, strict=True):
                assert compare.relative_error(x[i], y) <= self.bound()

    def test_new_offsets_and_lengths_compile_nothing(self, rng):
        operands = self.operands(rng, batch=2, queries=7, keys=63)
        traces = 0

        @jax.jit
        def attention(offset, lengths):
            nonlocal traces
            traces += 1
            return self.attention(*operands, query_offset=offset, key_value_seq_lengths=lengths)

        for offset, lengths in [(0, [3, 9]), (30, [63, 40])]:
            out = attention(jnp.int32(offset), jnp.asarray(lengths, jnp.int32))
            expected = parallax_reference(
                *operands, query_offset=offset, key_value_seq_lengths=jnp.asarray(lengths, jnp.int32)
            )
            assert compare.relative_error(out, expected) <= self.bound()
        assert traces == 1
