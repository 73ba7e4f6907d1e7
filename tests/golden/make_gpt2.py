"""Writes tests/golden/gpt2 with `transformers` and PyTorch: a small random GPT-2, its logits and its greedy text.

pip install torch transformers; python tests/golden/make_gpt2.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / "gpt2"

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=61, n_positions=24, n_embd=8, n_layer=2, n_head=2, bos_token_id=60, eos_token_id=60
)
model = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for parameter in model.parameters():  # away from the initial zeros and ones
        parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(0, 61, (3, 20))
    logits = model(tokens).logits
    greedy = model.generate(
        tokens[:, :4],
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=60,
        eos_token_id=None,
    )
model.save_pretrained(FOLDER)
(FOLDER / "generation_config.json").unlink()
np.savez(FOLDER / "golden.npz", tokens=tokens.int(), logits=logits, greedy=greedy[:, 4:].int())
