"""Cross-entropy of hidden states and an output projection, without the logits of all tokens at once.

The logits of a vocabulary of 152k take as much memory as the model's own activations. They are computed for a chunk of
tokens at a time; where gradients are wanted, the chunk's gradients with respect to the hidden states and the projection
are computed while its logits exist, so nothing is computed twice and no more than one chunk of logits ever exists. Each
logit is written once and read once.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import device
from parallax_jax.sharding import mesh_axes, parameter_sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "vocab D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Weighted sum of the cross-entropies of tokens, in nats, float32.

    Products take their operands in the dtype of `hidden` and add up in float32, and all else is float32. Under an
    ambient mesh each device takes its tokens and, where it divides, its part of the vocabulary.

    Args:
      hidden: final hidden states, (B, T, D), bfloat16 or float32.
      head: output projection, or the embedding where they are tied, (vocab, D).
      targets: int32 ids of the next tokens, (B, T).
      weights: float32 factor of each token's loss, (B, T); not differentiated.
      chunk: tokens whose logits exist at once, on each device.

    Returns:
      float32 scalar.

    Raises:
      ValueError: `hidden` has another dtype, which may have too small a range.
    """
    return _run(hidden, head, targets, weights, chunk, gradients=False)


def _forward(hidden, head, targets, weights, chunk):
    loss, *gradients = _run(hidden, head, targets, weights, chunk, gradients=True)
    return loss, gradients


def _backward(chunk, gradients, cotangent):
    dhidden, dhead = gradients
    return (cotangent * dhidden.astype(jnp.float32)).astype(dhidden.dtype), cotangent * dhead, None, None


cross_entropy.defvjp(_forward, _backward)


def _run(hidden, head, targets, weights, chunk, gradients):
    if hidden.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"hidden: needs bfloat16 or float32, got {hidden.dtype}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return _chunks(hidden, head, targets, weights, chunk, gradients, (), (), ())
    batch, sequence = (
        tuple(name for name in names if name in mesh.axis_names)
        for names in (mesh_axes.value.batch, mesh_axes.value.sequence)
    )
    vocab, embed = parameter_sharding(mesh, ("vocab", "embed"), head.shape).spec
    tokens = PartitionSpec(batch, sequence)
    run = jax.shard_map(
        lambda *x: _chunks(*x, chunk, gradients, batch + sequence, vocab, embed),
        in_specs=(tokens, PartitionSpec(vocab), tokens, tokens),
        out_specs=(PartitionSpec(), tokens, PartitionSpec(vocab, embed)) if gradients else PartitionSpec(),
        check_vma=False,
    )
    return run(hidden, head, targets, weights)


def _chunks(hidden, head, targets, weights, chunk, gradients, split_tokens, vocab, embed):
    """What `cross_entropy` computes, with its gradients where they are wanted, on one device.

    `split_tokens` and `vocab` are the axes over which tokens and the vocabulary are split. `embed` are those over which
    the columns of the projection's gradient are to be; they are among `split_tokens`.
    """
    table = head.astype(hidden.dtype)
    tokens = targets.size
    size = min(chunk, tokens)
    count = -(-tokens // size)

    def split(x, features=()):
        x = x.reshape(tokens, *features)
        x = jnp.pad(x, [(0, count * size - tokens)] + [(0, 0)] * len(features))
        return x.reshape(count, size, *features)

    place = targets - (lax.axis_index(vocab) * len(table) if vocab else 0)
    hit = (place >= 0) & (place < len(table))

    # With e_v = exp(logit_v - shift), S the sum over all but the target and Z = S + e_target, the gradient of a logit
    # is e_v / Z and the target's -S / Z. Only 1 / Z needs all logits, and it can stand before the sums over v.
    def one(carry, part):
        loss, dhead = carry
        h, place, hit, weight = part
        own = jnp.where(hit[:, None], jnp.take(table, place, axis=0, mode="clip").astype(jnp.float32), 0.0)
        own = _sum(own, vocab)
        target = jnp.sum(h.astype(jnp.float32) * own, axis=1)
        terms, rest, shift = _terms(_product(h, table, (1, 1)), target, place, h.dtype)
        highest = _max(shift, vocab)
        share = jnp.exp(shift - highest)
        rest = _sum(share * rest, vocab)
        total = rest + jnp.exp(target - highest)
        loss += jnp.sum(weight * (highest - target + jnp.log(total)))
        if not gradients:
            return (loss, dhead), None
        factor = weight / total
        rows = (factor * share)[:, None]
        dhead += _product(terms, (rows * h.astype(jnp.float32)).astype(h.dtype), (0, 0))
        dtarget = -factor * rest
        dh = _sum(rows * _product(terms, table, (1, 0)), vocab) + dtarget[:, None] * own
        return (loss, dhead), (dh.astype(h.dtype), dtarget)

    start = (jnp.float32(0), jnp.zeros(table.shape, jnp.float32) if gradients else None)
    parts = (split(hidden, hidden.shape[-1:]), split(place), split(hit), split(weights))
    (loss, dhead), stacked = lax.scan(one, start, parts)
    loss = _sum(loss, split_tokens)
    if not gradients:
        return loss
    dhidden, dtarget = (x.reshape(count * size, *x.shape[2:])[:tokens] for x in stacked)
    update = jnp.where(hit.reshape(-1), dtarget, 0.0)[:, None] * hidden.reshape(tokens, -1).astype(jnp.float32)
    dhead = dhead.at[jnp.clip(place.reshape(-1), 0, len(table) - 1)].add(update)
    if embed:
        dhead = lax.psum_scatter(dhead, embed, scatter_dimension=1, tiled=True)
    dhead = _sum(dhead, tuple(axis for axis in split_tokens if axis not in (embed or ())))
    return loss, dhidden.reshape(hidden.shape), dhead.astype(head.dtype)


def _terms(logits, target, place, dtype):
    """`pallas_kernels.softmax_terms`; where that does not run by XLA, with the largest logits as shifts."""
    if _by_kernel(logits):
        kernel = functools.partial(_kernel().softmax_terms, dtype=dtype)
        return device.run(kernel, logits, target, place)
    shift = jnp.maximum(jnp.max(logits, axis=1), target)
    others = lax.broadcasted_iota(jnp.int32, logits.shape, 1) != place[:, None]
    terms = jnp.where(others, jnp.exp(logits - shift[:, None]), 0.0)
    return terms.astype(dtype), jnp.sum(terms, axis=1), shift


@functools.cache
def _kernel():
    try:
        return importlib.import_module("pallas_kernels.softmax_terms")
    except ImportError:  # JAX has announced that it will drop Pallas' Triton backend
        return None


def _by_kernel(logits) -> bool:
    return device.target()[0] == "gpu" and _kernel() is not None and logits.size < 2**31


def _product(a, b, axes):
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _sum(x, axes):
    return lax.psum(x, axes) if axes else x


def _max(x, axes):
    return lax.pmax(x, axes) if axes else x
