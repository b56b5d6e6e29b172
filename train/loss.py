"""Cross-entropy of hidden states and an output projection, without the logits of all tokens at once.

The logits of a vocabulary of 152k take as much memory as the model's own activations. They are computed for a chunk of
tokens at a time; where gradients are wanted, the chunk's gradients with respect to the hidden states and the projection
are computed while its logits exist, so nothing is computed twice and no more than one chunk of logits ever exists.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

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
      hidden: final hidden states, (B, T, D), any float dtype.
      head: output projection, or the embedding where they are tied, (vocab, D).
      targets: int32 ids of the next tokens, (B, T).
      weights: float32 factor of each token's loss, (B, T); not differentiated.
      chunk: tokens whose logits exist at once, on each device.

    Returns:
      float32 scalar.
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

    first = lax.axis_index(vocab) * len(table) if vocab else 0

    def one(carry, part):
        loss, dhead = carry
        h, target, weight = part
        logits = _product(h, table, (1, 1))
        top, total = _top_and_total(logits)
        highest = _max(top, vocab)
        normaliser = highest + jnp.log(_sum(total * jnp.exp(top - highest), vocab))
        place = target - first
        hit = (place >= 0) & (place < len(table))
        at_target = jnp.take_along_axis(logits, jnp.clip(place, 0, len(table) - 1)[:, None], 1)[:, 0]
        at_target = _sum(jnp.where(hit, at_target, 0.0), vocab)
        loss += jnp.sum(weight * (normaliser - at_target))
        if not gradients:
            return (loss, dhead), None
        one_hot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == place[:, None]
        dlogits = jnp.exp(logits - normaliser[:, None]) - one_hot.astype(jnp.float32)
        dlogits = (dlogits * weight[:, None]).astype(h.dtype)
        dhead += _product(dlogits, h, (0, 0))
        return (loss, dhead), _sum(_product(dlogits, table, (1, 0)), vocab).astype(h.dtype)

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32) if gradients else None)
    parts = (split(hidden, hidden.shape[-1:]), split(targets), split(weights))
    (loss, dhead), dhidden = lax.scan(one, start, parts)
    loss = _sum(loss, split_tokens)
    if not gradients:
        return loss
    dhidden = dhidden.reshape(count * size, -1)[:tokens].reshape(hidden.shape)
    if embed:
        dhead = lax.psum_scatter(dhead, embed, scatter_dimension=1, tiled=True)
    dhead = _sum(dhead, tuple(axis for axis in split_tokens if axis not in (embed or ())))
    return loss, dhidden, dhead.astype(head.dtype)


def _top_and_total(logits):
    """The largest logit of each row and the sum of exp(logit - largest), both of one reading of the logits."""

    def merge(a, b):
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    lowest = jnp.float32(jnp.finfo(jnp.float32).min)  # not -inf, which less itself is no number
    return lax.reduce((logits, jnp.ones_like(logits)), (lowest, jnp.float32(0)), merge, (1,))


def _product(a, b, axes):
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _sum(x, axes):
    return lax.psum(x, axes) if axes else x


def _max(x, axes):
    return lax.pmax(x, axes) if axes else x
