"""Text to batches: a corpus found by rule, a memory-mapped token file, packed rows, grain's iterator over them.

A token file is one stream, `separator document separator document ... separator`: a separator opens each document and
is what the document before it predicts at its end. Rows are planned once and then drawn by index, so that the state of
the iterator is a single number.
"""

import bisect
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int

from train.config import Config, ConfigError
from train.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

SPLITS = ("train", "validation")
_MIN_BYTES = 2_000_000
_CACHE = Path(".cache")
# Not source to learn from, or cut out of the standard library by some distributors.
_SKIPPED_FOLDERS = {"test", "tests", "encodings", "idlelib", "lib2to3", "ensurepip", "tkinter"}
_SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "__pycache__"}
# Directories of installed packages that are copies of one another for the most part.
_REPETITIVE_PACKAGES = {"transformers/models"}
_PACKAGE_TEXT = {".py", ".pyi", ".md", ".rst"}
# A file of the user's above the first size is cut at line ends into documents of about the second.
_LONG_FILE, _PIECE = 1 << 16, 1 << 14


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of both splits on disk, and what they were made from.

    Attributes:
      folder: cache folder with the token files and the tokenizer.
      tokenizer: the tokenizer that made them.
      record: source, sha256, files, bytes, Python version, and for each split its documents, bytes and tokens.
    """

    folder: Path
    tokenizer: Tokenizer
    record: dict

    def rows(self, split: str, seq_len: int) -> "PackedRows":
        """The packed rows of "train" or "validation"."""
        tokens = np.memmap(self.folder / f"{split}.bin", np.dtype(self.record["dtype"]), mode="r")
        return PackedRows(tokens, np.load(self.folder / f"{split}_starts.npy"), seq_len)


def standard_library() -> dict[str, str]:
    """Source of the running Python's standard library: text by relative path, chosen by rule."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        folders = name.parts[:-1]
        generated = path.name.startswith("_sysconfigdata") or any(part.startswith("config-") for part in folders)
        if not generated and _SKIPPED_FOLDERS.isdisjoint(folders):
            texts[name.as_posix()] = _read(path)
    return texts


def installed_packages() -> dict[str, str]:
    """Python source and documentation of the packages that lie with NumPy: text by relative path, each text once."""
    root = Path(np.__file__).parents[1]
    texts, seen = {}, set()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _PACKAGE_TEXT):
        name = path.relative_to(root)
        if any(name.is_relative_to(folder) for folder in _REPETITIVE_PACKAGES):
            continue
        text = _read(path)
        if text not in seen and "\0" not in text:
            seen.add(text)
            texts[name.as_posix()] = text
    return texts


def text_files(root: Path) -> dict[str, str]:
    """Text by relative path of a file, or of every file in a folder that is not hidden and holds no NUL byte."""
    if root.is_file():
        files = {root.name: root}
    else:
        found = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}
        files = {n.as_posix(): p for n, p in found.items() if not any(part.startswith(".") for part in n.parts)}
    texts = {}
    for name, path in files.items():
        text = _read(path)
        if "\0" in text:
            continue
        texts.update(_pieces(name, text) if len(text) > _LONG_FILE else {name: text})
    return texts


def _pieces(name: str, text: str) -> dict[str, str]:
    pieces, start = {}, 0
    while start < len(text):
        newline = text.find("\n", start + _PIECE)
        end = newline + 1 if 0 <= newline < start + 2 * _PIECE else start + _PIECE
        pieces[f"{name}#{len(pieces)}"] = text[start:end]
        start = end
    return pieces


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def split_of(name: str) -> str:
    """The split of a document, from its path alone: one in 20 validates."""
    return "validation" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0 else "train"


def load_corpus(config: Config) -> Corpus:
    """Finds the corpus, and makes its token files unless an earlier run left them in .cache/.

    Raises:
      ConfigError: no such path, under 2 MB of text, nothing to validate on, or a vocabulary too small for it.
    """
    named = {"stdlib": standard_library, "site-packages": installed_packages}
    if config.data in named:
        texts, source = named[config.data](), config.data
    elif Path(config.data).exists():
        texts, source = text_files(Path(config.data)), str(Path(config.data).resolve())
    else:
        raise ConfigError(f"data={config.data!r}: no such file or folder, and none of {', '.join(named)}")
    size = sum(len(text.encode()) for text in texts.values())
    if size < _MIN_BYTES:
        raise ConfigError(f"data: {source} holds {size:,} bytes of text; {_MIN_BYTES:,} are needed, pass --data PATH")
    if {split_of(name) for name in texts} != set(SPLITS):
        raise ConfigError(f"data: {source} has too few documents ({len(texts)}) to keep some for validation")

    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}\0{text}\0".encode())
    record = {
        "source": source,
        "sha256": digest.hexdigest(),
        "files": len(texts),
        "bytes": size,
        "python": platform.python_version(),
    }
    folder = _CACHE / f"{record['sha256'][:16]}-{_tokenizer_key(config)}"
    if not folder.exists():
        _write_corpus(folder, texts, config)
    record |= json.loads((folder / "corpus.json").read_text())
    return Corpus(folder, load_tokenizer(config, folder), record)


def _tokenizer_key(config: Config) -> str:
    """Names the tokenizer in the cache: the same text as other tokens is another corpus."""
    match config.tokenizer:
        case "bytes":
            return f"bytes{ByteTokenizer(config.model.vocab_size).vocab_size}"
        case "bpe":
            return f"bpe{config.model.vocab_size}"
    path = Path(config.init_from) / "tokenizer.json"
    try:
        return f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}-{config.separator}"
    except OSError as error:
        raise ConfigError(f"init_from={config.init_from!r}: its tokenizer.json is gone ({error.strerror})") from None


def _write_corpus(folder: Path, texts: dict[str, str], config: Config):
    """Tokenizes into `folder`, which appears whole or not at all."""
    _CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE, prefix=".making-", ignore_cleanup_errors=True) as temporary:
        made = Path(temporary)
        splits = {split: [text for name, text in texts.items() if split_of(name) == split] for split in SPLITS}
        if config.tokenizer == "bpe":
            train_bpe(splits["train"], config.model.vocab_size, made / "tokenizer.json")
        elif config.tokenizer == "pretrained":
            shutil.copy(Path(config.init_from) / "tokenizer.json", made)
        tokenizer = load_tokenizer(config, made)
        if tokenizer.vocab_size > config.model.vocab_size:
            have = config.model.vocab_size
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {have}: they do not fit")
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        record = {"dtype": dtype.name}
        for split, documents in splits.items():
            encoded = tokenizer.encode(documents)
            starts = np.cumsum([0] + [len(ids) + 1 for ids in encoded])
            tokens = np.full(starts[-1] + 1, tokenizer.separator, dtype)
            for start, ids in zip(starts, encoded, strict=False):
                tokens[start + 1 : start + 1 + len(ids)] = ids
            tokens.tofile(made / f"{split}.bin")
            np.save(made / f"{split}_starts.npy", starts)
            size = sum(len(text.encode()) for text in documents)
            record[split] = {"documents": len(documents), "bytes": size, "tokens": int(starts[-1])}
        (made / "corpus.json").write_text(json.dumps(record))
        try:
            made.rename(folder)
        except OSError:
            # Another process made the same corpus meanwhile.
            if not folder.exists():
                raise


class PackedRows:
    """Documents packed into rows of `seq_len` tokens; a random-access source for grain.

    A long document fills whole rows; what is left of each goes, longest first, where it fits best. Every token of a
    document is a target once. The plan depends on the documents and `seq_len` alone.
    """

    def __init__(self, tokens: Int[np.ndarray, " tokens"], starts: Int[np.ndarray, " documents"], seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len
        lengths = np.diff(starts)
        whole, left = lengths // seq_len, lengths % seq_len
        index_in_document = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
        self._whole = np.repeat(starts[:-1], whole) + index_in_document * seq_len
        self._shared = _best_fit(starts[1:] - left, left, seq_len)

    def __len__(self) -> int:
        return len(self._whole) + len(self._shared)

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, " seq_len"]]:
        """Returns int32 "inputs", "targets" and "segment_ids": 1, 2, ... for the row's documents, 0 for padding."""
        row = {name: np.zeros(self._seq_len, np.int32) for name in ("inputs", "targets", "segment_ids")}
        if index < len(self._whole):
            parts = [(self._whole[index], self._seq_len)]
        else:
            parts = self._shared[index - len(self._whole)]
        at = 0
        for segment, (start, length) in enumerate(parts, 1):
            row["inputs"][at : at + length] = self._tokens[start : start + length]
            row["targets"][at : at + length] = self._tokens[start + 1 : start + length + 1]
            row["segment_ids"][at : at + length] = segment
            at += length
        return row


def _best_fit(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[tuple[int, int]]]:
    """Rows of (start, length) parts: each part, longest first, goes to the fullest row that still holds it."""
    rows, room = [], []  # room: sorted (free tokens, row)
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        if length == 0:
            break
        at = bisect.bisect_left(room, (length, 0))
        free, row = room.pop(at) if at < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append((int(starts[i]), length))
        bisect.insort(room, (free - length, row))
    return rows


def batches(
    rows: PackedRows, batch_size: int, seed: int, *, parts: int = 1, block: int = 0, blocks: int = 1, start: int = 0
) -> grain.DatasetIterator:
    """Endless shuffled batches, one per update; a new order in every epoch. Close it when done.

    An update's rows are the next `batch_size` of the order, in `parts` of which each is cut into `blocks`. This yields
    block number `block` of every part, so that the order does not depend on who reads which block.

    Args:
      rows: the split.
      batch_size: rows of an update over all blocks.
      seed: of the order.
      parts: consecutive shares of an update's rows.
      block: the share of each part to yield.
      blocks: number of shares.
      start: updates to pass over: a run continues where it stopped.
    """
    dataset = grain.MapDataset.source(rows).shuffle(seed=seed).repeat()
    dataset = dataset.batch(batch_size // (parts * blocks))[block::blocks].batch(parts, batch_fn=_join)
    # A row costs microseconds: threads would cost more than they hide.
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    iterator.set_state({"next_index": start})
    return iterator


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_text_atomically(path: Path, text: str):
    """Writes a small file that is whole at every moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
