"""How `python -m aigc_jax sample` writes text: token by token, or by diffusion, step by step."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from .. import ddpm, language, train, transformer
from ..core import EMA
from ..data.text import Tokenizer
from ..ddpm.token_model import token_logits_fn
from ..ddpm.tokens import sampling_steps

PAD = 0  # fills titles, and the rows of titled texts


@dataclass(frozen=True)
class TextOptions:
    """How a model writes text, or what a text-to-image model draws."""

    # What the text begins with, or what the picture shows. By default a text begins with a new line
    # (diffusion: with nothing), and a picture follows no text.
    prompt: str = "\n"
    negative: str = ""  # text to image: what the pictures shall not show
    skip_unknown: bool = False  # text to image: leave out words that the model does not know
    title: str = ""  # for a model of texts with titles, such as poems
    infill: str = ""  # text diffusion: a text with a blank, "_", for each token to fill in
    blank: str = "_"  # the character that stands for a token to fill in
    # Tokens to write; fewer if the context ends before. Default: 256 after a prompt, 0 after
    # --text.infill, and as many as fit after a title.
    new: int | None = None
    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # draw from the k most likely tokens; 0: all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability
    min_p: float = 0.0  # least probability of a token, as a share of the largest
    repetition: float = 1.0  # penalty of tokens that occurred before; 1: none
    no_repeat_ngram_size: int = 0  # no sequence of so many tokens occurs twice; 0: allowed
    stop: str = ""  # one token that ends the text; by default the model's own end, not shown

    def only(self, who: str, *names: str) -> None:
        """Raises Refused if an option is given that is not among `names`."""
        default = asdict(TextOptions())
        for name, value in asdict(self).items():
            if value != default[name] and name not in names:
                takes = ", ".join(name.replace("_", "-") for name in names)
                raise train.Refused(f"{who} takes no --text.{name.replace('_', '-')}, only {takes}")


def write_text(result: train.Result, options: TextOptions, diffusion, n: int, seed: int) -> None:
    """Prints n texts of a model, one after another; each grows while it is drawn."""
    folder = result.folder
    if not result.info.tokenizer:
        raise train.Refused(f"{folder} was trained on tokens without a tokenizer: use train.sample")
    if n < 1 or (options.new is not None and options.new < 0):
        raise train.Refused(f"n must be at least 1 and text.new at least 0, got {n}, {options.new}")
    if options.negative or options.skip_unknown:
        raise train.Refused("text.negative and text.skip-unknown are for text-to-image models")
    tokenizer, key = Tokenizer(result.info.tokenizer), jax.random.key(seed)
    title = _title(result, tokenizer, options.title)
    keys = jax.random.split(jax.random.split(key, 4)[3], n)
    if isinstance(result.config, ddpm.TokenConfig):
        write_one = _diffusion(result, tokenizer, options, diffusion, title)
    elif diffusion.given():
        raise train.Refused(f"{folder} holds no diffusion model: --diffusion.* is for these")
    else:
        write_one = _token_by_token(result, tokenizer, options, title)
    for i in range(n):
        if n > 1:
            print(f"--- {i + 1} of {n}", flush=True)
        if title.size:
            print(options.title.strip(), flush=True)
        write_one(keys[i])


def _title(result: train.Result, tokenizer: Tokenizer, title: str) -> np.ndarray:
    """Returns a title as tokens, padded; none for a model of texts without titles."""
    length, title = result.info.title_length, title.strip()
    if length is None:
        if title:
            raise train.Refused(f"{result.folder} writes texts without titles: no --text.title")
        return np.zeros(0, np.int32)
    if not title:
        raise train.Refused(f"{result.folder} writes on a title: give one with --text.title")
    tokens = tokenizer.encode(title)
    if len(tokens) > length:
        raise train.Refused(f"--text.title has {len(tokens)} tokens, the model takes {length}")
    return np.pad(tokens, (0, length - len(tokens)), constant_values=PAD)


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The prompt's tokens. The default prompt is the first token if there is no line break."""
    try:
        return tokenizer.encode(text)
    except ValueError:
        if text != TextOptions.prompt:
            raise
        return np.zeros(1, np.int32)


# --------------------------------------------------------------------------- token by token


def _token_by_token(result: train.Result, tokenizer, options: TextOptions, title: np.ndarray):
    """Returns f(key), which prints a continuation of the prompt, each token once it is drawn."""
    cfg = result.config
    for name in ("infill", "blank"):
        if getattr(options, name) != getattr(TextOptions, name):
            raise train.Refused(
                f"{result.folder} writes from left to right: --text.{name} is for text diffusion, "
                "use --text.prompt"
            )
    prompt = np.zeros(0, np.int32)
    if not title.size or options.prompt != TextOptions.prompt:
        prompt = encode_prompt(tokenizer, options.prompt)
    stop, start = tokenizer.encode(options.stop), np.concatenate([title, prompt])
    new = _new_tokens(result, options, start, stop)
    tokens_of = _token_stream(result, options, tokenizer, start, new)
    # The end of a title's text, or the model's own end, is not shown.
    ends = (PAD,) if title.size else () if options.stop else getattr(cfg, "eos", None) or ()

    def write(key):
        tokens = prompt.tolist()
        print(shown := tokenizer.decode(tokens), end="", flush=True)
        for token in tokens_of(key):
            if token in ends:
                break
            tokens.append(token)
            text = tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):  # else bytes of the last character are still missing
                print(text[len(shown) :], end="", flush=True)
                shown = text
            if token in stop:
                break
        print()

    return write


def _new_tokens(result: train.Result, options: TextOptions, start, stop) -> int:
    """Returns how many tokens to write; raises Refused for options that the model cannot take."""
    if options.new == 0:
        raise train.Refused("text.new must be at least 1, got 0")
    if len(stop) > 1:
        raise train.Refused(f"text.stop must be one token, {options.stop!r} is {len(stop)}")
    if (size := options.no_repeat_ngram_size) < 0:
        raise train.Refused(f"text.no_repeat_ngram_size must be at least 0, got {size}")
    context = getattr(result.config, "context", None)  # a recurrent net has no end
    if not 1 <= len(start) <= (context or len(start)):
        most = f"1 to {context}" if context else "at least 1"
        raise train.Refused(f"the prompt has {len(start)} tokens; it must have {most}")
    new = 256 if options.new is None else options.new
    if result.info.title_length is not None:
        new = min(new, max(1, result.info.shape[0] - len(start)))
    return min(new, context - len(start) + 1) if context else new  # the last needs no position


def _token_stream(result: train.Result, options: TextOptions, tokenizer, prompt, new: int):
    """Returns f(key), which yields `new` tokens after the prompt, each when it is drawn."""
    cfg, params = result.config, EMA(result.config.ema).read(result.state)
    sampling = transformer.Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition
    )
    total = len(prompt) + new
    ngram = options.no_repeat_ngram_size if options.no_repeat_ngram_size < total else 0
    first = max(0, ngram - 1) + len(prompt)  # the index of the first new token in `written`
    prefill, decode = _steps(cfg, total - 1)

    @jax.jit
    def draw(logits, used, written, at, key, sampling):
        logits = transformer.penalise(logits, used, sampling.repetition)
        logits = transformer.ban_repeats(logits, written, at, ngram)
        return transformer.sample_token(_real(logits, tokenizer), key, sampling)

    def tokens(key):
        logits, cache = prefill(params, prompt[None])
        used = np.isin(np.arange(cfg.vocab), prompt)[None]
        written = np.full((1, first + new), -1, np.int32)
        written[0, first - len(prompt) : first] = prompt
        for j in range(new):
            step_key = jax.random.fold_in(key, j)
            [token] = map(int, draw(logits, used, written, first + j, step_key, sampling))
            yield token
            used[0, token], written[0, first + j] = True, token
            if j + 1 < new:
                logits, cache = decode(params, jnp.array([token], jnp.int32), cache)

    return tokens


def _steps(cfg, slots: int):
    """Returns prefill(params, tokens) and decode(params, token, cache) -> logits [1, V], cache."""
    if not isinstance(cfg, language.Config):
        prefill = jax.jit(partial(transformer.prefill, cfg, slots=slots))
        return prefill, jax.jit(partial(transformer.decode, cfg), donate_argnums=2)

    @jax.jit
    def carry_on(params, tokens, memory=None):
        logits, memory = language.apply(cfg, params, tokens, memory)
        return logits[:, -1], memory

    return carry_on, lambda params, token, memory: carry_on(params, token[:, None], memory)


def _real(logits, tokenizer):
    """Returns the logits without the numbers that are no tokens: a vocabulary may be rounded up."""
    return logits.at[..., tokenizer.size :].set(-jnp.inf)


# -------------------------------------------------------------------------------- diffusion


def _diffusion(result: train.Result, tokenizer, options: TextOptions, diffusion, title):
    """Returns f(key), which prints a text; on a terminal its tokens appear as they are fixed."""
    cfg, params = result.config, EMA(result.config.ema).read(result.state)
    options.only("text diffusion", "prompt", "title", "infill", "blank", "new", "temperature")
    known = np.concatenate([title, _known(result, tokenizer, options, len(title))])
    given = known >= 0
    steps = diffusion.text_steps(cfg, given)
    if not 1 <= len(known) <= cfg.context:
        raise train.Refused(f"the text has {len(known)} tokens, the model takes {cfg.context}")
    w = {"w": diffusion.w, "given": given[None]} if diffusion.w else {}
    logits_fn = token_logits_fn(cfg, params, **w)
    # The net is compiled once for all texts. The rest of a step is cheap.
    compiled = jax.jit(lambda x_t, t: _real(logits_fn(x_t, t), tokenizer))

    def sampler(key):
        return sampling_steps(
            cfg.process,
            compiled,
            key,
            shape=(1, len(known)),
            vocab=cfg.vocab,
            steps=steps,
            temperature=options.temperature,
            known=known,
            schedule=cfg.schedule,
            order=diffusion.order or "random",
            block=diffusion.block or 0,
        )

    jax.eval_shape(lambda key: sampler(key)[0], jax.random.key(0))  # checks, before any output

    def shown(x) -> str:
        text = _decode(tokenizer, np.asarray(x)[0, len(title) :], options.blank)
        return text.rstrip(tokenizer.decode([PAD])) if title.size else text

    def write(key):
        (x, step), console = sampler(key), Console(file=sys.stdout)
        if not console.is_terminal:
            return print(shown(functools.reduce(step, range(steps), x)))
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for i in range(steps):
                x = step(x, i)
                live.update(Text(shown(x)), refresh=True)

    return write


def _known(result: train.Result, tokenizer, options: TextOptions, title: int) -> np.ndarray:
    """Returns the tokens after the title, -1 where they are free."""
    if options.infill and options.prompt != TextOptions.prompt:
        raise train.Refused("give --text.prompt or --text.infill, not both")
    if len(options.blank) != 1:
        raise train.Refused(f"--text.blank must be one character, got {options.blank!r}")
    tokens, prompt = np.zeros(0, np.int32), options.prompt != TextOptions.prompt
    if options.infill:
        tokens = np.concatenate(list(_pieces(tokenizer, options.infill, options.blank)))
    elif prompt:
        tokens = tokenizer.encode(options.prompt)
    most = result.config.context - title - len(tokens)
    if title:  # the rows of titled texts have one length
        most = result.info.shape[0] - title - len(tokens)
    if most < 0:
        which, has = "infill" if options.infill else "prompt", len(tokens)
        raise train.Refused(
            f"--text.{which} has {has} tokens, the model takes {has + most}: shorten it"
        )
    new = options.new
    if new is None:
        new = most if title else 0 if options.infill else 256
    new = min(new, most)
    rest = np.full(most - new if title else 0, PAD)
    known = np.concatenate([tokens, np.full(new, -1), rest]).astype(np.int32)
    if not (known < 0).any():
        raise train.Refused(
            f"nothing is left to write: put {options.blank!r} into --text.infill for each token "
            "to fill in, or raise --text.new"
        )
    return known


def _pieces(tokenizer: Tokenizer, text: str, blank: str) -> Iterable[np.ndarray]:
    """Yields the tokens of a text, -1 for each blank."""
    for is_blank, run in itertools.groupby(text, lambda char: char == blank):
        run = "".join(run)
        yield np.full(len(run), -1) if is_blank else tokenizer.encode(run)


def _decode(tokenizer: Tokenizer, tokens: np.ndarray, blank: str) -> str:
    """Returns the text of tokens, with blanks for masks and numbers that the tokenizer lacks."""
    runs = itertools.groupby(tokens.tolist(), lambda token: token >= tokenizer.size)
    return "".join(
        blank * len(list(r)) if masked else tokenizer.decode(list(r)) for masked, r in runs
    )
