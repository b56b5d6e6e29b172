"""Text to token ids and back: raw bytes, or the tokenizers library's JSON file. Id `separator` parts documents."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from train.config import NUM_BYTES, Config, ConfigError

_SEPARATOR = "<|separator|>"
_MAX_TO_LEARN_FROM = 1 << 24  # characters


class ByteTokenizer:
    """One token per byte of UTF-8, and the separator: id 256, or NUL where there are 256 ids only."""

    def __init__(self, vocab_size: int = NUM_BYTES + 1):
        self.vocab_size = min(vocab_size, NUM_BYTES + 1)
        self.separator = NUM_BYTES if self.vocab_size > NUM_BYTES else 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without separators."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators and broken UTF-8 become U+FFFD."""
        broken = b"\xff"
        return b"".join(broken if i == self.separator else bytes([i]) for i in ids).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the tokenizers library; `separator` is one of its ids, None for that of `train_bpe`."""

    def __init__(self, path: Path, separator: int | None = None):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower one
            raise ConfigError(f"{path} cannot be read as a tokenizer ({error})") from None
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.separator = self._tokenizer.token_to_id(_SEPARATOR) if separator is None else separator
        self._separator = self._tokenizer.id_to_token(self.separator)
        if self._separator is None:
            raise ConfigError(f"separator={self.separator}: {path} has no such token")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without separators."""
        ids = []
        for some in itertools.batched(texts, 1024):  # encodings take many times the memory of their ids
            encodings = self._tokenizer.encode_batch_fast(list(some), add_special_tokens=False)
            ids += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators and broken UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False).replace(self._separator, "\ufffd")


Tokenizer = ByteTokenizer | FileTokenizer


def train_bpe(texts: Sequence[str], vocab_size: int, path: Path):
    """Trains a byte-level BPE of at most `vocab_size` tokens, the separator and all bytes among them, into `path`.

    Of more than 16 M characters it takes every n-th text, which is enough to learn from and saves most of the time.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stride = -(-sum(map(len, texts)) // _MAX_TO_LEARN_FROM)
    tokenizer.train_from_iterator(texts[::stride], trainer)
    tokenizer.save(str(path))


def load_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The tokenizer of a run; one that is not made of bytes lies in `folder`/tokenizer.json."""
    if config.tokenizer == "bytes":
        return ByteTokenizer(config.model.vocab_size)
    return FileTokenizer(folder / "tokenizer.json", config.separator)
