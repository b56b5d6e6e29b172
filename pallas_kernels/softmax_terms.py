"""Exponentials of rows of logits and their sums, each logit read once: the middle of a cross-entropy."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

BLOCK = 4096  # columns that a program of 4 warps holds at once: 32 a thread
LARGEST = 1e26  # sums below it, and their inverses times a weight, are far from the ends of bfloat16


def _kernel(logits_ref, target_ref, place_ref, terms_ref, rest_ref, shift_ref):
    row, columns = pl.program_id(0), logits_ref.shape[1]
    target, place = target_ref[row], place_ref[row]

    def over_blocks(step, carry):
        carry = lax.fori_loop(0, columns // BLOCK, lambda i, c: step(i * BLOCK, None, c), carry)
        if columns % BLOCK:
            start = columns - columns % BLOCK + 0 * row  # known only at run time, it lets the slice reach past the row
            carry = step(start, start + jnp.arange(BLOCK) < columns, carry)
        return carry

    def load(start, mask):
        other = None if mask is None else jnp.finfo(jnp.float32).min
        return plt.load(logits_ref.at[row, pl.ds(start, BLOCK)], mask=mask, other=other)

    def write(shift):
        def step(start, mask, total):
            others = start + jnp.arange(BLOCK) != place
            terms = jnp.where(others, jnp.exp(load(start, mask) - shift), 0.0)
            plt.store(terms_ref.at[row, pl.ds(start, BLOCK)], terms.astype(terms_ref.dtype), mask=mask)
            return total + terms

        return jnp.sum(over_blocks(step, jnp.zeros((BLOCK,), jnp.float32)))

    def write_again(_):
        larger = lambda start, mask, top: jnp.maximum(top, load(start, mask))
        shift = jnp.max(over_blocks(larger, jnp.full((BLOCK,), target)))
        return write(shift), shift

    rest = write(target)
    # The target's logit is known beforehand and almost always a good shift; if it is not, this row is done again.
    rest, shift = lax.cond(rest < LARGEST, lambda rest: (rest, target), write_again, rest)
    rest_ref[row] = rest
    shift_ref[row] = shift


def softmax_terms(
    logits: Float[Array, "R vocab"], target: Float[Array, " R"], place: Int[Array, " R"], dtype, *, interpret: bool
) -> tuple[Float[Array, "R vocab"], Float[Array, " R"], Float[Array, " R"]]:
    """exp(logits - shift), 0 at the target, with the sums of rows.

    Args:
      logits: float32; fewer than 2^31 in all.
      target: logit of each row's target.
      place: its column; out of range where the row has none.
      dtype: of the exponentials, bfloat16 or float32.
      interpret: run in Pallas' interpreter.

    Returns:
      The exponentials, and in float32 their sums and the shifts: `target`, or in rows in which others are larger by far
      the largest logit.
    """
    rows = jax.ShapeDtypeStruct((len(logits),), jnp.float32)
    return pl.pallas_call(
        _kernel,
        out_shape=(jax.ShapeDtypeStruct(logits.shape, dtype), rows, rows),
        grid=(len(logits),),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="softmax_terms",
    )(logits, target, place)
