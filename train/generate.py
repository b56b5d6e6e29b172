"""`python -m train.generate CHECKPOINT --prompt TEXT`: text from a checkpoint, as it is drawn."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import tyro

from parallax_jax.model import TransformerLM
from parallax_jax.sampling import Sampling, stream
from train.config import parse_flags, run_command
from train.run import load_checkpoint
from train.tokenizer import Tokenizer

DEFAULT_SAMPLING = Sampling(temperature=0.8)


class _Text:
    """Turns tokens into text piece by piece, each as soon as its characters are whole; ends at a separator."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._shown, self._ended = tokenizer, [], 0, False

    def add(self, token: int) -> str:
        """Returns the text that the token completes."""
        self._ended |= token == self._tokenizer.separator
        if self._ended:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A character may still lack bytes; four tokens on it is broken for good.
        return "" if text.endswith("\ufffd") and len(text) - self._shown <= 4 else self._show(text)

    def rest(self) -> str:
        """Returns what `add` has held back."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        piece, self._shown = text[self._shown :], len(text)
        return piece


@dataclasses.dataclass(frozen=True)
class Args:
    """Samples text from a checkpoint."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run folder, or one of its checkpoints/STEP."""
    prompt: tuple[str, ...] = ("def ",)
    """Text to continue; of several texts each is continued by itself, all at the same time."""
    max_tokens: int = 500
    """Tokens to draw; a separator, where the model ends its document, ends the text earlier."""
    seed: int = 0
    """Seed of the draws."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = DEFAULT_SAMPLING


def sample(
    model: TransformerLM,
    params,
    tokenizer: Tokenizer,
    window: int,
    prompts: tuple[str, ...],
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[tuple[str, ...]]:
    """Pieces of the texts that continue each prompt at a document's start, as they are drawn.

    No token sees more than the `window` tokens that training showed it.
    """
    windows = tuple(min(own or window, window) for own in model.config.windows)
    shared = windows[0] if len(set(windows)) == 1 else windows
    config = dataclasses.replace(model.config, local_window_size=shared)
    ids = [[tokenizer.separator, *map(int, row)] for row in tokenizer.encode(list(prompts))]
    steps = stream(
        config,
        params,
        ids,
        max_new_tokens=max_tokens,
        sampling=sampling,
        stop_tokens=[tokenizer.separator],
        seed=seed,
        vocab_size=tokenizer.vocab_size,
    )
    texts = [_Text(tokenizer) for _ in prompts]
    for tokens in steps:
        yield tuple(text.add(int(token)) for text, token in zip(texts, tokens, strict=True))
    yield tuple(text.rest() for text in texts)


def main(argv: list[str]):
    """Prints the prompts and what follows each."""
    args = parse_flags(Args, argv, "python -m train.generate")
    run = load_checkpoint(args.checkpoint)
    pieces = sample(
        run.model, run.params, run.tokenizer, run.config.seq_len, args.prompt, args.max_tokens, args.sampling, args.seed
    )
    if len(args.prompt) == 1:
        print(args.prompt[0], end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for prompt, text in zip(args.prompt, zip(*pieces, strict=True), strict=True):
        print(f"{prompt}{''.join(text)}\n")


if __name__ == "__main__":
    run_command(main)
