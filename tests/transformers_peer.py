"""Run by transformers_test.py under a Python with torch and transformers: makes Qwen3 folders, or reads one.

python transformers_peer.py make FOLDER '{"hidden_size": 64, ...}'    folder of a random model with its logits
python transformers_peer.py read FOLDER                               logits of a folder
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM


def save_logits(model, folder: Path):
    """Writes ids and float32 logits to expected.npz."""
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, model.config.vocab_size, (2, 41)))
    with torch.no_grad():
        logits = model.float().eval()(ids).logits
    np.savez(folder / "expected.npz", ids=ids.numpy(), logits=logits.numpy())


def main(command: str, folder: Path, fields: str = "{}"):
    """Runs one of the two commands."""
    if command == "make":
        torch.manual_seed(3)
        model = Qwen3ForCausalLM(Qwen3Config(**json.loads(fields)))
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, max_shard_size="100KB")
    else:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        faults = {name: values for name, values in report.items() if values}
        assert not faults, f"{folder}: {faults}"
    save_logits(model, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
