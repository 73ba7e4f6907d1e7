"""`python -m aigc_jax sample | evaluate | export | info | replay | compare`: what to do with a run or its samples."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from . import data, ddpm, figures, metrics, train, transformer
from .data.text import Tokenizer
from .train import folder as folders
from .train.checkpoints import Checkpoints

Folder = tyro.conf.Positional[Path]


@dataclass(frozen=True)
class Continue:
    """How a language model writes."""

    prompt: str = "\n"
    new: int = 256  # tokens; fewer where the context ends
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # the k most likely; 0: all
    top_p: float = 1.0  # the smallest set of tokens of this probability
    min_p: float = 0.0  # those this share as likely as the most likely
    repetition: float = 1.0  # penalty of what occurred; 1: none
    stop: str = ""  # a text of one token that ends it


@dataclass(frozen=True)
class Denoise:
    """How a diffusion model goes from noise to samples."""

    sampler: Literal["ddpm", "ddim", "dpm_solver", "heun"] = "ddpm"
    steps: int = 0  # 0: all of the model's
    eta: float = 0.0  # of ddim: 0 is deterministic, 1 as noisy as ddpm
    w: float = 0.0  # guidance towards the label, as in the paper: 0 is none

    def options(self, cfg: ddpm.Config) -> dict:
        """What the family's `sample` takes; refuses what this model cannot do."""
        if not 0 <= self.steps <= cfg.T:
            raise train.Refused(f"--diffusion.steps must lie in 0..{cfg.T}, the model's, got {self.steps}")
        if self.eta and self.sampler != "ddim":
            raise train.Refused(f"--diffusion.eta is of the sampler ddim, not of {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise train.Refused(f"--diffusion.eta must lie in 0..1, got {self.eta}")
        if self.w and not (cfg.classes and cfg.unlabelled):
            raise train.Refused(
                "--diffusion.w guides a model that was trained with labels and without: this one was not"
            )
        return asdict(self)


def _continue(result: train.Result, how: Continue, n: int, seed: int) -> None:
    """n continuations of a prompt, one after another, each token printed when it is drawn."""
    if not result.info.tokenizer:
        raise train.Refused(f"{result.folder} was trained on tokens without a tokenizer: use transformer.generate")
    cfg, tokenizer = result.config, Tokenizer(result.info.tokenizer)
    params = result.state.params if result.state.ema is None else result.state.ema
    prompt = tokenizer.encode(how.prompt)
    stop = tokenizer.encode(how.stop)
    if n < 1 or how.new < 1:
        raise train.Refused(f"n and text.new must be at least 1, got {n} and {how.new}")
    if len(stop) > 1:
        raise train.Refused(f"text.stop must be one token, {how.stop!r} is {len(stop)}")
    if not 1 <= len(prompt) < cfg.context:
        raise train.Refused(f"the prompt has {len(prompt)} tokens; it must have 1 to {cfg.context - 1}")
    sampling = transformer.Sampling(how.temperature, how.top_k, how.top_p, how.min_p, how.repetition)
    new = min(how.new, cfg.context - len(prompt))
    keys = jax.random.split(jax.random.split(jax.random.key(seed), 4)[3], n)
    prefill = jax.jit(partial(transformer.prefill, cfg, slots=len(prompt) + new))
    decode = jax.jit(partial(transformer.decode, cfg), donate_argnums=2)

    @jax.jit
    def draw(logits, used, key, sampling):
        logits = transformer.penalise(logits, used, sampling.repetition)
        # A vocabulary that was rounded up has numbers which are no token.
        return transformer.draw(logits.at[:, tokenizer.size :].set(-jax.numpy.inf), key, sampling)

    for i in range(n):
        if n > 1:
            print(f"--- {i + 1} of {n}", flush=True)
        tokens = prompt.tolist()
        print(shown := tokenizer.decode(tokens), end="", flush=True)
        logits, cache = prefill(params, prompt[None])
        used = np.isin(np.arange(cfg.vocab), prompt)[None]
        for j in range(new):
            [token] = draw(logits, used, jax.random.fold_in(keys[i], j), sampling)
            tokens.append(int(token))
            used[0, tokens[-1]] = True
            text = tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):  # the bytes of a character are not all there yet
                print(text[len(shown) :], end="", flush=True)
                shown = text
            if tokens[-1] in stop:
                break
            if j + 1 < new:
                logits, cache = decode(params, jax.numpy.array(tokens[-1:]), cache)
        print()


def sample(
    run_folder: Folder,
    /,
    *,
    out: Path | None = None,
    n: int | None = None,
    seed: int = 0,
    chunk: int = 256,
    label: int | None = None,
    text: Continue = Continue(),
    diffusion: Denoise = Denoise(),
) -> None:
    """Draws n samples from a run: a picture of them, or text, which appears as it is drawn.

    Args:
        run_folder: what a training run wrote.
        out: the picture, a .png file; of text it is none.
        n: how many; by default 64, of text 1.
        seed: of the samples; not the run's.
        chunk: how many pictures at once; the samples depend on it.
        label: the class of all of them, for a conditional model; by default the classes in turn.
        text: of a language model.
        diffusion: of a diffusion model.
    """
    if not 0 <= seed < 2**32:
        raise train.Refused(f"seed must lie in 0..2**32 - 1, got {seed}")
    result = train.load(run_folder)
    if result.info.kind == "text":
        if out is not None or label is not None:
            raise train.Refused(f"{run_folder} writes text, to the terminal: it takes no --out and no --label")
        return _continue(result, text, 1 if n is None else n, seed)
    if diffusion != Denoise() and not isinstance(result.config, ddpm.Config):
        raise train.Refused(f"{run_folder} holds no diffusion model: --diffusion.* is for these")
    if text != Continue():
        raise train.Refused(f"{run_folder} makes {result.info.kind}: --text.* is for language models")
    n = 64 if n is None else n
    if out is None or out.suffix.lower() != ".png" or not out.parent.is_dir() or out.is_dir():
        raise train.Refused(f"--out must name a .png file in a folder that exists, got {out}")
    options = diffusion.options(result.config) if isinstance(result.config, ddpm.Config) else {}
    if label is not None:
        classes = getattr(result.config, "classes", 0)
        if not 0 <= label < classes:
            said = f"labels lie in 0..{classes - 1}, got {label}" if classes else "the model takes no labels"
            raise train.Refused(f"{run_folder}: {said}")
        options["label"] = np.full(n, label)
    elif getattr(result.config, "classes", 0):  # left to the model they would begin anew in every chunk
        options["label"] = np.arange(n) % result.config.classes
    samples = train.sample(result, jax.random.split(jax.random.key(seed), 4)[3], n=n, chunk=chunk, **options)
    new = out.with_name(f".{out.name}.new")
    try:
        if result.info.kind == "image":
            figures.save_images(new, samples)
        elif result.info.kind == "points" and samples.shape[1] == 2:
            fig, ((ax,),) = figures.figure(1, 1, size=(5, 5))
            figures.points(ax, samples, title=f"{n} samples")
            figures.save(fig, new, f"{run_folder}, step {int(result.state.step)}", kind="png")
        else:
            raise train.Refused(
                f"{run_folder} makes {result.info.kind} of shape {samples.shape[1:]}: no picture for these"
            )
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    best = folders.read(run_folder)["run"].get("best")
    chosen = f" (lowest {best} of those kept)" if best else ""
    print(f"wrote {n} samples of step {int(result.state.step)}{chosen} to {out}")


def info(run_folder: Folder, /) -> None:
    """Says what a run folder holds: model, data, progress, checkpoints.

    Args:
        run_folder: what a training run wrote.
    """
    record = folders.read(run_folder)
    saves = Checkpoints(run_folder, 1)
    lines = train.metrics(run_folder)
    last = {kind: next((r for r in reversed(lines) if kind in r), None) for kind in ("train", "valid")}
    source = record["data"]["source"] or "arrays"
    print(f"model    {'.'.join(record['make'])}")
    print(f"config   {json.dumps(record['config'])}")
    print(f"data     {json.dumps(source)}, {record['data']['examples'] or 'endless'} examples")
    print(f"run      seed {record['run']['seed']}, batch {record['run']['batch_size']}, {record['run']['steps']} steps")
    print(f"made on  {', '.join(f'{k} {v}' for k, v in record['environment'].items() if v)}")
    for kind, line in last.items():
        if line:
            values = "  ".join(f"{name} {value:.5g}" for name, value in line[kind].items() if value is not None)
            print(f"{kind:8} step {line['step']}: {values}")
    for step in saves.steps():
        print(f"saved    step {step}{'' if saves.intact(step) else '  DAMAGED: it will be passed over'}")
    saves.close()


DataFolder = Annotated[str | None, tyro.conf.arg(name="data.folder")]


def _source(run_folder: Path, which: str, folder: str | None, split: str | None = None) -> data.Data:
    """The set that a run recorded, loaded again; with `split` another part of it."""
    record = folders.read(run_folder)[which]
    source = record["source"]
    if source is None:
        raise train.Refused(
            f"{run_folder} was made with arrays, which no name brings back: give them to train.replay or train.evaluate"
        )
    options = {name: value for name, value in source.items() if name not in ("name", "split")}
    if options.get("tokenizer", "char") != "char":  # the run keeps it, wherever its file went since
        options["tokenizer"] = str(run_folder / "tokenizer.json")
    found = data.load(source["name"], split or source["split"], folder=folder, **options)
    if split in (None, source["split"]) and found.info.fingerprint != record["fingerprint"]:
        raise train.Refused(
            f"{source['name']} {source['split']} is not what {run_folder} was made with: its fingerprint is "
            f"{found.info.fingerprint[:8]}, not {record['fingerprint'][:8]}"
        )
    return found


def evaluate(
    run_folder: Folder,
    /,
    *,
    split: str | None = None,
    batch_size: int = 500,
    seed: int = 0,
    data_folder: DataFolder = None,
) -> None:
    """Scores a run on its validation set, or on another part of its data, and prints the means over all examples.

    Args:
        run_folder: what a training run wrote.
        split: a part of the training set's source, such as test or "train[90%:]"; by default the validation set.
        batch_size: examples at once.
        seed: of the noise.
        data_folder: where the set's original files lie, if it needs any.
    """
    record = folders.read(run_folder)
    if split is None and record["valid"] is None:
        raise train.Refused(f"{run_folder} was trained without a validation set: name a part of its data with --split")
    scored = _source(run_folder, "valid" if split is None else "data", data_folder, split)
    result = train.load(run_folder)
    values = train.evaluate(result, scored, batch_size=batch_size, seed=seed)
    name, part = (scored.info.source[key] for key in ("name", "split"))
    print(f"step {int(result.state.step)} of {run_folder} on {name} {part}, {scored.info.examples} examples")
    for quantity, value in values.items():
        print(f"  {quantity:24} {value:.6g}")


def export(run_folder: Folder, out: Folder, /) -> None:
    """Writes the weights that sampling uses (the average where there is one) as a .safetensors file.

    Names are paths in the State's `ema`, or in its `params` (and `extra`, under that name) where there is no average,
    joined by dots; the metadata hold the model's make, config and step as text.

    Args:
        run_folder: what a training run wrote.
        out: the file.
    """
    from safetensors.numpy import save_file

    if out.suffix != ".safetensors" or not out.parent.is_dir() or out.is_dir():
        raise train.Refused(f"{out} must be a .safetensors file in a folder that exists")
    result, record = train.load(run_folder), folders.read(run_folder)
    averaged = result.state.ema is not None
    tree = result.state.ema if averaged else result.state.params
    trees = {"": tree} if averaged or result.state.extra is None else {"": tree, "extra.": result.state.extra}
    tensors = {
        prefix + jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, order="C")
        for prefix, part in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(part))
    }
    about = {"make": ".".join(record["make"]), "config": json.dumps(record["config"]), "step": str(result.state.step)}
    new = out.with_name(f".{out.name}.new")
    try:
        save_file(tensors, new, metadata={**about, "averaged": str(averaged)})
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    numbers = sum(x.size for x in tensors.values())
    print(f"wrote {len(tensors)} arrays, {numbers} numbers, of step {int(result.state.step)} to {out}")


def replay(run_folder: Folder, /, *, step: int, data_folder: DataFolder = None) -> None:
    """Repeats one update of a run, bit for bit, and prints its metrics and norms.

    Args:
        run_folder: what a training run wrote.
        step: the number of the update, as messages and metrics.jsonl give it.
        data_folder: where the set's original files lie, if it needs any.
    """
    values, facts = train.replay(run_folder, _source(run_folder, "data", data_folder), step=step)
    print(f"update {step} of {run_folder}")
    for name, value in values.items():
        print(f"  {name:24} {value!r}{'' if np.isfinite(value) else '   <- not finite'}")
    for module, before in facts["norm_before"].items():
        print(f"  |{module}|".ljust(26), f"{before!r} -> {facts['norm_after'][module]!r}")
    if "rows" in facts:
        print(f"  rows of the set: {' '.join(map(str, facts['rows']))}")


FEWEST = 50  # pictures a side; with fewer no value of `compare` says anything


def _pictures(folder: Path) -> data.Data:
    """Every picture of a folder, whatever splits it is sorted into."""
    splits = [part for part in ("train", "validation", "test") if (folder / part).is_dir()]
    return data.load(f"images:{folder}", "+".join(splits) or "train")


def compare(
    reference: Folder,
    other: Folder,
    /,
    *,
    features: Literal["pixels", "mnist", "fashion_mnist", "digits"] = "pixels",
    n: int | None = None,
    seed: int = 0,
) -> None:
    """Says how far a folder of pictures is from a reference, beside how far the reference is from itself.

    The floor is what two halves of the reference score against each other, so both columns take n pictures a side.
    Compare the values (of aigc_jax.metrics) only with others of the same features and the same n.

    Args:
        reference: the real pictures.
        other: those to judge.
        features: the pixels in [0, 1], or the 64 features of that set's classifier (28x28 or 8x8, grey).
        n: pictures a side; by default half of the reference, or all of the other where those are fewer.
        seed: which pictures, and the random directions.
    """
    if not 0 <= seed < 2**32:
        raise train.Refused(f"seed must lie in 0..2**32 - 1, got {seed}")
    real, fake = _pictures(reference), _pictures(other)
    shape = real.info.shape
    if fake.info.shape != shape:
        one, two = (" x ".join(map(str, found.info.shape)) for found in (real, fake))
        raise train.Refused(f"pictures of one size are compared: {reference} has {one}, {other} {two}")
    if real.info.fingerprint == fake.info.fingerprint:
        raise train.Refused(f"{reference} and {other} hold the same pictures")
    most = min(real.info.examples // 2, fake.info.examples)
    there = f"{reference} holds {real.info.examples} pictures, {other} {fake.info.examples}"
    if most < FEWEST:
        raise train.Refused(f"{there}: at least {2 * FEWEST} and {FEWEST} are needed")
    n = most if n is None else n
    if not FEWEST <= n <= most:
        raise train.Refused(f"{there}: n must lie in {FEWEST}..{most}, got {n}")
    classifier = None if features == "pixels" else metrics.load_classifier(features)
    if classifier and shape != classifier.shape:
        wanted, got = (" x ".join(map(str, s)) for s in (classifier.shape, shape))
        raise train.Refused(f"the classifier of {features} takes pictures of {wanted}, these are {got}")

    def take(found: data.Data, seed: int, size: int) -> np.ndarray:
        images = found.batch(seed, 0, size)["image"] / np.float32(255)
        return classifier.apply(images)[1] if classifier else images.reshape(size, -1)

    first, second = np.split(take(real, seed, 2 * n), 2)
    columns = [_scores(first, x, seed) for x in (take(fake, seed + 1, n), second)]
    _show_scores(columns, f"{other} against {reference}", features)
    width = first.shape[1]
    used = f"classifier {features}, sha256 {classifier.sha256[:12]}" if classifier else "pixels in [0, 1]"
    print(f"{n} pictures a side, {width} features: {used}")
    if n < 10 * width:
        print(f"fewer than {10 * width} pictures: the Frechet distance is mostly its floor")


def _scores(real: np.ndarray, fake: np.ndarray, seed: int) -> dict[str, tuple[float, ...]]:
    """{quantity: (value,) or (value, standard error)}."""
    k_kernel, k_sliced = jax.random.split(jax.random.key(seed))
    precision, recall = metrics.precision_recall(real, fake)
    density, coverage = metrics.density_coverage(real, fake)
    return {
        "Frechet distance": (metrics.frechet_distance(real, fake),),
        "kernel distance": metrics.kernel_distance(real, fake, k_kernel),
        "precision (k = 3)": (precision,),
        "recall (k = 3)": (recall,),
        "density (k = 5)": (density,),
        "coverage (k = 5)": (coverage,),
        "sliced Wasserstein distance": (metrics.sliced_wasserstein(real, fake, k_sliced),),
    }


def _show_scores(columns: list[dict], title: str, features: str) -> None:
    table = Table(title=title, title_justify="left")
    for head in ("quantity", "value", "floor: the reference against itself"):
        table.add_column(head)
    for name in columns[0]:
        shown = (
            f"fid_{features.removesuffix('_mnist')}" if name.startswith("Frechet") and features != "pixels" else name
        )
        table.add_row(shown, *(" +- ".join(f"{x:.4g}" for x in column[name]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    """The command line: one line and exit code 2 for a user's mistake."""
    try:
        commands = [sample, evaluate, export, info, replay, compare]
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in commands}, prog="python -m aigc_jax", description=__doc__
        )
    except (train.Refused, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e


if __name__ == "__main__":
    main()
