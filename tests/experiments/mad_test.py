"""The tasks against their definitions, one token at a time, and a training run of toy size."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from experiments import mad
from experiments.mad_report import write_report
from experiments.mad_tasks import BASELINES, IGNORE, generate, parse_task


def make(text, training, examples=40, seed=3):
    task = dataclasses.replace(parse_task(text), train_examples=examples, test_examples=examples)
    return generate(task, seed, training)


@pytest.mark.parametrize("text", ["in_context_recall", "noisy_recall", "noisy_recall:64-50", "in_context_recall:32-20"])
def test_recall(text):
    task, noise = parse_task(text), 16 if "noisy" in text else 0
    plain = task.vocab_size - noise
    inputs, targets = make(text, training=False)
    assert inputs.shape == targets.shape == (40, task.seq_len - 1)
    noisy = 0
    for row, wanted in zip(inputs, targets, strict=True):
        known = {}
        # The value of the last pair is not an input: it is the last target.
        for at in range(0, len(row) + 1, 2):
            key, value = row[at], row[at + 1] if at + 1 < len(row) else wanted[at]
            assert at == 0 or wanted[at - 1] == IGNORE
            if key >= plain:
                assert value >= plain and wanted[at] == IGNORE
                noisy += 1
                continue
            assert key < plain // 2 <= value < plain
            assert wanted[at] == known.get(key, IGNORE)
            assert known.setdefault(key, value) == value
    share = noisy / inputs[:, ::2].size
    assert (0.15 < share < 0.25) if noise else share == 0
    inputs, targets = make(text, training=True)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("training", [True, False])
def test_fuzzy_recall(training):
    inputs, targets = make("fuzzy_recall", training, examples=300)
    assert inputs.shape == targets.shape == (300, 128)
    sizes = set()
    for row, wanted in zip(inputs, targets, strict=True):
        begin = list(row != 15).index(True)  # after the padding
        tokens, answers = [*row, wanted[-1]][begin:], None if training else [IGNORE, *wanted][begin:]
        known, at, last = {}, 0, None
        while at < len(tokens):  # keys are tokens below 7, values 7 to 14: a pair ends where a value turns into a key
            start = at
            while at < len(tokens) and tokens[at] < 7:
                at += 1
            key = tuple(tokens[start:at])
            begin = at
            while at < len(tokens) and 7 <= tokens[at] < 15:
                at += 1
            value = tuple(tokens[begin:at])
            assert 1 <= len(key) <= 3 and 1 <= len(value) <= 3
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            assert training or len(key) == 3
            sizes.add((len(key), len(value)))
            if answers:
                expected = list(value) if key in known else [IGNORE] * len(value)
                assert answers[start:at] == [IGNORE] * len(key) + expected
            last = key in known
            assert known.setdefault(key, value) == value
        assert last  # the pair that ends an example was shown before
    assert len(sizes) == (9 if training else 3)


def test_selective_copying():
    inputs, targets = make("selective_copying", training=True)
    assert inputs.shape == (40, 256)
    for row, wanted in zip(inputs, targets, strict=True):
        np.testing.assert_array_equal(row[:239][row[:239] != 14], wanted[-16:])
        assert row[239] == 15 and (row[240:] == 14).all() and (wanted[:-16] == IGNORE).all() and row[238] != 14


def test_memorization_and_compression():
    (inputs, targets), (more, answers) = make("memorization", True), make("memorization", False)
    pairs = {}
    for x, y in ((inputs, targets), (more, answers)):  # one mapping for both sets
        assert (x[:, 1::2] == 255).all() and (y[:, ::2] == IGNORE).all()
        for key, value in zip(x[:, ::2].ravel(), y[:, 1::2].ravel(), strict=True):
            assert pairs.setdefault(key, value) == value and key < 127 <= value < 255
    assert len(set(pairs.values())) == len(pairs)
    inputs, targets = make("compression", True)
    np.testing.assert_array_equal(inputs, targets)
    assert (inputs[:, -1] == 15).all() and inputs[:, :-1].max() == 14


def test_data_differ_by_seed_and_set_only():
    for name in BASELINES:
        first, again, other, test = (make(name, t, 8, s)[0] for t, s in ((True, 1), (True, 1), (True, 2), (False, 1)))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any() and (first != test).any()


def test_training_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(mad, "WIDTH", 16)
    monkeypatch.setattr(mad, "MLP_WIDTH", 16)
    log = tmp_path / "mad.jsonl"
    options = dict(tasks=["compression"], mixers=["parallax"], epochs=3, sweep_epochs=1)
    options |= dict(seeds=3, heads=1, dtype="float32", implementation="xla", minutes=9.0, compile_threads=2)
    args = argparse.Namespace(log=log, train_examples=128, commit=None, **options)
    mad.train_all(args)
    rows = mad.read_log(log)
    assert len(rows) == 3 + 3 and all(0 <= mad.score(row) <= 1 for row in rows)
    final = [row for row in rows if row["stage"] == "final"]
    assert all(row["train_loss"][-1] < row["train_loss"][0] and len(row["train_loss"]) == 3 for row in final)
    mad.train_all(args)
    assert mad.read_log(log) == rows  # nothing is trained twice
    write_report(log)
    assert "| compression |" in log.with_suffix(".md").read_text() and log.with_suffix(".png").exists()
    assert all(json.dumps(row) for row in rows)
