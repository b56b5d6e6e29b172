"""Generation: ragged prompts in, tokens out, a few tokens in every call of one compiled program."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from parallax_jax import step as fused_step
from parallax_jax.cache import KVCache, init_cache
from parallax_jax.model import ModelConfig, TransformerLM, unstack_layers


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Filters apply in the order of the fields, each to what the last one left.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens; None keeps all.
      top_p: keep the likeliest tokens until their probabilities sum to p; None keeps all.
      min_p: keep tokens with at least this share of the likeliest one's probability; None keeps all.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        rules = {
            "temperature": (self.temperature >= 0, "a number >= 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "None or an integer >= 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "None or a number in (0, 1]"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "None or a number in [0, 1]"),
        }
        for name, (ok, allowed) in rules.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Scales the logits by the temperature (which must not be 0) and puts -inf where a filter drops a token."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = _at_least(logits, jax.lax.top_k(logits, sampling.top_k)[0][:, -1:])
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        logits = _at_least(logits, jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True))
    if sampling.min_p is not None:
        logits = _at_least(logits, jnp.max(logits, -1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p)))
    return logits


def _at_least(logits, threshold):
    return jnp.where(logits < threshold, -jnp.inf, logits)


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Draws one token per row, each row with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)


def generate(
    config: ModelConfig, params, prompts: Sequence[Sequence[int]], *, stop_tokens: Sequence[int] = (), **options
) -> list[list[int]]:
    """Returns the new tokens of each prompt, without the stop token. Arguments as in `stream`."""
    rows = np.stack(list(stream(config, params, prompts, stop_tokens=stop_tokens, **options)), axis=1)
    return [[int(t) for t in row if t >= 0 and t not in stop_tokens] for row in rows]


def stream(
    config: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    vocab_size: int | None = None,
    cache: KVCache | None = None,
    prefill_chunk: int = 512,
    tokens_per_call: int = 16,
) -> Iterator[np.ndarray]:
    """Yields the next token of every sequence, step by step, while the device already computes those after.

    What a prompt gets depends on itself and its seed alone, not on what else is in the batch.

    Args:
      config: the model.
      params: the model's parameters, as `config` stacks them.
      prompts: token ids, one sequence or more, each of one token or more; lengths may differ.
      max_new_tokens: tokens after each prompt, at most.
      sampling: how a token is drawn.
      stop_tokens: a sequence ends with the first of these.
      seed: a seed for the batch, or one per prompt.
      vocab_size: only ids below it are drawn, where the model's own is larger than the tokenizer's; None for all.
      cache: an empty cache to fill, which must not be used again; None for a contiguous one that fits.
      prefill_chunk: prompts are read in chunks of this many tokens.
      tokens_per_call: the device computes this many tokens in a call, and they come together; 1 for each as soon as it
        is drawn. Few and the host, which takes a millisecond to start a call, cannot keep pace with a fast GPU; the run
        ends in the middle of a call, the rest of which is for nothing.

    Yields:
      int32 (B,), -1 for a sequence that has ended. The stop token itself is yielded.

    Raises:
      ValueError: an argument is wrong, or the cache too small.
    """
    lengths, capacity = _check(config, prompts, max_new_tokens, seed, cache, prefill_chunk, tokens_per_call)
    config = dataclasses.replace(config, remat="none")
    # Every product casts its matrix to this dtype: done once, a step reads no more than it needs.
    is_gain = lambda path: "['scale']" in jax.tree_util.keystr(path)
    params = jax.tree.map_with_path(lambda path, x: x if is_gain(path) else x.astype(config.dtype), params)
    # Prompts are read layer by layer: a scan would copy the whole cache for each chunk.
    whole, (config, params) = (config, params), unstack_layers(config, params)
    if cache is None:
        cache = init_cache(config, len(prompts), -(-capacity // 8) * 8)  # as Hopper's kernels want it
    elif not isinstance(cache.key, tuple):
        cache = dataclasses.replace(cache, key=tuple(cache.key), value=tuple(cache.value))
    if isinstance(seed, int):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
    else:
        keys = jax.vmap(jax.random.key)(jnp.asarray(seed))

    chunk = min(prefill_chunk, 1 << (int(lengths.max()) - 1).bit_length())
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    last = jnp.zeros((len(prompts), config.width), config.dtype)
    for start in range(0, tokens.shape[1], chunk):
        num_new = np.clip(lengths - start, 0, chunk).astype(np.int32)
        last, cache = _prefill(config, params, cache, tokens[:, start : start + chunk], num_new, last)
    stop = jnp.asarray(list(stop_tokens) or [-1], jnp.int32)
    draws = Draws(keys, stop, jnp.int32(vocab_size or config.vocab_size))
    token, done = _first(config, sampling, params, last, cache.lengths, draws)
    if fused_step.takes_stacked(*whole, jax.eval_shape(_stacked, cache)):
        (config, params), cache = whole, _stacked(cache)
    rows, left = token[None], max_new_tokens
    while left > 0:
        ready, left = rows, left - len(rows)
        if left > 0:
            state = (cache, token, done, np.int32(left), draws)
            rows, cache, token, done = decode_steps(config, sampling, tokens_per_call, params, *state)
        for row in np.asarray(ready)[: len(ready) + min(left, 0)]:
            yield row
            if np.isin(row, [-1, *stop_tokens]).all():
                return


@jax.jit
def _stacked(cache):
    return dataclasses.replace(cache, key=jnp.stack(cache.key), value=jnp.stack(cache.value))


class Draws(NamedTuple):
    """What every step draws by: a key per sequence, the ids that end it, and the number of ids that may come."""

    keys: Key[Array, " B"]
    stop: Int[Array, " N"]
    vocab_size: Int[Array, ""]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(config, params, cache, tokens, num_new, last):
    """Reads a chunk; `last` holds the hidden state of each sequence's last token so far."""
    hidden, cache = TransformerLM(config).apply(
        {"params": params}, tokens, cache=cache, num_new=num_new, method="hidden"
    )
    end = jnp.take_along_axis(hidden, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((num_new > 0)[:, None], end, last), cache


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def _first(config, sampling, params, last, lengths, draws):
    logits = TransformerLM(config).apply({"params": params}, last, method="logits")
    return _draw(logits, lengths, jnp.zeros(lengths.shape, bool), draws, sampling)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "steps"), donate_argnames="cache")
def decode_steps(config, sampling, steps, params, cache, token, done, left, draws: Draws):
    """Draws `steps` tokens of each sequence that goes on, in one call, for the host takes as long to start any call.

    Args:
      config: the model; its layers are stacked only where `step.takes_stacked` says so.
      sampling: how a token is drawn.
      steps: tokens of each sequence.
      params: the model's parameters.
      cache: of the tokens before `token`; donated.
      token: int32 (B,), the last of each sequence.
      done: bool (B,), sequences that have ended.
      left: int32, the number of tokens after which all end.
      draws: what tokens are drawn by.

    Returns:
      tokens, int32 (steps, B), -1 for a sequence that has ended; and cache, token and done for the next call.
    """

    def step(number, state):
        tokens, cache, token, done = state
        done |= number >= left
        num_new = 1 - done.astype(jnp.int32)
        inputs = jnp.maximum(token, 0)[:, None]
        logits, cache = TransformerLM(config).apply({"params": params}, inputs, cache=cache, num_new=num_new)
        token, done = _draw(logits[:, 0], cache.lengths, done, draws, sampling)
        # Not an update of a slice, which XLA runs outside the graph that is all else of the step on a GPU.
        tokens = jnp.where(jnp.arange(steps)[:, None] == number, token, tokens)
        return tokens, cache, token, done

    tokens = jnp.zeros((steps, len(token)), jnp.int32)
    return jax.lax.fori_loop(0, steps, step, (tokens, cache, token, done))


def _draw(logits, lengths, done, draws, sampling):
    logits = jnp.where(jnp.arange(logits.shape[-1]) < draws.vocab_size, logits, -jnp.inf)
    token = sample(logits, jax.vmap(jax.random.fold_in)(draws.keys, lengths), sampling)
    token = jnp.where(done, -1, token)
    return token, done | jnp.isin(token, draws.stop)


def _check(config, prompts, max_new_tokens, seed, cache, prefill_chunk, tokens_per_call) -> tuple[np.ndarray, int]:
    """Returns the prompts' lengths and the capacity that the run needs."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.min():
        raise ValueError(f"prompts: need one token or more each, got lengths {lengths.tolist()}")
    for prompt in prompts:
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"prompts: token ids must lie in [0, {config.vocab_size - 1}], got {low} to {high}")
    numbers = {"max_new_tokens": max_new_tokens, "prefill_chunk": prefill_chunk, "tokens_per_call": tokens_per_call}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: must be an integer >= 1, got {number}")
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ValueError(f"seed: must be an int or one per prompt ({len(prompts)}), got {len(seed)}")
    capacity = int(lengths.max()) + max_new_tokens - 1  # the last token drawn is never read
    if cache is not None:
        if len(cache.lengths) != len(prompts) or np.asarray(cache.lengths).any():
            raise ValueError(f"cache: must be empty and hold {len(prompts)} sequences, got lengths {cache.lengths}")
        if cache.capacity < capacity:
            raise ValueError(f"cache: needs room for {capacity} tokens of a sequence, has {cache.capacity}")
    return lengths, capacity
