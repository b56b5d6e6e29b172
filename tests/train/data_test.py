import dataclasses
import itertools

import numpy as np
import pytest

import train.data
import train.tokenizer
from train.config import ConfigError
from train.data import PackedRows, batches, installed_packages, load_corpus, split_of, standard_library, text_files
from train.tokenizer import ByteTokenizer, FileTokenizer, train_bpe


def make_stream(lengths, rng):
    """Documents of distinct tokens between separators (0), as a corpus stores them."""
    starts = np.cumsum([0] + [n + 1 for n in lengths])
    tokens = rng.permutation(np.arange(1, starts[-1] + 2)).astype(np.uint32)
    tokens[starts] = 0
    return tokens, starts


@pytest.mark.parametrize("seq_len", [1, 7, 16, 63])
def test_packing_keeps_every_token_once_and_documents_apart(seq_len):
    rng = np.random.default_rng(seq_len)
    lengths = [0, 1, seq_len - 1, seq_len, 2 * seq_len, *rng.integers(0, 5 * seq_len, 40)]
    tokens, starts = make_stream(lengths, rng)
    rows = PackedRows(tokens, starts, seq_len)
    follows = dict(itertools.pairwise(tokens))
    ends = {int(tokens[s - 1]) for s in starts[1:]}
    targets = []
    for i in range(len(rows)):
        row = rows[i]
        assert all(value.shape == (seq_len,) and value.dtype == np.int32 for value in row.values())
        real = row["segment_ids"] > 0
        assert not row["inputs"][~real].any() and not row["targets"][~real].any()
        assert (np.diff(real.astype(int)) <= 0).all(), "padding is at the end"
        for at in np.flatnonzero(real):
            source, target = int(row["inputs"][at]), int(row["targets"][at])
            assert target == (0 if source in ends else follows[source]) or source == 0
            inside = at + 1 < seq_len and row["segment_ids"][at + 1] == row["segment_ids"][at]
            if inside:
                assert row["inputs"][at + 1] == target
            targets.append(target)
        assert (np.diff(row["segment_ids"][real]) >= 0).all()
    assert sorted(targets) == sorted(tokens[1:].tolist())


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 400, 500)
    tokens, starts = make_stream(lengths, rng)
    rows = PackedRows(tokens, starts, 64)
    assert len(rows) <= 1.01 * np.ceil(starts[-1] / 64) + 1
    tokens, starts = make_stream([4, 2, 1, 4], rng)  # 5 + 3 + 2 + 5 targets
    assert len(PackedRows(tokens, starts, 5)) == 3


def test_iterator_resumes_exactly_in_any_epoch():
    tokens, starts = make_stream([50] * 9, np.random.default_rng(1))
    rows = PackedRows(tokens, starts, 16)
    iterator = batches(rows, 5, seed=3)
    seen = []
    for _ in range(20):  # 3 epochs
        seen.append(next(iterator))
    iterator.close()
    resumed = batches(rows, 5, seed=3, start=11)
    for expected in seen[11:]:
        batch = next(resumed)
        assert all((batch[name] == expected[name]).all() for name in expected)
    resumed.close()


def test_epochs_differ_and_cover_all_rows():
    tokens, starts = make_stream([31] * 12, np.random.default_rng(2))
    rows = PackedRows(tokens, starts, 16)
    assert len(rows) == 24
    iterator = batches(rows, 6, seed=0)
    epochs = [np.concatenate([next(iterator)["inputs"] for _ in range(4)]) for _ in range(2)]
    iterator.close()
    everything = sorted(rows[i]["inputs"].tolist() for i in range(24))
    assert all(sorted(epoch.tolist()) == everything for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize(("parts", "blocks"), [(1, 2), (2, 2), (2, 1), (1, 4)])
def test_blocks_make_up_the_batch_of_one_reader(parts, blocks):
    tokens, starts = make_stream([31] * 12, np.random.default_rng(2))
    rows = PackedRows(tokens, starts, 16)
    alone = batches(rows, 8, seed=5, start=2)
    shares = [batches(rows, 8, seed=5, parts=parts, block=i, blocks=blocks, start=2) for i in range(blocks)]
    for _ in range(5):
        whole = next(alone)["inputs"].reshape(parts, -1, 16)
        pieces = [next(share)["inputs"].reshape(parts, -1, 16) for share in shares]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    for iterator in (alone, *shares):
        iterator.close()


def test_split_depends_on_the_path_alone():
    validation = ["asyncio/events.py", "codecs.py", "email/parser.py", "functools.py", "signal.py"]
    training = ["asyncio/tasks.py", "argparse.py", "email/utils.py", "os.py", "fractions.py"]
    assert [split_of(name) for name in validation + training] == ["validation"] * 5 + ["train"] * 5
    share = np.mean([split_of(f"folder/{i}.py") == "validation" for i in range(4000)])
    assert 0.04 < share < 0.06


def test_standard_library_is_chosen_by_rule(config):
    texts = standard_library()
    assert {"os.py", "asyncio/tasks.py", "email/utils.py"} <= texts.keys()
    skipped = ("test", "tests", "site-packages", "encodings", "idlelib", "tkinter")
    assert not [name for name in texts if any(part in skipped for part in name.split("/")[:-1])]
    record = load_corpus(config).record
    assert record["files"] == len(texts) and record["bytes"] == sum(len(t.encode()) for t in texts.values())
    assert record["train"]["documents"] + record["validation"]["documents"] == len(texts)
    assert 0.02 < record["validation"]["bytes"] / record["bytes"] < 0.1


def test_installed_packages_are_chosen_by_rule(tmp_path, monkeypatch):
    files = {"a/code.py": "one", "a/types.pyi": "two", "b/copy.py": "one", "b/read.md": "three", "b/x.so": "four"}
    files |= {"transformers/models/copy.py": "five", "transformers/own.py": "six", "c/nul.py": "\0"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    chosen = {"a/code.py": "one", "a/types.pyi": "two", "b/read.md": "three", "transformers/own.py": "six"}
    assert installed_packages() == chosen


def test_token_files_hold_the_documents(config):
    corpus = load_corpus(config)
    for split in ("train", "validation"):
        tokens = np.fromfile(corpus.folder / f"{split}.bin", corpus.record["dtype"])
        starts = np.load(corpus.folder / f"{split}_starts.npy")
        assert (tokens[starts] == ByteTokenizer().separator).all() and starts[-1] == len(tokens) - 1
        documents = [t for name, t in standard_library().items() if split_of(name) == split]
        for i in (0, 5, len(documents) - 1):
            assert corpus.tokenizer.decode(tokens[starts[i] + 1 : starts[i + 1]]) == documents[i]


def test_corpus_is_made_once_and_whole(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train.data, "_CACHE", tmp_path / "cache")
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        load_corpus(config)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(train.data, "_CACHE", tmp_path / "cache")
    first = load_corpus(config)
    made = (first.folder / "train.bin").stat().st_mtime_ns
    assert load_corpus(config).record == first.record
    assert (first.folder / "train.bin").stat().st_mtime_ns == made


def test_user_text(config, tmp_path):
    line = "naïve text, line {}\n"
    (tmp_path / "book.txt").write_text("".join(line.format(i) for i in range(150_000)))
    (tmp_path / "old.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "picture.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("no")
    texts = text_files(tmp_path)
    assert texts.pop("old.txt") == "café"
    assert "".join(texts.values()) == (tmp_path / "book.txt").read_text()
    assert all(name.startswith("book.txt#") and text.endswith("\n") for name, text in texts.items())
    corpus = load_corpus(dataclasses.replace(config, data=str(tmp_path)))
    assert corpus.record["files"] == len(texts) + 1
    alone = load_corpus(dataclasses.replace(config, data=str(tmp_path / "book.txt")))
    assert alone.record["sha256"] != corpus.record["sha256"]


@pytest.mark.parametrize("size", [0, 1_999_999])
def test_small_corpus_is_refused(config, tmp_path, size):
    (tmp_path / "text.txt").write_text("x" * size)
    with pytest.raises(ConfigError, match=r"2,000,000 are needed, pass --data"):
        load_corpus(dataclasses.replace(config, data=str(tmp_path)))


def test_corpus_without_validation_is_refused(config, tmp_path):
    names = [name for name in map("{}.txt".format, range(100)) if split_of(name) == "train"][:50]
    for name in names:
        (tmp_path / name).write_text("x" * 45_000)
    with pytest.raises(ConfigError, match="too few documents"):
        load_corpus(dataclasses.replace(config, data=str(tmp_path)))


def test_bpe(config):
    bpe_config = dataclasses.replace(config, tokenizer="bpe", model=dataclasses.replace(config.model, vocab_size=512))
    corpus = load_corpus(bpe_config)
    tokenizer = corpus.tokenizer
    assert tokenizer.vocab_size == 512 and corpus.record["dtype"] == "uint16"
    assert corpus.record["train"]["tokens"] < 0.6 * corpus.record["train"]["bytes"]
    for text in ("def f(x):\n    return x\n", "naïve ☃ 漢字 \t\0", ""):
        ids = tokenizer.encode([text])[0]
        assert tokenizer.separator not in ids and tokenizer.decode(ids) == text


def test_bpe_never_sees_the_validation_split(config, tmp_path):
    for i in range(200):
        word = "valword" if split_of(f"{i}.txt") == "validation" else "trainword"
        (tmp_path / f"{i}.txt").write_text(f"{word} " * 1200)
    bpe_config = dataclasses.replace(
        config, data=str(tmp_path), tokenizer="bpe", model=dataclasses.replace(config.model, vocab_size=300)
    )
    tokenizer = load_corpus(bpe_config).tokenizer
    assert len(tokenizer.encode([" trainword"])[0]) == 1
    assert len(tokenizer.encode([" valword"])[0]) > 1


def test_bpe_of_long_texts_learns_from_some(tmp_path, monkeypatch):
    texts = [f" {word}" * 60 for word in ("alpha", "gamma", "delta", "kappa") * 50]
    monkeypatch.setattr(train.tokenizer, "_MAX_TO_LEARN_FROM", sum(map(len, texts)) // 2)
    train_bpe(texts, 300, tmp_path / "tokenizer.json")
    encoded = FileTokenizer(tmp_path / "tokenizer.json").encode([" alpha", " gamma", " delta", " kappa"])
    assert [len(ids) == 1 for ids in encoded] == [True, False, True, False]


def test_bpe_separator_is_one_token(tmp_path):
    train_bpe(["some text, some text"], 300, tmp_path / "tokenizer.json")
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode([tokenizer.separator]) == "\ufffd" and tokenizer.decode([]) == ""
