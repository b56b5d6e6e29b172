"""Text to token ids and back: raw bytes, or a byte-level BPE trained in place. Id `separator` parts documents."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

_SEPARATOR = "<|separator|>"


class ByteTokenizer:
    """One token per byte of UTF-8, and the separator."""

    separator = 256
    vocab_size = 257

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without separators."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators and broken UTF-8 become U+FFFD."""
        return b"".join(bytes([i]) if i < 256 else b"\xff" for i in ids).decode(errors="replace")


class BPETokenizer:
    """Byte-level BPE of the tokenizers library, kept in one JSON file."""

    def __init__(self, path: Path):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.separator = self._tokenizer.token_to_id(_SEPARATOR)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without separators."""
        return [np.array(encoding.ids, np.uint32) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators and broken UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False).replace(_SEPARATOR, "\ufffd")


Tokenizer = ByteTokenizer | BPETokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path):
    """Trains a byte-level BPE of at most `vocab_size` tokens, the separator and all bytes among them, into `path`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def load_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """The tokenizer of a corpus or a run: `kind` is "bytes" or "bpe", which lies in `folder`/tokenizer.json."""
    return ByteTokenizer() if kind == "bytes" else BPETokenizer(folder / "tokenizer.json")
