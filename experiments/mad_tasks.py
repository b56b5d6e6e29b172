"""The six tasks of the MAD suite (mechanistic architecture design), made from their published definitions.

A task makes inputs and targets, int32 (examples, length); IGNORE marks positions that do not count. Recall is trained
as a language model, on every next token, and tested where an answer is determined: on the value of a key that was shown
before. The vocabularies hold keys first, then values, then noise, then special tokens.
"""

import dataclasses

import numpy as np

IGNORE = -100
_MAP_SEED = 12345  # the mapping to memorise is the same in every data set
_MOTIF = 3  # longest key or value of fuzzy recall, in tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """A task at one difficulty; the defaults are its published baseline.

    Attributes:
      name: of `BASELINES`.
      vocab_size: tokens, special ones included.
      seq_len: tokens of an example, the last target included where targets are inputs shifted by one.
      train_examples: size of the training set.
      test_examples: size of the test set.
    """

    name: str
    vocab_size: int
    seq_len: int
    train_examples: int = 12_800
    test_examples: int = 1_280

    @property
    def label(self) -> str:
        """The name, with vocabulary and length where they are not the baseline's."""
        sizes = (self.vocab_size, self.seq_len)
        plain = BASELINES[self.name]
        return self.name if sizes == (plain.vocab_size, plain.seq_len) else f"{self.name}:{sizes[0]}-{sizes[1]}"


BASELINES = {
    task.name: task
    for task in (
        Task("compression", 16, 32),
        Task("in_context_recall", 16, 128),
        Task("fuzzy_recall", 16, 128),
        Task("noisy_recall", 32, 128),
        Task("memorization", 256, 32, train_examples=256),
        Task("selective_copying", 16, 256),
    )
}


def parse_task(text: str) -> Task:
    """A task by name, or by "name:vocab-length" for another difficulty.

    Raises:
      ValueError: there is no such task.
    """
    name, _, size = text.partition(":")
    if name not in BASELINES:
        raise ValueError(f"task {name!r}: it must be one of {', '.join(BASELINES)}")
    if not size:
        return BASELINES[name]
    vocab_size, seq_len = (int(number) for number in size.split("-"))
    return dataclasses.replace(BASELINES[name], vocab_size=vocab_size, seq_len=seq_len)


def generate(task: Task, seed: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """The training or the test set that belongs to a seed: inputs and targets."""
    rng = np.random.default_rng([seed, int(training)])
    examples = task.train_examples if training else task.test_examples
    make = _MAKERS[task.name]
    inputs, targets = make(rng, examples, task.vocab_size, task.seq_len, training)
    return inputs.astype(np.int32), targets.astype(np.int32)


def _shifted(tokens: np.ndarray, answers: np.ndarray, training: bool):
    """Inputs and targets of next-token prediction: of every token in training, of the answers in the test."""
    return tokens[:, :-1], (tokens if training else answers)[:, 1:]


def _recall(rng, examples, vocab_size, seq_len, training, noise_vocab=0, noise=0.0):
    """Pairs of key and value; a key keeps its value within an example. The last pair repeats a key shown before."""
    plain, pairs = vocab_size - noise_vocab, seq_len // 2
    values = rng.integers(plain // 2, plain, (examples, plain // 2))
    keys = rng.integers(plain // 2, size=(examples, pairs))
    is_noise = rng.random((examples, pairs)) < noise
    is_noise[np.arange(examples), rng.integers(pairs - 1, size=examples)] = False  # at least one pair
    is_noise[:, -1] = False
    # The repeated key is drawn from the distinct keys shown.
    shown = np.zeros((examples, plain // 2), bool)
    rows = np.broadcast_to(np.arange(examples)[:, None], keys.shape)
    shown[rows[:, :-1][~is_noise[:, :-1]], keys[:, :-1][~is_noise[:, :-1]]] = True
    keys[:, -1] = np.argmax(rng.random(shown.shape) * shown, axis=1)

    tokens = np.stack([keys, np.take_along_axis(values, keys, 1)], -1)
    noise_tokens = rng.integers(plain, plain + max(1, noise_vocab), tokens.shape)
    tokens = np.where(is_noise[..., None], noise_tokens, tokens)
    # A pair is a repetition where an earlier pair, not noise, has its key.
    first = np.full((examples, plain // 2), pairs)
    np.minimum.at(first, (rows, keys), np.where(is_noise, pairs, np.arange(pairs)))
    repeated = (np.arange(pairs) > first[rows, keys]) & ~is_noise
    answers = np.full_like(tokens, IGNORE)
    answers[..., 1] = np.where(repeated, tokens[..., 1], IGNORE)
    return _shifted(tokens.reshape(examples, -1), answers.reshape(examples, -1), training)


def _noisy_recall(rng, examples, vocab_size, seq_len, training):
    """Recall in which one pair in five is two tokens of a noise vocabulary of 16."""
    return _recall(rng, examples, vocab_size, seq_len, training, noise_vocab=16, noise=0.2)


def _fuzzy_recall(rng, examples, vocab_size, seq_len, training):
    """Recall with keys and values of one to three tokens and nothing that parts them; tested with keys of three.

    Tokens within a key or a value differ. The pair that ends an example is shown once before, at a random place.
    """
    if vocab_size > 32:
        raise ValueError(f"vocab_size: fuzzy recall takes at most 32, got {vocab_size}: it tabulates all keys")
    pad, plain = vocab_size - 1, vocab_size - 1
    num_keys = plain // 2
    at_row = np.arange(examples)

    def motifs(first, count, lengths):
        """(examples, 3) distinct tokens of [first, first + count), -1 from each length on."""
        drawn = first + np.argsort(rng.random((examples, count)), axis=1)[:, :_MOTIF]
        return np.where(np.arange(_MOTIF) < lengths[:, None], drawn, -1)

    def lengths():
        return rng.integers(1, _MOTIF + 1, examples)

    def draw_key():
        return motifs(0, num_keys, lengths() if training else np.full(examples, _MOTIF))

    def code(key):
        return (key + 1) @ (num_keys + 1) ** np.arange(_MOTIF)

    last_key, last_value = draw_key(), motifs(num_keys, plain - num_keys, lengths())
    last_size = (last_key >= 0).sum(1) + (last_value >= 0).sum(1)
    limit = seq_len - last_size - 2 * _MOTIF
    # A pair has at most six tokens, so that one begins between this place and the limit.
    place = np.minimum(rng.integers(seq_len - 2 * last_size), limit - 2 * _MOTIF)
    known = np.full((examples, (num_keys + 1) ** _MOTIF, _MOTIF), -2, np.int32)  # value of each key; -2: not shown yet
    known[at_row, code(last_key)] = last_value
    shown = np.zeros(known.shape[:2], bool)
    tokens = np.full((examples, seq_len + 4 * _MOTIF), -1)
    answers = np.full_like(tokens, IGNORE)
    size = np.zeros(examples, int)

    def append(key, value, where, is_answer):
        for motif, answer in ((key, False), (value, True)):
            for i in range(_MOTIF):
                put = where & (motif[:, i] >= 0)
                tokens[at_row[put], size[put]] = motif[put, i]
                if answer:
                    wanted = put & is_answer
                    answers[at_row[wanted], size[wanted]] = motif[wanted, i]
                size[put] += 1

    while (size < limit).any():
        open_ = size < limit
        insert = open_ & (size >= place) & ~shown[at_row, code(last_key)]
        key, fresh = draw_key(), motifs(num_keys, plain - num_keys, lengths())
        key = np.where(insert[:, None], last_key, key)
        which = code(key)
        value = known[at_row, which]
        value = np.where(value[:, :1] == -2, fresh, value)
        repeated = shown[at_row, which]
        append(key, value, open_, repeated)
        known[at_row[open_], which[open_]] = value[open_]
        shown[at_row[open_], which[open_]] = True
    append(last_key, last_value, np.ones(examples, bool), np.ones(examples, bool))

    # Padding goes to the left: the last token is at seq_len.
    index = np.arange(seq_len + 1) - (seq_len + 1 - size)[:, None]
    tokens, answers = (np.take_along_axis(x, np.maximum(index, 0), 1) for x in (tokens, answers))
    return _shifted(np.where(index < 0, pad, tokens), np.where(index < 0, IGNORE, answers), training)


def _selective_copying(rng, examples, vocab_size, seq_len, training):
    """Sixteen tokens among blanks, then a mark and sixteen blanks, at which they are to be repeated in order."""
    count = 16
    blank, mark = vocab_size - 2, vocab_size - 1
    if seq_len <= 2 * count + 1:
        raise ValueError(f"seq_len: selective copying needs more than {2 * count + 1}, got {seq_len}")
    copied = rng.integers(vocab_size - 2, size=(examples, count))
    blanks = seq_len - 2 * count - 1
    # Each blank goes before one of the tokens; a token stands after all blanks that go before it or an earlier one.
    before = np.zeros((examples, count), int)
    np.add.at(before, (np.arange(examples)[:, None], rng.integers(count, size=(examples, blanks))), 1)
    place = np.arange(count) + np.cumsum(before, axis=1)
    inputs = np.full((examples, seq_len), blank)
    np.put_along_axis(inputs, place, copied, 1)
    inputs[:, count + blanks] = mark
    targets = np.full_like(inputs, IGNORE)
    targets[:, -count:] = copied
    return inputs, targets


def _memorization(rng, examples, vocab_size, seq_len, training):
    """Keys, each followed by a slot in which the value is to be named that is its own in every example."""
    slot, num_keys = vocab_size - 1, (vocab_size - 1) // 2
    values = num_keys + np.random.default_rng(_MAP_SEED).permutation(vocab_size - 1 - num_keys)[:num_keys]
    keys = rng.integers(num_keys, size=(examples, seq_len // 2))
    inputs = np.stack([keys, np.full_like(keys, slot)], -1).reshape(examples, -1)
    targets = np.stack([np.full_like(keys, IGNORE), values[keys]], -1).reshape(examples, -1)
    return inputs, targets


def _compression(rng, examples, vocab_size, seq_len, training):
    """Random tokens and a last one, from whose representation alone all are to be recovered."""
    inputs = rng.integers(vocab_size - 1, size=(examples, seq_len))
    inputs[:, -1] = vocab_size - 1
    return inputs, inputs


_MAKERS = {
    "compression": _compression,
    "in_context_recall": _recall,
    "fuzzy_recall": _fuzzy_recall,
    "noisy_recall": _noisy_recall,
    "memorization": _memorization,
    "selective_copying": _selective_copying,
}
