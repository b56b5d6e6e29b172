"""Rounding of the forward pass in its two forms: `python -m experiments.numerics`.

The plain form accumulates sum p v and sum p t v and subtracts at the end; the project's form (`tiles.update`) keeps the
second sum relative to the running mean of t. Prints the relative Frobenius error of the output in bfloat16, the inputs
taken as exact, for inputs on which the subtracted terms grow.
"""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import tiles
from parallax_jax import compare, parallax_reference

TOKENS, HEAD_DIM, BLOCK = 1024, 128, 64


def inputs(case: str, rng: np.random.Generator) -> list[np.ndarray]:
    """(query, probe, key, value) of one head."""
    query, probe, key, value = rng.normal(size=(4, TOKENS, HEAD_DIM))
    if case == "shared offset of the keys":
        key += 3 * rng.normal(size=HEAD_DIM)
    elif case == "dominant keys":
        query *= 4
    elif case == "attention sink":
        query, key[0] = query + 1, 1
    return [query, probe, key, value]


def plain_update(state: tiles.State, s1, s2, c, visible, times_value) -> tiles.State:
    """`tiles.update` with plain sums; `t_mean` holds sum p t until the end."""
    m, a, p = tiles.softmax_weights(state.m, s1, c, visible)
    d1, d2 = (a * d + jnp.sum(x, axis=-1) for d, x in ((state.d1, p), (state.t_mean, p * s2)))
    o1, o2 = (a[:, None] * o + times_value(x) for o, x in ((state.o1, p), (state.o2, p * s2)))
    return tiles.State(m, d1, d2, o1, o2)


def output(operands, update) -> jnp.ndarray:
    """Causal forward pass of one head, tile by tile, with products in the operands' dtype."""
    query, probe, key, value = operands
    dot = lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32)
    state = tiles.initial_state((TOKENS,), HEAD_DIM)
    for start in range(0, TOKENS, BLOCK):
        k, v = key[start : start + BLOCK], value[start : start + BLOCK]
        visible = start + np.arange(BLOCK) <= np.arange(TOKENS)[:, None]
        times_value = lambda p, v=v: dot(p.astype(v.dtype), v)
        c = HEAD_DIM**-0.5 * tiles.LOG2_E
        state = update(state, dot(query, k.T), dot(probe, k.T), c, jnp.asarray(visible), times_value)
    if update is plain_update:
        mean = state.t_mean / state.d1
        return (state.o1 * (1 + mean)[:, None] - state.o2) / state.d1[:, None]
    return tiles.finish(state)[0]


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'inputs':<28}{'plain':>10}{'streaming':>11}")
    for case in ("standard normal", "shared offset of the keys", "dominant keys", "attention sink"):
        operands = [jnp.asarray(x, jnp.bfloat16) for x in inputs(case, rng)]
        expected = parallax_reference(*(x[None, :, None].astype(jnp.float32) for x in operands))[0, :, 0]
        errors = (
            compare.relative_error(output(operands, update).astype(jnp.bfloat16), expected)
            for update in (plain_update, tiles.update)
        )
        print(f"{case:<28}" + "".join(f"{error:>10.1e} " for error in errors))


if __name__ == "__main__":
    main()
