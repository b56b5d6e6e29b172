"""Rounding of the forward pass in its forms: `python -m experiments.numerics`.

All accumulate sum p (t - centre) v and take sum p (t - centre) times v_mean off it at the end: plain sums have a centre
of 0, a fixed centre is the mean of t over the first tile, and the streaming form (`tiles.update`) has the running mean.
"Rounded sums" has a fixed centre, and adds up the weights as the products with the values take them, in bfloat16.
Prints the relative Frobenius error of the output in bfloat16, the inputs taken as exact, for inputs on which the
subtracted terms grow.
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
    elif case == "late sink":
        query, probe, key[700] = query + 1, probe + 0.3, 1  # its t is 38, those of the others about 0
    return [query, probe, key, value]


def output(operands, form: str) -> jnp.ndarray:
    """Causal forward pass of one head, tile by tile, with products in the operands' dtype."""
    query, probe, key, value = operands
    dot = lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32)
    state, centre, c = tiles.initial_state((TOKENS,), HEAD_DIM), None, HEAD_DIM**-0.5 * tiles.LOG2_E
    for start in range(0, TOKENS, BLOCK):
        k, v = key[start : start + BLOCK], value[start : start + BLOCK]
        visible = jnp.asarray(start + np.arange(BLOCK) <= np.arange(TOKENS)[:, None])
        times_value = lambda p, v=v: dot(p.astype(v.dtype), v)
        s1, s2 = dot(query, k.T), dot(probe, k.T)
        if form == "streaming":
            state = tiles.update(state, s1, s2, c, visible, times_value)
            continue
        m, a, p = tiles.softmax_weights(state.m, s1, c, visible)
        if centre is None:
            centre = (form != "plain") * jnp.sum(p * s2, axis=-1) / jnp.sum(p, axis=-1)
        p2 = p * (s2 - centre[:, None])
        added = [x.astype(v.dtype).astype(x.dtype) if form == "rounded sums" else x for x in (p, p2)]
        d1, d2 = (a * d + jnp.sum(x, axis=-1) for d, x in zip((state.d1, state.t_mean), added, strict=True))
        o1, o2 = (a[:, None] * o + times_value(x) for o, x in ((state.o1, p), (state.o2, p2)))
        state = tiles.State(m, d1, d2, o1, o2)  # d2 in t_mean's place until the end
    if form != "streaming":
        state = tiles.from_fixed_centre(*state, centre)
    return tiles.finish(state)[0]


def main() -> None:
    rng = np.random.default_rng(0)
    forms = "plain", "fixed centre", "rounded sums", "streaming"
    print(f"{'inputs':<28}" + "".join(f"{form:>14}" for form in forms))
    for case in ("standard normal", "shared offset of the keys", "dominant keys", "attention sink", "late sink"):
        operands = [jnp.asarray(x, jnp.bfloat16) for x in inputs(case, rng)]
        expected = parallax_reference(*(x[None, :, None].astype(jnp.float32) for x in operands))[0, :, 0]
        errors = (compare.relative_error(output(operands, x).astype(jnp.bfloat16), expected) for x in forms)
        print(f"{case:<28}" + "".join(f"{error:>14.1e}" for error in errors))


if __name__ == "__main__":
    main()
