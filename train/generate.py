"""`python -m train.generate CHECKPOINT --prompt TEXT`: text from a checkpoint, as it is drawn."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from parallax_jax.model import TransformerLM
from train.config import parse_flags, run_command
from train.run import load_checkpoint
from train.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the fewest most likely tokens whose probabilities, after top_k, sum to p or more."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must be in (0, 1]")

    def draw(self, key: jax.Array, logits: jax.Array) -> jax.Array:
        """Draws a token from float32 logits (vocab,)."""
        if self.temperature == 0:
            return jnp.argmax(logits)
        logits = logits / self.temperature
        order = jnp.argsort(-logits)
        kept = logits[order]
        if self.top_k is not None:
            kept = jnp.where(jnp.arange(kept.size) < self.top_k, kept, -jnp.inf)
        if self.top_p is not None:
            probability = jax.nn.softmax(kept)
            kept = jnp.where(jnp.cumsum(probability) - probability < self.top_p, kept, -jnp.inf)
        return order[jax.random.categorical(key, kept)]


def generate(
    model: TransformerLM, params, prompt: list[int], window: int, vocab_size: int, sampling: Sampling
) -> Iterator[int]:
    """Endless tokens after `prompt`; each sees at most the `window` tokens before it.

    Every token recomputes its whole window.
    """

    @jax.jit
    def next_token(params, tokens, last, key):
        logits = model.apply({"params": params}, tokens)[0, last, :vocab_size]
        return sampling.draw(key, logits)

    tokens = list(prompt)
    for key_index in range(1 << 31):
        tokens = tokens[-window:]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(tokens)] = tokens
        key = jax.random.fold_in(jax.random.key(sampling.seed), key_index)
        tokens.append(int(next_token(params, padded, len(tokens) - 1, key)))
        yield tokens[-1]


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of the tokens piece by piece, each as soon as its characters are whole; ends at a separator."""
    ids, shown = [], 0
    for token in tokens:
        if token == tokenizer.separator:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may still lack bytes; four tokens on it is broken for good.
        if not text.endswith("\ufffd") or len(text) - shown > 4:
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


@dataclasses.dataclass(frozen=True)
class Args:
    """Samples text from a checkpoint."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run folder, or one of its checkpoints/STEP."""
    prompt: str = "def "
    """Text to continue."""
    max_tokens: int = 500
    """Tokens to draw; a separator, where the model ends its document, ends the text earlier."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()


def sample(
    model: TransformerLM, params, tokenizer: Tokenizer, window: int, prompt: str, max_tokens: int, sampling: Sampling
) -> Iterator[str]:
    """Pieces of the text that continues `prompt` at a document's start, as they are drawn."""
    ids = [tokenizer.separator, *map(int, tokenizer.encode([prompt])[0])]
    tokens = generate(model, params, ids, window, tokenizer.vocab_size, sampling)
    return stream_text(tokenizer, itertools.islice(tokens, max_tokens))


def main(argv: list[str]):
    """Prints the prompt and what follows it."""
    args = parse_flags(Args, argv, "python -m train.generate")
    run = load_checkpoint(args.checkpoint)
    print(args.prompt, end="", flush=True)
    for piece in sample(
        run.model, run.params, run.tokenizer, run.config.seq_len, args.prompt, args.max_tokens, args.sampling
    ):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
