"""The one suite that every implementation of `parallax_decode` passes. A backend's test class subclasses it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax_jax import parallax_attention, parallax_decode


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode call: B = len(lengths) sequences, T new tokens each, a capacity of S keys."""

    name: str
    lengths: tuple[int, ...]
    T: int = 1
    S: int = 111
    N: int = 4
    K: int = 4
    H: int = 32
    Hv: int = 32
    window: int | None = None
    page_size: int | None = None
    dtype: str = "float32"


CASES = [
    Case("step", (111, 7, 0)),
    Case("one_key_mqa_width_60_100", (1, 63), S=63, N=6, K=1, H=60, Hv=100),
    Case("speculative_gqa_short_and_empty", (200, 2, 1, 0), T=5, S=200, N=6, K=2),
    Case("window_gqa_bfloat16", (200, 9, 150), T=3, S=200, N=8, K=2, H=64, window=17, dtype="bfloat16"),
    Case("many_rows_wide_head", (40,), T=16, S=63, N=10, K=1, H=256, Hv=16),
    Case("prefill_window", (100, 33), T=33, N=4, K=2, window=40),
    Case("paged_step_float16", (96, 17, 0), S=96, N=4, K=1, page_size=32, dtype="float16"),
    Case("paged_pages_of_48_window", (140, 50, 3), T=4, S=144, N=4, K=2, H=20, window=60, page_size=48),
    Case("paged_prefill", (80, 20), T=20, S=80, N=2, K=2, page_size=16),
]
# What Hopper's kernel takes: 16 bits, heads of 64 and 128, at most 8 rows for a kv head.
HOPPER_CASES = [
    Case("wide_step", (320, 7, 0), S=320, N=2, K=2, H=128, Hv=128, dtype="bfloat16"),
    Case("speculative_gqa_short", (200, 2, 1, 0), T=4, S=200, N=4, K=2, H=64, Hv=64, dtype="float16"),
    Case("window_gqa", (250, 9, 150), T=3, S=256, N=4, K=2, H=64, Hv=64, window=70, dtype="bfloat16"),
    Case("pages_mqa", (180, 65, 3), S=256, N=8, K=1, H=128, Hv=128, page_size=64, dtype="bfloat16"),
    Case("large_pages_window", (250, 130), S=256, N=2, K=1, H=64, Hv=64, window=90, page_size=128, dtype="float16"),
]
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}


def draw(case: Case, seed=0):
    """Query, probe, cache, lengths and page table of a case; whatever no sequence owns is NaN or Inf."""
    rng = np.random.default_rng([seed, *case.name.encode()])
    batch = len(case.lengths)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    query, probe = normal(batch, case.T, case.N, case.H), normal(batch, case.T, case.N, case.H)
    key, value = normal(batch, case.S, case.K, case.H), normal(batch, case.S, case.K, case.Hv)
    padding = np.arange(case.S) >= np.asarray(case.lengths)[:, None]
    key[padding], value[padding] = np.nan, np.inf
    table = None
    if case.page_size is not None:
        used = case.S // case.page_size
        shuffled = rng.permutation(batch * used + 3).astype(np.int32)[: batch * used].reshape(batch, used)

        def paged(x):
            pages = np.full((batch * used + 3, case.page_size, *x.shape[2:]), np.nan, np.float32)
            pages[shuffled.reshape(-1)] = x.reshape(-1, case.page_size, *x.shape[2:])
            return pages

        key, value = paged(key), paged(value)
        # Ids past the length are never looked at.
        table = np.where(np.arange(used) * case.page_size < np.asarray(case.lengths)[:, None], shuffled, -7)
        table = jnp.asarray(table.astype(np.int32))
    operands = [jnp.asarray(x, jnp.dtype(case.dtype)) for x in (query, probe, key, value)]
    return operands, jnp.asarray(case.lengths, jnp.int32), table


def draw_needle(case: Case):
    """`draw`, where in each sequence one late key takes nearly all the weight, and its t is far from the others'."""
    (query, probe, key, value), lengths, table = draw(case)
    q, r = (np.asarray(x, np.float64)[:, 0, 0] for x in (query, probe))
    q_norm = np.linalg.norm(q, axis=1, keepdims=True)
    r -= q * np.sum(q * r, axis=1, keepdims=True) / q_norm**2
    needle = 12 * case.H**0.5 * q / q_norm**2 + 100 * r / np.linalg.norm(r, axis=1, keepdims=True) ** 2
    at = np.arange(len(case.lengths)), lengths - lengths // 3
    key = key.at[*at, 0].set(jnp.asarray(needle, key.dtype))
    return (query, probe, key, value), lengths, table


NEEDLE = Case("needle", (500, 333), S=512, N=1, K=1, H=64, Hv=64, dtype="bfloat16")


def expected(case: Case, operands, table):
    """Each sequence alone, without padding or pages, in float64 by the definition."""
    query, probe, key, value = (np.asarray(x.astype(jnp.float32), np.float64) for x in operands)
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, length in enumerate(case.lengths):
        k, v = key[b], value[b]
        if table is not None:
            k, v = (x[np.asarray(table)[b]].reshape(-1, *x.shape[2:]) for x in (key, value))
        for t in range(max(0, case.T - length), case.T):
            last = length - case.T + t
            first = 0 if case.window is None else max(0, last - case.window + 1)
            for n in range(case.N):
                seen_k, seen_v = (x[first : last + 1, n * case.K // case.N] for x in (k, v))
                scores = seen_k @ query[b, t, n] * case.H**-0.5
                p = np.exp(scores - scores.max())
                p /= p.sum()
                u = seen_k @ probe[b, t, n]
                out[b, t, n] = (p * (1 - u + p @ u)) @ seen_v
    return out


def error(x, y) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float32) - np.asarray(y, np.float32)) / np.linalg.norm(y))


class DecodeConformance:
    """Subclasses name the implementation and the block sizes to try."""

    implementation: str
    block_sizes: tuple = (None,)

    def decode(self, *operands, block_sizes=None, **options):
        call = functools.partial(
            parallax_decode, implementation=self.implementation, block_sizes=block_sizes, **options
        )
        return jax.jit(call)(*operands)

    @pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
    def test_equals_the_reference(self, case):
        operands, lengths, table = draw(case)
        out = self.decode(*operands, lengths, local_window_size=case.window, page_table=table)
        assert out.dtype == operands[0].dtype
        assert error(out, expected(case, operands, table)) <= TOLERANCE[case.dtype]

    def test_a_late_key_that_dominates(self):
        operands, lengths, table = draw_needle(NEEDLE)
        out = self.decode(*operands, lengths)
        assert error(out, expected(NEEDLE, operands, table)) <= TOLERANCE[NEEDLE.dtype]

    @pytest.mark.parametrize("name", ["step", "paged_pages_of_48_window"])
    def test_any_block_sizes(self, name):
        case = next(c for c in CASES if c.name == name)
        operands, lengths, table = draw(case, seed=1)
        reference = expected(case, operands, table)
        for sizes in self.block_sizes:
            out = self.decode(*operands, lengths, local_window_size=case.window, page_table=table, block_sizes=sizes)
            assert error(out, reference) <= TOLERANCE[case.dtype], sizes

    def test_equals_the_training_forward(self):
        rng = np.random.default_rng(7)
        query, probe = (jnp.asarray(rng.normal(size=(2, 63, 4, 32)), jnp.float32) for _ in range(2))
        key, value = (jnp.asarray(rng.normal(size=(2, 63, 2, 32)), jnp.float32) for _ in range(2))
        whole = parallax_attention(query, probe, key, value, local_window_size=20, implementation="xla")
        lengths = jnp.asarray([63, 31], jnp.int32)
        new = [jnp.stack([x[0, 61:63], x[1, 29:31]]) for x in (query, probe)]
        out = self.decode(*new, key, value, lengths, local_window_size=20)
        assert error(out, np.stack([whole[0, 61:63], whole[1, 29:31]])) <= 5e-6

    @pytest.mark.parametrize("new", [1, 20])
    def test_a_length_over_the_capacity_counts_as_the_capacity(self, new):
        rng = np.random.default_rng(8)
        query, probe = (jnp.asarray(rng.normal(size=(2, new, 2, 16)), jnp.float32) for _ in range(2))
        key, value = (jnp.asarray(rng.normal(size=(2, 32, 1, 16)), jnp.float32) for _ in range(2))
        operands = (query, probe, key, value)
        out = self.decode(*operands, jnp.asarray([99, 30], jnp.int32))
        np.testing.assert_array_equal(out, self.decode(*operands, jnp.asarray([32, 30], jnp.int32)))

    def test_new_lengths_and_pages_compile_nothing(self):
        case = next(c for c in CASES if c.name == "paged_step_float16")
        operands, lengths, table = draw(case)
        traces = 0

        @jax.jit
        def call(lengths, table):
            nonlocal traces
            traces += 1
            return parallax_decode(*operands, lengths, page_table=table, implementation=self.implementation)

        first = call(lengths, table)
        second = call(jnp.asarray([40, 96, 1], jnp.int32), table[::-1])
        assert traces == 1
        assert not np.array_equal(first, second, equal_nan=True)
