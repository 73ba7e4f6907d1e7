"""`python -m aigc_jax sample | evaluate | export | info | replay | compare`: what to do with a run or its samples."""

import os  # imported by Python itself already
import sys

# Python looks in the current directory first. That may be a run folder, and no file of a run folder is ever imported.
if HERE := __name__ == "__main__":
    here = os.path.realpath(".")
    others = [p for p in sys.path if os.path.realpath(p or ".") != here]
    HERE = others != sys.path
    if here != os.path.dirname(os.path.dirname(os.path.realpath(__file__))):  # the checkout may stay
        sys.path[:] = others

from . import interrupt

if __name__ == "__main__":
    interrupt.on_command_line(main=True)  # before JAX, whose import takes seconds

import contextlib
import json
import math
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import data, ddpm, figures, metrics, train, transformer
from .data import music
from .data.text import Tokenizer
from .train import folder as folders
from .train import record as records
from .train.checkpoints import Checkpoints
from .train.engine import compilation_cache
from .train.log import finite

# A path on the command line: ~ is the user's home, also where the shell has not seen it (--out=~/x).
Place = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(words[0]).expanduser(),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
Folder = tyro.conf.Positional[Place]


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends without a word where nobody reads what is printed any more (`... | head`), as other programs do."""
    if sys.stdout is None:  # `>&-`
        print("error: the standard output is closed: redirect it to /dev/null", file=sys.stderr)
        raise SystemExit(2)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                os.dup2(nowhere, stream.fileno())
        raise SystemExit(128 + 13) from None  # what a shell reports of a program that SIGPIPE ended
    except OSError as e:  # a full disk
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e.__context__, SystemExit) and e.__context__.code:  # said already
            raise SystemExit(e.__context__.code) from None
        print(f"error: the output cannot be written: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def write_traceback(errors: Sequence[BaseException], file: Path | None = None) -> Path:
    """Writes the tracebacks of errors that are our fault into a file, by default a new temporary one; returns it."""
    text = "\n".join("".join(traceback.format_exception(e)) for e in errors)
    if file is None:
        handle, name = tempfile.mkstemp("-error.txt", "aigc_jax-")
        os.close(handle)
        file = Path(name)
    file.write_text(text, errors="backslashreplace")
    return file


Trust = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import", metavar="MODULE")]


def _load(run_folder: Path, trust: tuple[str, ...]) -> train.Result:
    return train.load(run_folder, trust=_trusted(trust))


def _trusted(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Modules that the user named; they may lie in the current directory."""
    records.BESIDE[:] = [os.getcwd()] if modules and HERE else []
    return modules


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
    no_repeat_ngram_size: int = 0  # no run of so many tokens occurs twice; 0: it may
    stop: str = ""  # a text of one token that ends it; by default the model's own end, which is not shown


@dataclass(frozen=True)
class Denoise:
    """How a diffusion model goes from noise to samples."""

    sampler: Literal["ddpm", "ddim", "dpm_solver", "heun"] = "ddpm"
    steps: int = 0  # 0: all of the model's
    eta: float = 0.0  # of ddim: 0 is deterministic, 1 as noisy as ddpm
    w: float = 0.0  # guidance towards the label, as in the paper: 0 is none
    # which steps are visited; by default uniform, of dpm_solver and heun log_snr
    spacing: Literal["uniform", "paper", "quadratic", "log_snr", "karras"] | None = None

    def options(self, cfg: ddpm.Config) -> dict:
        """What the family's `sample` takes; refuses what this model cannot do."""
        if not 0 <= self.steps <= cfg.T:
            raise train.Refused(f"--diffusion.steps must lie in 0..{cfg.T}, the model's, got {self.steps}")
        if self.eta and self.sampler != "ddim":
            raise train.Refused(f"--diffusion.eta is of the sampler ddim, not of {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise train.Refused(f"--diffusion.eta must lie in 0..1, got {self.eta}")
        if self.spacing == "paper" and cfg.T % (self.steps or cfg.T):
            raise train.Refused(f"--diffusion.spacing paper needs --diffusion.steps that divide {cfg.T}, the model's, "
                                f"got {self.steps}: use uniform")  # fmt: skip
        if self.w and not (cfg.classes and cfg.unlabelled):
            raise train.Refused(
                "--diffusion.w guides a model that was trained with labels and without: this one was not"
            )
        return asdict(self)


def _prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The prompt's tokens. A vocabulary without a line break, the default, begins with its first token instead."""
    try:
        return tokenizer.encode(text)
    except ValueError:
        if text != Continue.prompt:
            raise
        return np.zeros(1, np.int32)


def _continue(result: train.Result, how: Continue, n: int, seed: int) -> None:
    """n continuations of a prompt, one after another, each token printed when it is drawn."""
    if not result.info.tokenizer:
        raise train.Refused(f"{result.folder} was trained on tokens without a tokenizer: use transformer.generate")
    cfg, tokenizer = result.config, Tokenizer(result.info.tokenizer)
    params = result.state.params if result.state.ema is None else result.state.ema
    prompt = _prompt(tokenizer, how.prompt)
    stop, end = tokenizer.encode(how.stop), () if how.stop else cfg.eos or ()
    if n < 1 or how.new < 1:
        raise train.Refused(f"n and text.new must be at least 1, got {n} and {how.new}")
    if len(stop) > 1:
        raise train.Refused(f"text.stop must be one token, {how.stop!r} is {len(stop)}")
    if not 1 <= len(prompt) <= cfg.context:
        raise train.Refused(f"the prompt has {len(prompt)} tokens; it must have 1 to {cfg.context}")
    if (size := how.no_repeat_ngram_size) < 0:
        raise train.Refused(f"text.no_repeat_ngram_size must be at least 0, got {size}")
    sampling = transformer.Sampling(how.temperature, how.top_k, how.top_p, how.min_p, how.repetition)
    new = min(how.new, max(1, cfg.context - len(prompt)))  # the last token of all needs no place
    size = size if size < len(prompt) + new else 0
    begin = max(0, size - 1) + len(prompt)
    keys = jax.random.split(jax.random.split(jax.random.key(seed), 4)[3], n)
    prefill = jax.jit(partial(transformer.prefill, cfg, slots=len(prompt) + new))
    decode = jax.jit(partial(transformer.decode, cfg), donate_argnums=2)

    @jax.jit
    def draw(logits, used, written, at, key, sampling):
        logits = transformer.penalise(logits, used, sampling.repetition)
        logits = transformer.ban_repeats(logits, written, at, size)
        # A vocabulary that was rounded up has numbers which are no token.
        return transformer.draw(logits.at[:, tokenizer.size :].set(-jax.numpy.inf), key, sampling)

    for i in range(n):
        if n > 1:
            print(f"--- {i + 1} of {n}", flush=True)
        tokens, key = prompt.tolist(), keys[i]
        print(shown := tokenizer.decode(tokens), end="", flush=True)
        logits, cache = prefill(params, prompt[None])
        used = np.isin(np.arange(cfg.vocab), prompt)[None]
        written = np.full((1, begin + new), -1, np.int32)
        written[0, begin - len(prompt) : begin] = prompt
        for j in range(new):
            [token] = draw(logits, used, written, begin + j, jax.random.fold_in(key, j), sampling)
            if int(token) in end:
                break
            tokens.append(int(token))
            used[0, tokens[-1]], written[0, begin + j] = True, tokens[-1]
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
    out: Place | None = None,
    n: int | None = None,
    seed: int = 0,
    chunk: int = 256,
    label: int | None = None,
    text: Continue = Continue(),
    diffusion: Denoise = Denoise(),
    trust: Trust = (),
) -> None:
    """Draws n samples from a run: pictures, points, music, or text, which appears as it is drawn.

    Args:
        run_folder: what a training run wrote.
        out: a .png file (all pictures on one sheet, or a map of points), .npy (the numbers), .mid (music) or .txt
            (text); or a new folder, which gets one file per sample and which `compare` reads. By default pictures go to
            RUN_FOLDER/samples.png and one by one to RUN_FOLDER/samples, and text to the terminal.
        n: how many; by default 64, of text and music 1.
        seed: of the samples; not the run's.
        chunk: how many at once; the samples depend on it.
        label: the class of all of them, for a conditional model; by default the classes in turn.
        text: of a language model.
        diffusion: of a diffusion model.
        trust: a module of your own that made the run and may be imported; may be given several times.
    """
    _check_seed(seed)
    if (n is not None and n < 1) or chunk < 1:
        raise train.Refused(f"n and chunk must be at least 1, got n={n}, chunk={chunk}")
    result = _load(run_folder, trust)
    kind, suffix = result.info.kind, out.suffix.lower() if out else ""
    if kind == "text" and label is not None:
        raise train.Refused(f"{run_folder} writes text: it takes no --label")
    if kind == "text" and (out is None or suffix == ".txt"):
        return _write_text(result, out, text, 1 if n is None else n, seed)
    if diffusion != Denoise() and not isinstance(result.config, ddpm.Config):
        raise train.Refused(f"{run_folder} holds no diffusion model: --diffusion.* is for these")
    if text != Continue():
        raise train.Refused(f"{run_folder} makes {kind}: --text.* is for language models that write text")
    n = n or (1 if kind == "roll" else 64)
    options = diffusion.options(result.config) if isinstance(result.config, ddpm.Config) else {}
    if label is not None:
        classes = getattr(result.config, "classes", 0)
        if not 0 <= label < classes:
            said = f"labels lie in 0..{classes - 1}, got {label}" if classes else "the model takes no labels"
            raise train.Refused(f"{run_folder}: {said}")
    made = _shape(result, options)
    if n > (most := max(1, MOST_BYTES // (4 * math.prod(made)))):
        raise train.Refused(f"n must lie in 1..{most} (1 GiB of samples), got {n}")
    if label is not None:
        options["label"] = np.full(n, label)
    elif getattr(result.config, "classes", 0):  # left to the model they would begin anew in every chunk
        options["label"] = np.arange(n) % result.config.classes
    forms = _forms(kind, made)
    also = (".txt",) if kind == "text" and result.info.tokenizer else ()
    places = _places(run_folder, (*also, *forms), kind, out)
    samples = train.sample(result, jax.random.split(jax.random.key(seed), 4)[3], n=n, chunk=chunk, **options)
    if bad := int((~np.isfinite(samples.reshape(n, -1))).any(1).sum()):
        raise train.Refused(f"{bad} of {n} samples hold values that are not finite: nothing was written")
    for place in places:
        with _anew(place) as new:
            if place.suffix.lower() in forms:
                _write(new, place.suffix.lower(), samples, f"{run_folder}, step {int(result.state.step)}")
            else:
                _write_each(new, forms[0] if kind == "image" else ".npy", samples)
    best = folders.read(run_folder)["run"].get("best")
    chosen = f" (lowest {best} of those kept)" if best else ""
    where = " and, one by one, ".join(str(place) for place in places)
    print(f"wrote {n} samples of step {int(result.state.step)}{chosen} to {where}")


MOST_BYTES = 2**30  # of samples in float32, which are held in memory until all are drawn


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise train.Refused(f"seed must lie in 0..2**32 - 1, got {seed}")


def _shape(result: train.Result, options: dict) -> tuple[int, ...]:
    """The shape of one sample, without drawing any; Refused for a model that draws none."""
    draw = partial(result.family.sample, n=1, **options)
    made = jax.eval_shape(draw, result.state, jax.random.key(0))
    if not isinstance(made, jax.ShapeDtypeStruct) or made.shape[:1] != (1,):
        raise train.Refused(f"{result.folder}: its samples are no array with one row per sample; use train.sample")
    return made.shape[1:]


def _forms(kind: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The kinds of file for samples of this shape; first the one for eyes or ears, where there is one."""
    if (kind == "image" and len(shape) == 3 and shape[-1] in (1, 3)) or (kind == "points" and shape == (2,)):
        return ".png", ".npy"
    if kind == "roll" and len(shape) == 2 and shape[-1] <= 128 - music.LOWEST:
        return ".mid", ".npy"
    return (".npy",)


def _places(run_folder: Path, forms: tuple[str, ...], kind: str, out: Path | None) -> list[Path]:
    """Where samples are written; refuses what is no place for them, before any is drawn."""
    if out is None:
        singles = run_folder / "samples"
        if kind != "image" or forms[0] != ".png":
            return [run_folder / f"samples{forms[0]}"]
        if singles.is_dir() and any(not re.fullmatch(r"\d+\.png", path.name) for path in singles.iterdir()):
            raise train.Refused(f"{singles} holds other files than earlier samples: say with --out where to write")
        return [run_folder / "samples.png", singles]
    takes = f"a {' or '.join(forms)} file or a folder (a name without an ending)"
    if out.suffix and not out.is_dir() and out.suffix.lower() not in forms:
        raise train.Refused(f"{run_folder} makes {kind}: --out must name {takes}, got {out}")
    if not out.parent.is_dir():
        raise train.Refused(f"--out must name a file or folder in a folder that exists, got {out}")
    if out.is_dir() and any(out.iterdir()):
        raise train.Refused(f"{out} holds other files: --out must name {takes} that is new or empty")
    if not out.suffix and out.exists() and not out.is_dir():
        raise train.Refused(f"{out} is a file: --out must name {takes}")
    return [out.resolve() if out.is_dir() else out]


@contextlib.contextmanager
def _anew(place: Path) -> Iterator[Path]:
    """A path beside `place` to write a file or folder to, which takes its place when it is whole, and else vanishes."""
    new = place.with_name(f".{place.name}.new{os.getpid()}")
    try:
        yield new
        if new.is_dir() and place.is_dir():
            shutil.rmtree(place)  # it holds nothing, or earlier samples
        new.replace(place)
    finally:
        if new.is_dir():
            shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)


def _write(file: Path, form: str, samples: np.ndarray, caption: str) -> None:
    """All samples in one file."""
    if form == ".npy":
        with open(file, "wb") as opened:
            np.save(opened, samples)
    elif form == ".mid":
        music.write_midi(file, music.joined(samples))
    elif samples.ndim == 4:
        figures.save_images(file, samples)
    else:
        fig, ((ax,),) = figures.figure(1, 1, size=(5, 5))
        figures.points(ax, samples, title=f"{len(samples)} samples")
        figures.save(fig, file, caption, kind="png")


def _write_each(folder: Path, form: str, samples: np.ndarray) -> None:
    """One file per sample, 00000.png or .npy, in a new folder."""
    folder.mkdir()
    for i, sample in enumerate(samples):
        file = folder / f"{i:05}{form}"
        figures.save_image(file, sample) if form == ".png" else np.save(file, sample)


def _write_text(result: train.Result, out: Path | None, text: Continue, n: int, seed: int) -> None:
    """Continuations of a prompt, on the terminal or in a file."""
    if out is None:
        return _continue(result, text, n, seed)
    [place] = _places(result.folder, (".txt",), "text", out)
    with _anew(place) as new, open(new, "x", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        _continue(result, text, n, seed)
    print(f"wrote {n} texts of step {int(result.state.step)} to {place}")


def info(run_folder: Folder, /) -> None:
    """Says what a run folder holds: model, data, progress, checkpoints.

    Args:
        run_folder: what a training run wrote.
    """
    record = folders.read(run_folder)
    lines = train.metrics(run_folder)
    last = {kind: next((r for r in reversed(lines) if kind in r), None) for kind in ("train", "valid")}
    source, run = record["data"]["source"] or "arrays", record["run"]
    if words := folders.edited(run_folder, record):
        print(f"EDITED   {words}")
    print(f"model    {'.'.join(record['make'])}")
    print(f"config   {json.dumps(record['config'])}")
    print(f"data     {json.dumps(source)}, {record['data'].get('examples') or 'endless'} examples")
    print(f"run      seed {run['seed']}, batch {run['batch_size']}, {run['steps']} steps")
    print(f"made on  {', '.join(f'{k} {v}' for k, v in record['environment'].items() if v)}")
    for kind, line in last.items():
        if line:
            values = "  ".join(f"{name} {value:.5g}" for name, value in line[kind].items() if value is not None)
            print(f"{kind:8} step {line['step']}: {values}")
    saves = Checkpoints(run_folder, 1)
    for step, intact in saves.checked().items():
        print(f"saved    step {step}{'' if intact else '  DAMAGED: it will be passed over'}")
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
    if not isinstance(source, dict) or not all(isinstance(source.get(name), str) for name in ("name", "split")):
        raise train.Refused(f"{run_folder}/run.json is damaged: a data source has a name and a split, not {source!r}")
    options = {name: value for name, value in source.items() if name not in ("name", "split")}
    if options.get("tokenizer", "char") != "char":  # the run keeps it, wherever its file went since
        options["tokenizer"] = str(run_folder / "tokenizer.json")
    try:
        found = data.load(source["name"], source["split"] if split is None else split, folder=folder, **options)
    except (AttributeError, KeyError, TypeError, ArithmeticError, MemoryError) as e:
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        raise train.Refused(f"{run_folder}/run.json does not describe a data set that can be loaded: {said}") from e
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
    trust: Trust = (),
) -> None:
    """Scores a run on its validation set, or on another part of its data, and prints the means over all examples.

    Args:
        run_folder: what a training run wrote.
        split: a part of the training set's source, such as test or "train[90%:]"; by default the validation set.
        batch_size: examples at once.
        seed: of the noise.
        data_folder: where the set's original files lie, if it needs any.
        trust: as for sample.
    """
    record = folders.read(run_folder)
    if split is None and record["valid"] is None:
        raise train.Refused(f"{run_folder} was trained without a validation set: name a part of its data with --split")
    scored = _source(run_folder, "valid" if split is None else "data", data_folder, split)
    result = _load(run_folder, trust)
    values = train.evaluate(result, scored, batch_size=batch_size, seed=seed)
    name, part = (scored.info.source[key] for key in ("name", "split"))
    print(f"step {int(result.state.step)} of {run_folder} on {name} {part}, {scored.info.examples} examples")
    for quantity, value in values.items():
        print(f"  {quantity:24} {value:.6g}")


def export(run_folder: Folder, out: Folder, /, *, trust: Trust = ()) -> None:
    """Writes the weights that sampling uses (the average where there is one) as a .safetensors file.

    Names are paths in the State's `ema`, or in its `params` (and `extra`, under that name) where there is no average,
    joined by dots; the metadata hold the model's make, config and step as text.

    Args:
        run_folder: what a training run wrote.
        out: the file.
        trust: as for sample.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if out.suffix != ".safetensors" or not out.parent.is_dir() or out.is_dir():
        raise train.Refused(f"{out} must be a .safetensors file in a folder that exists")
    result, record = _load(run_folder, trust), folders.read(run_folder)
    averaged = result.state.ema is not None
    tree = result.state.ema if averaged else result.state.params
    trees = {"": tree} if averaged or result.state.extra is None else {"": tree, "extra.": result.state.extra}
    tensors: dict[str, np.ndarray] = {}
    for prefix, part in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(part)):
            name = prefix + jax.tree_util.keystr(path, simple=True, separator=".")
            if name in tensors:
                raise train.Refused(f"two arrays of {run_folder} would be named {name}: a module's name holds a dot")
            tensors[name] = np.asarray(leaf, order="C")
    about = {"make": ".".join(record["make"]), "config": json.dumps(record["config"]), "step": str(result.state.step)}
    new = out.with_name(f".{out.name}.new")
    try:
        save_file(tensors, new, metadata={**about, "averaged": str(averaged)})
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(out)
    except (OSError, SafetensorError) as e:
        raise train.Refused(f"{out} cannot be written: {e}") from e
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
    numbers = sum(x.size for x in tensors.values())
    print(f"wrote {len(tensors)} arrays, {numbers} numbers, of step {int(result.state.step)} to {out}")


def replay(run_folder: Folder, /, *, step: int, data_folder: DataFolder = None, trust: Trust = ()) -> None:
    """Repeats one update of a run, bit for bit; prints its metrics, its norms and how it agrees with metrics.jsonl.

    Args:
        run_folder: what a training run wrote.
        step: the number of the update, as messages and metrics.jsonl give it.
        data_folder: where the set's original files lie, if it needs any.
        trust: as for sample.
    """
    source = _source(run_folder, "data", data_folder)
    values, facts = train.replay(run_folder, source, step=step, trust=_trusted(trust))
    print(f"update {step} of {run_folder}")
    for name, value in values.items():
        print(f"  {name:24} {value!r}{'' if np.isfinite(value) else '   <- not finite'}")
    print(f"  {_agreement(values, facts['logged'])}")
    for module, before in facts["norm_before"].items():
        print(f"  |{module}|".ljust(26), f"{before!r} -> {facts['norm_after'][module]!r}")
    if "rows" in facts:
        print(f"  rows of the set: {' '.join(map(str, facts['rows']))}")


def _agreement(values: dict, logged: dict | None) -> str:
    """How an update that was repeated agrees with what its run logged, in words."""
    if logged is None:
        return "metrics.jsonl holds no line of this step: nothing to compare with"
    ours = finite(values)
    other = [name for name in {**logged, **ours} if ours.get(name) != logged.get(name)]
    if not other:
        return "equal to metrics.jsonl in every bit"
    words = []
    for name in other:
        pair = (logged.get(name), ours.get(name))
        size = f" ({abs(pair[1] - pair[0]):.3g} apart)" if all(isinstance(x, float) for x in pair) else ""
        words.append(f"{name} was {pair[0]!r} and is {pair[1]!r}{size}")
    return f"NOT as in metrics.jsonl: {'; '.join(words)}"


FEWEST = 50  # pictures a side; with fewer no value of `compare` says anything


DataSize = Annotated[int | None, tyro.conf.arg(name="data.size")]


def _recorded_size(folder: Path) -> int | None:
    """The size that a run folder says its pictures were resized to; None for other folders."""
    source = folders.read(folder)["data"]["source"] if (folder / "run.json").is_file() else None
    return source.get("size") if isinstance(source, dict) else None


def _pictures(folder: Path, size: int | None) -> data.Data:
    """Every picture of a folder, however it is sorted; of a run folder those that `sample` wrote."""
    if (folder / "run.json").is_file():
        if not (folder / "samples").is_dir():
            raise train.Refused(f"{folder} is a run: draw its samples first, with python -m aigc_jax sample {folder}")
        folder = folder / "samples"
    return data.load(f"images:{folder}", size=size, labels=False)


def compare(
    reference: Folder,
    other: Folder,
    /,
    *,
    features: Literal["pixels", "mnist", "fashion_mnist", "digits"] = "pixels",
    n: int | None = None,
    seed: int = 0,
    data_size: DataSize = None,
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
        data_size: the side that all pictures are resized and cut to; by default what the run OTHER was trained with.
    """
    _check_seed(seed)
    size = _recorded_size(other) if data_size is None else data_size
    real, fake = _pictures(reference, size), _pictures(other, size)
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
    table = Table(title=Text(title), title_justify="left")  # Text: brackets in a folder's name are no markup
    for head in ("quantity", "value", "floor: the reference against itself"):
        table.add_column(head)
    for name in columns[0]:
        shown = (
            f"fid_{features.removesuffix('_mnist')}" if name.startswith("Frechet") and features != "pixels" else name
        )
        table.add_row(Text(shown), *(" +- ".join(f"{x:.4g}" for x in column[name]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@quiet_pipe()
def main() -> None:
    """The command line: one line and exit code 2 for a user's mistake."""
    compilation_cache()
    try:
        commands = [sample, evaluate, export, info, replay, compare]
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in commands}, prog="python -m aigc_jax", description=__doc__
        )
    except KeyboardInterrupt as e:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from e
    except BrokenPipeError:
        raise
    except (train.Refused, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e
    except Exception as e:  # nobody's mistake but ours, or no memory
        words = " ".join(f"{type(e).__name__}: {e}"[:500].split())
        print(f"error: {words} (its traceback is in {write_traceback([e])})", file=sys.stderr)
        raise SystemExit(1) from e


if __name__ == "__main__":
    main()
