import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import generate
from train.generate import Sampling, stream_text
from train.run import load_checkpoint
from train.tokenizer import BPETokenizer, ByteTokenizer, train_bpe

LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.25, 0.2]))


def support(sampling: Sampling, draws: int = 400) -> set[int]:
    """Tokens that come up in many draws."""
    keys = jax.random.split(jax.random.key(0), draws)
    return set(np.asarray(jax.vmap(lambda key: sampling.draw(key, LOGITS))(keys)).tolist())


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0), {1}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_p=0.01), {1}),
        (Sampling(temperature=1.0, top_k=3), {1, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.6), {1, 3}),
        (Sampling(temperature=1.0, top_p=0.66), {1, 3, 4}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), {1, 3}),  # 0.4 and 0.25 of the 0.85 that is left
        (Sampling(temperature=1.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=0.01), {1}),
    ],
)
def test_what_can_be_drawn(sampling, expected):
    assert support(sampling) == expected


def test_draws_follow_the_tempered_distribution():
    keys = jax.random.split(jax.random.key(1), 20_000)
    drawn = np.asarray(jax.vmap(lambda key: Sampling(temperature=0.5).draw(key, LOGITS))(keys))
    probability = np.asarray(jax.nn.softmax(2 * LOGITS))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20_000, probability, atol=0.015)


@pytest.mark.parametrize("field", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Sampling(**field)


def test_greedy_text_is_the_models_own_argmax_past_the_window(finished_run):
    run = load_checkpoint(str(finished_run))
    tokens, window = [256, *b"import"], 12
    stream = generate.generate(run.model, run.params, tokens, window, 257, Sampling(temperature=0))
    for token in itertools.islice(stream, 15):
        logits = run.model.apply({"params": run.params}, jnp.array([tokens[-window:]]))
        assert token == int(jnp.argmax(logits[0, -1]))
        tokens.append(token)


def test_command_prints_prompt_and_continuation(finished_run, capsys):
    arguments = [str(finished_run), "--prompt", "import ", "--max-tokens", "20", "--seed", "3"]
    generate.main(arguments)
    first = capsys.readouterr().out
    assert first.startswith("import ") and len(first) > len("import \n")
    generate.main(arguments)
    assert capsys.readouterr().out == first
    generate.main([*arguments[:-1], "4"])
    assert capsys.readouterr().out != first


def test_stream_shows_whole_characters_and_stops_at_a_separator(tmp_path: Path):
    text = "naïve ☃ 漢字 𝄞!"
    tokenizer = ByteTokenizer()
    ids = [*text.encode(), tokenizer.separator, *b"more"]
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and "𝄞" in pieces
    broken = list(stream_text(tokenizer, iter([*b"a\xff\xff", *b"b"])))
    assert "".join(broken) == "a\ufffd\ufffdb"
    train_bpe([text * 5], 280, tmp_path / "tokenizer.json")
    bpe = BPETokenizer(tmp_path / "tokenizer.json")
    assert "".join(stream_text(bpe, iter(bpe.encode([text])[0].tolist()))) == text
