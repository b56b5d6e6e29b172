import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from parallax_jax.model import TransformerLM
from parallax_jax.sampling import Sampling
from train import generate
from train.run import load_checkpoint
from train.tokenizer import ByteTokenizer, FileTokenizer, train_bpe


def test_greedy_text_is_the_models_own_argmax_past_the_window(finished_run):
    run = load_checkpoint(str(finished_run))
    prompts, window = ("import", "def f(self"), 12
    pieces = generate.sample(run.model, run.params, run.tokenizer, window, prompts, 15, Sampling(temperature=0))
    config = dataclasses.replace(run.model.config, local_window_size=window, implementation="reference")

    @jax.jit
    def choices(tokens):
        return jnp.argmax(TransformerLM(config).apply({"params": run.params}, tokens[None])[0, :, :257], axis=-1)

    for prompt, text in zip(prompts, zip(*pieces, strict=True), strict=True):
        tokens = [256, *prompt.encode()]
        for _ in range(15):
            padded = np.zeros(30, np.int32)
            padded[: len(tokens)] = tokens
            tokens.append(int(choices(padded)[len(tokens) - 1]))
        expected = tokens[1 + len(prompt) :]
        end = expected.index(256) if 256 in expected else None
        assert "".join(text) == run.tokenizer.decode(expected[:end])


def test_command_prints_prompt_and_continuation(finished_run, capsys):
    arguments = [str(finished_run), "--prompt", "import ", "--max-tokens", "20", "--seed", "3"]
    generate.main(arguments)
    first = capsys.readouterr().out
    assert first.startswith("import ") and len(first) > len("import \n")
    generate.main(arguments)
    assert capsys.readouterr().out == first
    generate.main([*arguments[:-1], "4"])
    assert capsys.readouterr().out != first


def test_command_continues_several_prompts(finished_run, capsys):
    generate.main([str(finished_run), "--prompt", "import ", "def ", "--max-tokens", "9", "--temperature", "0"])
    both = capsys.readouterr().out
    for prompt in ("import ", "def "):
        generate.main([str(finished_run), "--prompt", prompt, "--max-tokens", "9", "--temperature", "0"])
        assert capsys.readouterr().out in both


def pieces_of(tokenizer, ids) -> list[str]:
    text = generate._Text(tokenizer)
    return [*map(text.add, ids), text.rest()]


def test_text_comes_in_whole_characters_and_stops_at_a_separator(tmp_path: Path):
    text = "naïve ☃ 漢字 𝄞!"
    tokenizer = ByteTokenizer()
    pieces = pieces_of(tokenizer, [*text.encode(), tokenizer.separator, *b"more"])
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and "𝄞" in pieces
    assert "".join(pieces_of(tokenizer, [*b"a\xff\xff", *b"b"])) == "a\ufffd\ufffdb"
    train_bpe([text * 5], 280, tmp_path / "tokenizer.json")
    bpe = FileTokenizer(tmp_path / "tokenizer.json")
    assert "".join(pieces_of(bpe, bpe.encode([text])[0].tolist())) == text
