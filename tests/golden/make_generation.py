"""Writes tests/golden/generation.json with `transformers` and PyTorch: what they generate from small random GPT-2s.

pip install torch transformers; python tests/golden/make_generation.py
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

sys.path[:0] = [str(Path(__file__).parent)]
import small_gpt2 as small  # noqa: E402


def model(seed: int, vocab: int):
    """GPT2LMHeadModel with the weights of a seed."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            small.tensors(seed, vocab),
            Path(folder) / "model.safetensors",
            metadata={"format": "pt"},
        )
        (Path(folder) / "config.json").write_text(json.dumps(small.config(vocab, None)))
        return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def padded(rows: list[list[int]], pad: int) -> dict:
    """Prompts as `transformers` takes them: filled up on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def cut(row: list[int], eos: int | None) -> list[int]:
    """Up to the first eos."""
    return row[: row.index(eos) + 1] if eos in row else row


@torch.no_grad()
def ask(net, rows: list[list[int]], eos: int | None, **options):
    """(new tokens of each text, cut after eos; scores of beams or None; all that transformers said)."""
    said = net.generate(
        **padded(rows, eos or 0),
        eos_token_id=eos,
        pad_token_id=eos or 0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    new = said.sequences[:, max(map(len, rows)) :].tolist()
    scores = getattr(said, "sequences_scores", None)
    return [cut(row, eos) for row in new], None if scores is None else scores.tolist(), said


def deterministic(seed: int) -> dict:
    """Greedy and beams, with a token that comes early as eos and with one that comes late or never."""
    net, rows = model(seed, small.VOCAB), small.prompts(seed, small.VOCAB, small.LENGTHS)
    free, _, _ = ask(net, rows, None, max_length=40, do_sample=False, no_repeat_ngram_size=2)
    counts = np.bincount([token for row in free for token in row], minlength=small.VOCAB)
    found = []
    for eos in (int(counts.argmax()), int(counts.argmin())):
        greedy = [
            ask(net, rows, eos, max_length=50, do_sample=False, **how)[0] for how in small.GREEDY
        ]
        beams = [
            ask(
                net,
                rows,
                eos,
                max_length=50,
                do_sample=False,
                num_return_sequences=how["num_beams"],
                **how,
            )[:2]
            for how in small.BEAMS
        ]
        found.append({"eos": eos, "greedy": greedy, "beams": beams})
    return {"seed": seed, "cases": found}


def drawn(how: dict) -> dict:
    """Three texts of a prompt, and of each step the probabilities of all tokens that could be drawn."""
    net, rows = model(7, small.SAMPLES_VOCAB), small.prompts(7, small.SAMPLES_VOCAB, [5])
    torch.manual_seed(0)
    texts, _, said = ask(
        net, rows, None, do_sample=True, num_return_sequences=3, max_length=15, **how
    )
    steps = []
    for score in said.scores:
        p = torch.softmax(score.double(), -1)
        steps.append(
            [
                {str(i): round(float(row[i]), 9) for i in torch.nonzero(row).ravel().tolist()}
                for row in p
            ]
        )
    return {"texts": texts, "steps": steps}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found = {
        "command": "python tests/golden/make_generation.py",
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "deterministic": [deterministic(seed) for seed in small.SEEDS],
        "drawn": [drawn(how) for how in small.SAMPLES],
    }
    path = Path(__file__).parent / "generation.json"
    path.write_text(json.dumps(found, separators=(",", ":")).replace("]],", "]],\n") + "\n")
