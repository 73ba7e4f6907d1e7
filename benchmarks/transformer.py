"""The transformer beside its peers, float32:

train    50 updates of nanoGPT's configuration for CPUs (4 layers of 128, 65 characters, 12 x 64 tokens) beside plain
         PyTorch (benchmarks/nanogpt.py)
char     500 characters from that model, batch 1, ours with its cache beside nanoGPT's generate, which has none; the
         context is 512, so that neither side cuts it
gpt2     GPT-2 of 124 million random parameters, 16 tokens of prompt, 33 new ones: greedy and top-p for 1 and 8 prompts,
         beside `transformers` with its cache, and beside a floor: one jit of the same matrix products alone, unrolled

    make bench        (installs PyTorch and transformers; about 12 minutes for this file on 2 cores)

As benchmarks/vae.py: one process per side with two threads, tasks in turn, medians. Tokens per second are of the 32
tokens after the first, whose time (prompt included) is its own row; compile times are of a first call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
from benchmarks._alternate import PRODUCT_FLOP, PRODUCTS, SIDE, Worker, serve  # noqa: E402

UPDATES, BATCH, LENGTH = 50, 12, 64
VOCAB, LAYERS, HEADS, WIDTH = 65, 4, 4, 128
NEW, CHARACTERS = 32, 500
# Multiply-adds a token of a forward pass: matrices, attention over LENGTH positions, logits; backward is twice that.
MACS = LAYERS * (12 * WIDTH**2 + 2 * LENGTH * WIDTH) + VOCAB * WIDTH
TRAIN_FLOP = UPDATES * BATCH * LENGTH * 3 * 2 * MACS
GPT2 = {f"{how} {rows}": rows for rows in (1, 8) for how in ("greedy", "top-p")}


def text() -> np.ndarray:
    """A million characters; speed does not depend on what they say."""
    return np.random.default_rng(0).integers(0, VOCAB, 1_000_000).astype(np.int32)


def ours() -> dict:
    """As train compiles it; and XLA's own product."""
    import jax
    import jax.numpy as jnp

    from aigc_jax import transformer
    from aigc_jax.core import Optim
    from aigc_jax.data.text import from_tokens
    from aigc_jax.train import Run
    from aigc_jax.train.engine import Engine

    nano = transformer.Config(vocab=VOCAB, context=LENGTH, layers=LAYERS, heads=HEADS, width=WIDTH, bias=False,
                              optim=Optim(lr=1e-3, b2=0.99, weight_decay=0.1, clip=1.0))  # fmt: skip
    run = Run(steps=10**6, batch_size=BATCH, steps_per_call=UPDATES)
    engine = Engine(transformer.make, nano, run, from_tokens(text(), length=LENGTH, vocab=VOCAB))
    held = {"state": engine.init(), "step": 0}

    def train():
        held["state"], metrics = engine.advance(held["state"], held["step"], UPDATES)
        held["step"] += UPDATES
        jax.block_until_ready((held["state"], metrics))

    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)) / SIDE**0.5, jnp.float32)
    multiply = jax.jit(lambda a: jax.lax.fori_loop(0, PRODUCTS, lambda _, b: b @ a, a))
    return {
        "train": train,
        "product": lambda: multiply(a).block_until_ready(),
        "char": _our_characters(),
    }


def _our_characters():
    from functools import partial

    import jax

    from aigc_jax import transformer

    cfg = transformer.Config(
        vocab=VOCAB, context=512, layers=LAYERS, heads=HEADS, width=WIDTH, bias=False
    )
    params = jax.jit(partial(transformer.init, cfg))(jax.random.key(0))
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=CHARACTERS))
    prompt = np.zeros((1, 1), np.int32)
    return lambda: jax.block_until_ready(generate(params, prompt, jax.random.key(0)))


def torchs(fused: bool) -> dict:
    """The same in plain PyTorch."""
    import torch
    from nanogpt import GPT

    torch.set_num_threads(2)
    torch.manual_seed(0)
    data = torch.from_numpy(text()).long()
    model = GPT(VOCAB, LENGTH, LAYERS, HEADS, WIDTH)
    adam, longer = model.optimizer(fused), GPT(VOCAB, 512, LAYERS, HEADS, WIDTH)

    def train():
        for _ in range(UPDATES):
            at = torch.randint(len(data) - LENGTH, (BATCH,))
            x = torch.stack([data[i : i + LENGTH] for i in at])
            y = torch.stack([data[i + 1 : i + 1 + LENGTH] for i in at])
            loss = model(x, y)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        loss.item()

    a = torch.randn(SIDE, SIDE) / SIDE**0.5

    def product():
        b = a
        for _ in range(PRODUCTS):
            b = b @ a

    return {
        "train": train,
        "product": product,
        "char": lambda: longer.generate(torch.zeros(1, 1).long(), CHARACTERS),
    }


def our_gpt2() -> dict:
    """generate, for 1 + NEW tokens and, as `first`, for one."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from aigc_jax import transformer

    cfg = transformer.Config()
    params = jax.jit(partial(transformer.init, cfg))(jax.random.key(0))
    tasks = {}
    for name, rows in GPT2.items():
        prompt = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab, (rows, 16)), jnp.int32)
        sampling = (
            transformer.Sampling(0.0)
            if name.startswith("greedy")
            else transformer.Sampling(top_p=0.9)
        )
        for words, new in ((name, 1 + NEW), (f"first, {name}", 1)):
            call = jax.jit(partial(transformer.generate, cfg, max_new_tokens=new))
            tasks[words] = partial(lambda call, prompt, sampling: jax.block_until_ready(
                call(params, prompt, jax.random.key(0), sampling=sampling)), call, prompt, sampling)  # fmt: skip
    return tasks


def floor() -> dict:
    """The matrix products of NEW tokens and nothing else: every kernel read once, then the embedding."""
    import jax
    import jax.numpy as jnp

    from aigc_jax import transformer

    cfg = transformer.Config()
    params = jax.jit(lambda: transformer.init(cfg, jax.random.key(0)))()
    kernels = [
        params[f"blocks_{i}"][n]["kernel"]
        for i in range(cfg.layers)
        for n in ("qkv", "out", "up", "down")
    ]

    @jax.jit
    def products(kernels, table, x):
        def token(_, x):
            h = x
            for w in kernels:  # 768 -> 2304, 768 -> 768, 768 -> 3072, 3072 -> 768
                h = h[:, : w.shape[0]] @ w
            # What depends on all logits, so that none is left out.
            return h + 1e-9 * jnp.max(h @ table.T, axis=-1, keepdims=True)

        return jax.lax.fori_loop(0, NEW, token, x)

    def call(rows):
        return jax.block_until_ready(
            products(kernels, params["wte"]["embedding"], jnp.ones((rows, cfg.width)))
        )

    return {name: (lambda rows=rows: call(rows)) for name, rows in GPT2.items()}


def huggingface() -> dict:
    """GPT2LMHeadModel.generate with its cache."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    tasks = {}
    for name, rows in GPT2.items():
        prompt = torch.from_numpy(np.random.default_rng(0).integers(0, 50257, (rows, 16)))
        how = (
            {"do_sample": False}
            if name.startswith("greedy")
            else {"do_sample": True, "top_p": 0.9, "top_k": 0}
        )
        for words, new in ((name, 1 + NEW), (f"first, {name}", 1)):

            def call(prompt=prompt, new=new, how=how):
                with torch.inference_mode():
                    model.generate(prompt, max_new_tokens=new, min_new_tokens=new, pad_token_id=50256,
                                   attention_mask=torch.ones_like(prompt), **how)  # fmt: skip

            tasks[words] = call
    return tasks


WORKERS = {
    "ours": ours,
    "nanoGPT, eager": lambda: torchs(fused=False),
    "nanoGPT, eager, fused Adam": lambda: torchs(fused=True),
    "our GPT-2": our_gpt2,
    "floor": floor,
    "transformers": huggingface,
}


def measure(names: list[str], tasks: list[str], repeats: int) -> tuple[dict, dict]:
    """({(worker, task): median seconds}, {(worker, task): seconds of the first call})."""
    running = {name: Worker(__file__, name) for name in names}
    seconds, first = {}, {}
    for repeat in range(repeats + 1):
        for task in tasks:
            for name, worker in running.items():
                if name == "floor" and task.startswith("first"):
                    continue
                taken = worker.time(task)
                if repeat:
                    seconds.setdefault((name, task), []).append(taken)
                else:
                    first[name, task] = taken
    for worker in running.values():
        worker.close()
    return {key: statistics.median(values) for key, values in seconds.items()}, first


def main() -> None:
    """Times all groups in turn and prints a table each."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--groups", nargs="+", choices=("nano", "gpt2"), default=("nano", "gpt2"))
    p.add_argument("--worker", choices=tuple(WORKERS))
    args = p.parse_args()
    if args.worker:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        serve(WORKERS[args.worker]())
        return
    began = time.monotonic()
    if "nano" in args.groups:
        names = ["ours", "nanoGPT, eager", "nanoGPT, eager, fused Adam"]
        median, first = measure(names, ["product", "train", "char"], args.repeats)
        print(
            "| side | ms per update | GFLOP/s | share of own product | 500 characters, s | first call, s |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for name in names:
            train, char = median[name, "train"], median[name, "char"]
            speed, product = TRAIN_FLOP / train, PRODUCT_FLOP / median[name, "product"]
            print(f"| {name} | {1e3 * train / UPDATES:.2f} | {speed / 1e9:.0f} | {speed / product:.2f} | {char:.3f} | "
                  f"{first[name, 'train']:.1f} |")  # fmt: skip
        for peer in names[1:]:
            update, char, product = (
                median["ours", task] / median[peer, task] for task in ("train", "char", "product")
            )
            print(f"ours / {peer}: {update:.2f} of the time of an update, {1 / char:.1f}x the characters a second; "
                  f"matrix products: XLA at {1 / product:.2f}x PyTorch's speed")  # fmt: skip
    if "gpt2" in args.groups:
        names, tasks = (
            ["our GPT-2", "floor", "transformers"],
            [t for n in GPT2 for t in (n, f"first, {n}")],
        )
        median, first = measure(names, tasks, args.repeats)
        print("\n| GPT-2 124M | ours, tokens/s | transformers | ours / theirs | share of the floor | "
              "first token, ms: ours | theirs | compile, s |")  # fmt: skip
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, rows in GPT2.items():
            mine, theirs = (median[who, f"first, {name}"] for who in ("our GPT-2", "transformers"))
            rest, others = median["our GPT-2", name] - mine, median["transformers", name] - theirs
            print(f"| {name} | {rows * NEW / rest:.1f} | {rows * NEW / others:.1f} | {others / rest:.2f} | "
                  f"{median['floor', name] / rest:.2f} | {1e3 * mine:.0f} | {1e3 * theirs:.0f} | "
                  f"{first['our GPT-2', name]:.1f} |")  # fmt: skip
    print(f"\nmedian of {args.repeats}, {os.cpu_count()} cores; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
