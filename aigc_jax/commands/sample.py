"""`python -m aigc_jax sample`: pictures, points, music or text from a run."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from .. import ddpm, figures, train
from ..data import captions, music
from ..train import folder as folders
from ..train.inference import check_samples
from .shared import Folder, Place, Trust, check_seed, load_run
from .text import TextOptions, write_text

MOST_BYTES = 2**30  # of samples in float32, which are held in memory until all are drawn


@dataclass(frozen=True)
class DiffusionOptions:
    """How a diffusion model goes from noise to samples. What is not given, the model decides."""

    sampler: Literal["ddpm", "ddim", "dpm_solver", "heun"] | None = None  # default: ddpm
    # Pictures: 0, the default, takes all of the model's. Text: at least 1, default one per token.
    steps: int | None = None
    eta: float | None = None  # ddim: 0, the default, is deterministic, 1 as noisy as ddpm
    w: float | None = None  # guidance weight of the paper; 0, the default: no guidance
    # which steps are visited; by default uniform, for dpm_solver and heun log_snr
    spacing: Literal["uniform", "paper", "quadratic", "log_snr", "karras"] | None = None
    # text: which masked tokens a step reveals; default: random
    order: Literal["random", "confidence", "ancestral"] | None = None
    block: int | None = None  # text: length of blocks that are filled from left to right; 0: none

    def options(self, cfg: ddpm.Config) -> dict:
        """What the family's `sample` takes; raises Refused for what this model cannot do."""
        self.only("a diffusion model of pictures", "sampler", "steps", "eta", "w", "spacing")
        steps, eta = self.steps or 0, self.eta or 0.0
        if not 0 <= steps <= cfg.T:
            raise train.Refused(
                f"--diffusion.steps must lie in 0..{cfg.T}, the model's, got {steps}"
            )
        if eta and self.sampler != "ddim":
            sampler = self.sampler or "ddpm"
            raise train.Refused(f"--diffusion.eta is of the sampler ddim, not of {sampler}")
        if not 0 <= eta <= 1:
            raise train.Refused(f"--diffusion.eta must lie in 0..1, got {eta}")
        if self.spacing == "paper" and cfg.T % (steps or cfg.T):
            raise train.Refused(
                f"--diffusion.spacing paper needs --diffusion.steps that divide {cfg.T}, "
                f"the model's, got {steps}: use uniform"
            )
        if self.w and not ((cfg.classes or cfg.context) and cfg.unlabelled):
            raise train.Refused(
                "--diffusion.w guides a model that was trained with labels or texts, and without: "
                "this one was not"
            )
        return self.given()

    def text_steps(self, cfg: ddpm.TokenConfig, given: np.ndarray) -> int:
        """Number of steps for a text; raises Refused for what this model cannot do.

        given [L]: True at known tokens. By default each step is for one other token.
        """
        self.only("text diffusion", "steps", "w", "order", "block")
        blocks = max(1, len(given) // (self.block or len(given)))  # all have equally many steps
        steps = -(-int((~given).sum()) // blocks) * blocks if self.steps is None else self.steps
        if steps < 1:
            raise train.Refused(f"--diffusion.steps must be at least 1, got {steps}")
        if self.w and not cfg.unlabelled:
            raise train.Refused("--diffusion.w needs a model with model.unlabelled > 0, not 0")
        if self.w and not given.any():
            raise train.Refused("--diffusion.w guides by a title or other given text: give one")
        return steps

    def only(self, who: str, *names: str) -> None:
        """Raises Refused if an option is given that is not among `names`."""
        if other := [name for name in self.given() if name not in names]:
            raise train.Refused(f"{who} takes no --diffusion.{other[0]}, only {', '.join(names)}")

    def given(self) -> dict:
        """The options that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def sample(
    run_folder: Folder,
    /,
    *,
    out: Place | None = None,
    n: int | None = None,
    seed: int = 0,
    chunk: int = 256,
    label: int | None = None,
    truncation: float | None = None,
    text: TextOptions = TextOptions(),
    diffusion: DiffusionOptions = DiffusionOptions(),
    trust: Trust = (),
) -> None:
    """Draws n samples from a run: pictures, points, music or text. Text appears as it is written.

    Args:
        run_folder: what a training run wrote, or the name of a model that comes with the package.
        out: a .png file (all pictures on one sheet, or a map of points), .npy (the numbers), .mid
            (music) or .txt (text). Or a new folder: it gets one file per sample, and `compare`
            reads it. By default pictures go to RUN_FOLDER/samples.png and one by one to
            RUN_FOLDER/samples, and text to the terminal.
        n: how many; by default 64, of text and music 1.
        seed: of the samples, not of the run.
        chunk: how many at once; the samples depend on it. Text for reading is drawn one by one.
        label: the class of all samples, for a conditional model; by default the classes in turn.
        truncation: of a StyleGAN: how far styles go from their mean. 0: the mean, 1: as trained.
        text: of a language model, or of a model that draws from text.
        diffusion: of a diffusion model.
        trust: a module of your own that made the run and may be imported; can be given repeatedly.
    """
    check_seed(seed)
    if (n is not None and n < 1) or chunk < 1:
        raise train.Refused(f"n and chunk must be at least 1, got n={n}, chunk={chunk}")
    result = load_run(run_folder, trust)
    check_samples(result)
    kind, suffix = result.info.kind, out.suffix.lower() if out else ""
    for flag, value in (("label", label), ("truncation", truncation)):
        if kind == "text" and value is not None:
            raise train.Refused(f"{run_folder} writes text: it takes no --{flag}")
    if kind == "text" and (out is None or suffix == ".txt"):
        return _text_to(result, out, text, diffusion, 1 if n is None else n, seed)
    if kind == "text" and result.info.title_length is not None:
        raise train.Refused(f"{run_folder} writes on titles: --out must name a .txt file")
    n = n or (1 if kind in ("roll", "text") else 64)
    options = _options(run_folder, result, label, text, diffusion)
    options |= _truncation(run_folder, result, truncation)
    shape = _shape(result, options)
    if n > (most := max(1, MOST_BYTES // (4 * math.prod(shape)))):
        raise train.Refused(f"n must lie in 1..{most} (1 GiB of samples), got {n}")
    if label is not None:  # else train.sample takes the classes in turn
        options["label"] = np.full(n, label)
    forms = _forms(kind, shape)
    also = (".txt",) if kind == "text" and result.info.tokenizer else ()
    places = _places(run_folder, (*also, *forms), kind, out)
    key = jax.random.split(jax.random.key(seed), 4)[3]
    samples = _draw(result, key, n, chunk, options)
    single = forms[0] if kind == "image" else ".npy"
    _write(places, forms, single, samples, f"{run_folder}, step {int(result.state.step)}")
    _say_where(result, n, places)


def _draw(result: train.Result, key, n: int, chunk: int, options: dict) -> np.ndarray:
    """Returns n samples. Refused: values that are not finite."""
    samples = train.sample(result, key, n=n, chunk=chunk, **options)
    if bad := int((~np.isfinite(samples.reshape(n, -1))).any(1).sum()):
        raise train.Refused(
            f"{bad} of {n} samples hold values that are not finite: nothing was written"
        )
    return samples


def _say_where(result: train.Result, n: int, places: list[Path]) -> None:
    """Prints how many samples of which checkpoint were written to which places."""
    best = result.folder and folders.read(result.folder)["run"].get("best")
    chosen = f" (lowest {best} of those kept)" if best else ""
    where = " and, one by one, ".join(str(place) for place in places)
    print(f"wrote {n} samples of step {int(result.state.step)}{chosen} to {where}")


def _options(run_folder, result: train.Result, label, text, diffusion) -> dict:
    """What the family's `sample` takes; raises Refused for options of another family."""
    config = result.config
    if _draws_texts(result):
        if label is not None:
            raise train.Refused(f"{run_folder} draws texts: it takes no --label")
        diffusion.only(f"{run_folder}", "sampler", "steps", "eta", "w", "spacing")
        return {**_text_to_image(result, text), **diffusion.given()}
    is_diffusion = isinstance(config, (ddpm.Config, ddpm.TokenConfig))
    if diffusion.given() and not is_diffusion:
        raise train.Refused(f"{run_folder} holds no diffusion model: --diffusion.* is for these")
    if text != TextOptions():
        kind = result.info.kind
        makes = "numbers of tokens into this file" if kind == "text" else kind
        raise train.Refused(
            f"{run_folder} makes {makes}: --text.* is for language models that write text"
        )
    options = diffusion.options(config) if isinstance(config, ddpm.Config) else diffusion.given()
    if isinstance(config, ddpm.TokenConfig):
        diffusion.only("text diffusion into a .npy file", "steps", "order", "block")
    classes = getattr(config, "classes", 0)
    if label is not None:
        if not classes:
            raise train.Refused(f"{run_folder}: the model takes no labels")
        if not 0 <= label < classes:
            raise train.Refused(f"{run_folder}: labels lie in 0..{classes - 1}, got {label}")
    return options


def _truncation(run_folder, result: train.Result, truncation: float | None) -> dict:
    """What a StyleGAN's `sample` takes; raises Refused for other models and for values too far."""
    if truncation is None:
        return {}
    kind = getattr(getattr(result.config, "gen", None), "kind", None)
    if kind != "style":
        raise train.Refused(f"{run_folder}: --truncation is for a GAN with model.gen.kind style")
    if not -2 <= truncation <= 2:
        raise train.Refused(f"--truncation must lie in -2..2, got {truncation}")
    return {"truncation": truncation}


def _draws_texts(result: train.Result) -> bool:
    """Whether a model makes pictures from a prompt."""
    takes = inspect.signature(result.family.sample).parameters
    return result.info.kind == "image" and "prompt" in takes


def _text_to_image(result: train.Result, text: TextOptions) -> dict:
    """Returns prompt and negative prompt as tokens; says so where there is none."""
    own = {"prompt": text.prompt, "negative": text.negative}
    text.only("a text-to-image model", *own, "skip_unknown")
    found = {}
    for name in ("prompt", "negative"):
        words = own[name].strip()
        if not words:
            continue
        try:
            found[name] = captions.encode(
                result.info.tokenizer,
                words,
                result.info.caption_length,
                skip_unknown=text.skip_unknown,
            )
        except ValueError as e:
            hint = "; --text.skip-unknown leaves them out" if "vocabulary" in str(e) else ""
            raise train.Refused(f"--text.{name}: {e}{hint}") from e
        if not found[name].any():
            raise train.Refused(f"--text.{name}: the model knows none of the words of {words!r}")
    if "prompt" not in found:
        print("no prompt: the pictures follow no text")
    return found


def _shape(result: train.Result, options: dict) -> tuple[int, ...]:
    """The shape of one sample, without drawing any; raises Refused if samples are no array."""
    draw = partial(result.family.sample, n=1, **options)
    made = jax.eval_shape(draw, result.state, jax.random.key(0))
    if not isinstance(made, jax.ShapeDtypeStruct) or made.shape[:1] != (1,):
        raise train.Refused(
            f"{result.folder}: its samples are no array with one row per sample; use train.sample"
        )
    return made.shape[1:]


def _forms(kind: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The file endings for samples of this shape; first the one to look at or listen to."""
    picture = kind == "image" and len(shape) == 3 and shape[-1] in (1, 3)
    if picture or (kind == "points" and shape == (2,)):
        return ".png", ".npy"
    if kind == "roll" and len(shape) == 2 and shape[-1] <= 128 - music.LOWEST:
        return ".mid", ".npy"
    return (".npy",)


def _places(run_folder: Path, forms: tuple[str, ...], kind: str, out: Path | None) -> list[Path]:
    """The files and folders to write; raises Refused before any sample is drawn."""
    if out is None and not run_folder.exists():  # a model that comes with the package
        raise train.Refused("say with --out where to write")
    if out is None:
        return _default_places(run_folder, forms, kind)
    takes = f"a {' or '.join(forms)} file or a folder (a name without an ending)"
    if out.suffix and not out.is_dir() and out.suffix.lower() not in forms:
        raise train.Refused(f"{run_folder} makes {kind}: --out must name {takes}, got {out}")
    if not out.parent.is_dir():
        raise train.Refused(f"--out must name a file or folder in a folder that exists, got {out}")
    if out.is_dir() and any(out.iterdir()):
        raise train.Refused(
            f"{out} holds other files: --out must name {takes} that is new or empty"
        )
    if not out.suffix and out.exists() and not out.is_dir():
        raise train.Refused(f"{out} is a file: --out must name {takes}")
    return [out.resolve() if out.is_dir() else out]


def _default_places(run_folder: Path, forms: tuple[str, ...], kind: str) -> list[Path]:
    singles = run_folder / "samples"
    if kind != "image" or forms[0] != ".png":
        return [run_folder / f"samples{forms[0]}"]
    if singles.is_dir() and any(
        not re.fullmatch(r"\d+\.png", path.name) for path in singles.iterdir()
    ):
        raise train.Refused(
            f"{singles} holds other files than earlier samples: say with --out where to write"
        )
    return [run_folder / "samples.png", singles]


@contextlib.contextmanager
def _replacing(place: Path) -> Iterator[Path]:
    """A path beside `place` to write to. Once it is whole it replaces `place`; else it vanishes."""
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


def _write(places: list[Path], forms, single: str, samples: np.ndarray, caption: str) -> None:
    """Writes the samples to each place: a file with an ending of `forms`, or a folder."""
    for place in places:
        with _replacing(place) as new:
            if place.suffix.lower() in forms:
                _write_all(new, place.suffix.lower(), samples, caption)
            else:
                _write_each(new, single, samples)


def _write_all(file: Path, form: str, samples: np.ndarray, caption: str) -> None:
    """Writes all samples into one file."""
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
    """Writes one file per sample, 00000.png or 00000.npy, into a new folder."""
    folder.mkdir()
    for i, sample in enumerate(samples):
        file = folder / f"{i:05}{form}"
        figures.save_image(file, sample) if form == ".png" else np.save(file, sample)


def _text_to(result: train.Result, out: Path | None, text, diffusion, n: int, seed: int) -> None:
    """Writes n texts to the terminal or to a file."""
    if out is None:
        return write_text(result, text, diffusion, n, seed)
    [place] = _places(result.folder, (".txt",), "text", out)
    with (
        _replacing(place) as new,
        open(new, "x", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
    ):
        write_text(result, text, diffusion, n, seed)
    print(f"wrote {n} texts of step {int(result.state.step)} to {place}")
