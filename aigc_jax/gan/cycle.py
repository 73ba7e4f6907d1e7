"""CycleGAN (Zhu et al. 2017): translation between two sets of images, without pairs.

A generator per direction, G: A -> B and F: B -> A, and a critic per set, D_A and D_B. With the
least-squares loss (section 4) the generators minimise

    E (D_B(G(a)) - 1)^2 + E (D_A(F(b)) - 1)^2
    + lambda (E |F(G(a)) - a| + E |G(F(b)) - b|)                            (eq. 2: cycle)
    + identity lambda (E |F(a) - a| + E |G(b) - b|)                         (section 5.2: identity)

The cycle term alone does not say which b belongs to an a: every bijection between the sets can have
loss 0. What the nets find easy decides. The identity term keeps colours where they are.

Each critic learns to tell real images from fakes. It sees a fake, or with probability 1/2 one of
the last 50, from a pool (section 4).

With `paired_weight` and aligned pairs, |G(a) - b| and |F(b) - a| are added: the L1 term of pix2pix
(Isola et al. 2017), whose critic also sees a. Here it does not.

Images are floats in [-1, 1] here. Points [B, d] are translated by MLPs.

    cfg = CycleConfig(gen_widths=(32, 64, 128), blocks=4, disc_widths=(64, 128))
    family = make_cycle(cfg)                                 # trained on data.pair(a, b)
    b_hat = translate(cfg, generators_of(cfg, state), a, to="b")
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from ..core import (
    EMA,
    Family,
    Optim,
    Optimizer,
    State,
    check_at_least,
    check_data,
    check_fields,
    descend,
    finish,
    floats,
    pixels,
    shard_rows,
    start,
)
from ..nn import MLP, ImageTranslator, PatchDiscriminator

Params = dict[str, Any]
Sample = Float[Array, "B ..."]  # images [B, H, W, C] in [-1, 1], or points [B, d]
Logits = Float[Array, "B ..."]  # of the patches of an image
ADAM = Optim(lr=2e-4, b1=0.5)


# -------------------------------------------------------------------------------------- the config


@dataclass(frozen=True)
class CycleConfig:
    """A CycleGAN: its data, nets, losses and optimizers.

    The defaults are those of the authors' PyTorch code for 256 x 256 images. There the rate is 2e-4
    for half of the training, and falls linearly to 0 in the other half: see `Optim.hold`. Their
    data are cropped at random and mirrored, which is left to the data here. Raises ValueError,
    which names the field and its value, for a model that cannot work.
    """

    shape: tuple[int, ...] = (256, 256, 3)  # of both sets: (H, W, C) of images, (d,) of points
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    gen_widths: tuple[int, ...] = (64, 128, 256)  # channels at H, H/2, H/4; points: hidden units
    blocks: int = 9  # residual blocks of a generator; of no use for points
    disc_widths: tuple[int, ...] = (64, 128, 256, 512)  # all but the last halve H and W
    cycle_weight: float = 10.0  # lambda
    identity_weight: float = 0.5  # times lambda, so 0 without a cycle term; 0: no identity term
    paired_weight: float = 0.0  # of |G(a) - b| and |F(b) - a|, for aligned pairs only
    pool: int = 50  # fakes of each set that are kept for the critics; 0: none
    bfloat16: bool = False  # activations in bfloat16; parameters and losses in float32
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] = False
    ema: float = 0.0  # decay of the average of the generators; 0: no average
    optim: Optimizer = ADAM  # of both generators
    disc_optim: Optimizer = ADAM  # of both critics

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 0, "blocks", "pool")
        check_at_least(self, 0, "cycle_weight", "identity_weight", "paired_weight")
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            got = self.shape
            raise ValueError(f"model.shape must be (H, W, C) or (d,), all positive, got {got}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"model.levels must lie in 2..256, got {self.levels}")
        EMA(self.ema)  # raises ValueError for a decay outside [0, 1)
        for name in ("gen_widths", "disc_widths"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1:
                raise ValueError(f"model.{name} must hold positive widths, got {widths}")
        if len(self.shape) == 3:
            _check_sizes(self)

    def check(self, info) -> None:
        """Raises ValueError if the data that `info` (a `data.Info`) describes does not fit."""
        if info.other is None:
            raise ValueError("CycleGAN needs two sets side by side: make them with data.pair")
        if tuple(info.other) != tuple(info.shape):
            sizes = f"the first has {tuple(info.shape)}, the other {tuple(info.other)}"
            raise ValueError(f"both sets must have examples of the same shape; {sizes}")
        check_data(self, info, pair=True)
        if self.paired_weight and not info.aligned:
            raise ValueError(
                f"model.paired_weight {self.paired_weight} needs aligned pairs, and these are not: "
                "make them with data.pair(..., aligned=True)"
            )


def _check_sizes(cfg: CycleConfig) -> None:
    """Raises ValueError for images that the nets halve too often."""
    sides, halvings = cfg.shape[:2], len(cfg.gen_widths) - 1
    if any(side % 2**halvings or side >> halvings < 2 or side < 4 for side in sides):
        raise ValueError(
            f"model.gen_widths {cfg.gen_widths} need sides of at least 4 pixels that can be halved "
            f"{halvings} times to at least 2, got shape {cfg.shape}"
        )
    halvings = len(cfg.disc_widths) - 1
    least = 3 * 2**halvings  # the last two layers take 2 pixels, an instance norm needs 2
    if min(sides) < least:
        raise ValueError(
            f"model.disc_widths {cfg.disc_widths} judge patches of images of {least} x {least} "
            f"pixels or more, got shape {cfg.shape}: take fewer widths"
        )


# ---------------------------------------------------------------------------------------- the nets


def _generator(cfg: CycleConfig):
    dtype = jnp.bfloat16 if cfg.bfloat16 else jnp.float32
    options = {"dtype": dtype, "remat": cfg.remat}
    if len(cfg.shape) == 1:
        return MLP(cfg.gen_widths, out=cfg.shape[0], **options)
    return ImageTranslator(cfg.shape[-1], cfg.gen_widths, cfg.blocks, **options)


def _critic(cfg: CycleConfig):
    dtype = jnp.bfloat16 if cfg.bfloat16 else jnp.float32
    if len(cfg.shape) == 1:
        return MLP(cfg.disc_widths, "leaky_relu", out=1, dtype=dtype, remat=cfg.remat)
    return PatchDiscriminator(cfg.disc_widths, dtype=dtype)


def _apply(net, params: Params, x):
    """Returns the net's output in float32, at least."""
    out = net.apply({"params": params}, jnp.asarray(floats("x", x)))
    return out.astype(jnp.promote_types(out.dtype, jnp.float32))


def translate(
    cfg: CycleConfig,
    params: Params,
    x: Shaped[Array | np.ndarray, "B ..."],
    to: str,
) -> Sample:
    """Returns G(x), for `to` "b", or F(x), for "a". params: `generators_of(cfg, state)`.

    x: images in [-1, 1], as `preprocess` makes them, or points.
    """
    _check_set("to", to)
    return _apply(_generator(cfg), params[to], x)


def _check_set(name: str, value: str) -> None:
    if value not in ("a", "b"):
        raise ValueError(f"{name} must be 'a' or 'b', got {value!r}")


def _ema(cfg: CycleConfig) -> EMA:
    """Returns the moving average of the generators. The critics have none."""
    return EMA(cfg.ema, of=lambda state: state.params["gen"])


def generators_of(cfg: CycleConfig, state: State) -> Params:
    """Returns what `translate` needs of a state: the average if there is one, else the last."""
    return _ema(cfg).read(state)


def judge(
    cfg: CycleConfig,
    params: Params,
    x: Shaped[Array | np.ndarray, "B ..."],
    of: str,
) -> Logits:
    """Returns the values of D_A or D_B: [B, h, w] of patches, [B, 1] of points. 1 means real.

    of: "a" or "b".
    params: `state.params["disc"]`.
    """
    _check_set("of", of)
    return _apply(_critic(cfg), params[of], x)


def preprocess(cfg: CycleConfig, batch: dict) -> tuple[Sample, Sample]:
    """Returns the examples of both sets: pixels as floats in [-1, 1], or points unchanged."""
    kind = "image" if len(cfg.shape) == 3 else "points"
    if missing := [name for name in (kind, "other") if name not in batch]:
        got = ", ".join(batch)
        raise ValueError(f"CycleGAN needs {missing[0]} in a batch (see data.pair), got {got}")
    if kind == "points":
        return jnp.asarray(batch["points"]), jnp.asarray(batch["other"])
    scale = 2 / (cfg.levels - 1)
    a, b = (pixels(batch[name], cfg.levels) * scale - 1 for name in ("image", "other"))
    return a, b


# ----------------------------------------------------------------------------------- the two losses


def _distance(x: Sample, y: Sample) -> Float[Array, "B"]:
    """Returns the mean over an example of |x - y|."""
    return jnp.abs(x - y).reshape(len(x), -1).mean(-1)


def _translate_all(cfg: CycleConfig, params: Params, xs: list[Sample], to) -> list[Sample]:
    """Returns the translation of each batch of xs, by one call of the net.

    Rows of the batches alternate, so that the devices of a mesh keep their own.
    """
    x = jnp.stack(xs, 1)
    out = translate(cfg, params, x.reshape(-1, *x.shape[2:]), to).reshape(x.shape)
    return [out[:, i] for i in range(len(xs))]


def generator_loss(cfg: CycleConfig, params: Params, state: State, batch, key):
    """The loss of both generators, and (extra, metrics), for `core.descend`.

    extra holds the new fakes too, {"a": ..., "b": ...}. `step` takes them out for the critics.
    """
    a, b = preprocess(cfg, batch)
    identity = cfg.identity_weight * cfg.cycle_weight
    fake_b, *same_b = _translate_all(cfg, params, [a, b] if identity else [a], "b")
    fake_a, *same_a = _translate_all(cfg, params, [b, a] if identity else [b], "a")
    disc = state.params["disc"]
    metrics = {
        "adversarial": sum(
            jnp.square(judge(cfg, disc, fake, of) - 1).mean()
            for fake, of in ((fake_a, "a"), (fake_b, "b"))
        ),
    }
    loss = metrics["adversarial"]
    if cfg.cycle_weight:
        back_a, back_b = translate(cfg, params, fake_b, "a"), translate(cfg, params, fake_a, "b")
        metrics["cycle"] = (_distance(back_a, a) + _distance(back_b, b)).mean()
        loss += cfg.cycle_weight * metrics["cycle"]
    if identity:
        metrics["identity"] = (_distance(same_a[0], a) + _distance(same_b[0], b)).mean()
        loss += identity * metrics["identity"]
    if cfg.paired_weight:
        metrics["paired"] = (_distance(fake_a, a) + _distance(fake_b, b)).mean()
        loss += cfg.paired_weight * metrics["paired"]
    extra = {**(state.extra or {}), "fakes": {"a": fake_a, "b": fake_b}}
    return loss, (extra, metrics)


def critic_loss(cfg: CycleConfig, params: Params, state: State, examples, key):
    """The loss of both critics, and (extra, metrics). examples: {"a": (real, fake), "b": ...}.

    It is halved (section 7.1). Under Adam, that hardly changes an update.
    """
    loss = 0.0
    for of, (real, fake) in examples.items():
        loss += 0.5 * jnp.square(judge(cfg, params, real, of) - 1).mean()
        loss += 0.5 * jnp.square(judge(cfg, params, fake, of)).mean()
    return loss, (state.extra, {})


# ----------------------------------------------------------------------------------------- the pool


def exchange(
    pool: Float[Array, "P ..."],
    held: Int[Array, ""],
    fakes: Sample,
    key: Key[Array, ""],
    *,
    axis_name: str | None = None,
) -> tuple[Sample, Float[Array, "P ..."], Int[Array, ""]]:
    """Returns what a critic sees in place of new fakes, the pool after it, and how many it holds.

    One after another: while the pool is not full, a fake is stored and seen. Later, with
    probability 1/2, an old fake is seen and the new one takes its place; else the new one is seen.
    axis_name: the per-device view. The pool takes the fakes of all devices, in their order.
    """
    size, rows = len(pool), len(fakes)
    k_swap, k_slot = jax.random.split(key)
    swap = jax.random.bernoulli(k_swap, 0.5, (rows,))
    slot = jax.random.randint(k_slot, (rows,), 0, size)
    drawn = (fakes, swap, slot)
    if axis_name is not None:
        drawn = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), drawn)

    def one(carry, each):
        pool, held = carry
        fake, swap, slot = each
        full = held == size
        slot = jnp.where(full, slot, held)
        old = pool[slot]
        pool = pool.at[slot].set(jnp.where(swap | ~full, fake, old))
        return (pool, jnp.minimum(held + 1, size)), jnp.where(swap & full, old, fake)

    (pool, held), seen = jax.lax.scan(one, (pool, held), drawn)
    if axis_name is None:
        return shard_rows(seen), pool, held
    first = jax.lax.axis_index(axis_name) * rows
    return jax.lax.dynamic_slice_in_dim(seen, first, rows), pool, held


def _seen(extra: dict, fakes: dict, key, axis_name) -> tuple[dict, dict]:
    """Returns the fakes that the critics see, and `extra` with the pools after it."""
    seen, pools, held = {}, {}, extra["held"]
    for of, k in zip(("a", "b"), jax.random.split(key), strict=True):
        options = {"axis_name": axis_name}
        seen[of], pools[of], held = exchange(extra[of], extra["held"], fakes[of], k, **options)
    return seen, {**pools, "held": held}


# --------------------------------------------------------------------- initialisation, step, scores


def init_state(cfg: CycleConfig, key: Key[Array, ""]) -> State:
    """Returns the state before step 0. Its extra holds the pools, empty; None without pools."""
    k_gen, k_disc = jax.random.split(key)
    x = jnp.zeros((1, *cfg.shape), jnp.float32)
    params = {
        name: {
            to: net.init(k, x)["params"]
            for to, k in zip(("a", "b"), jax.random.split(k_net), strict=True)
        }
        for name, net, k_net in (
            ("gen", _generator(cfg), k_gen),
            ("disc", _critic(cfg), k_disc),
        )
    }
    optims, extra = {"gen": cfg.optim, "disc": cfg.disc_optim}, None
    if cfg.pool:
        pools = {of: jnp.zeros((cfg.pool, *cfg.shape), jnp.float32) for of in ("a", "b")}
        extra = {**pools, "held": jnp.zeros((), jnp.int32)}
    return start(params, optims, extra=extra, ema=_ema(cfg))


def step(cfg: CycleConfig, state: State, batch, key, *, axis_name: str | None = None):
    """Updates both generators, then both critics on fakes from before that update."""
    k_gen, k_pool, k_disc = jax.random.split(key, 3)
    a, b = preprocess(cfg, batch)
    update = partial(descend, axis_name=axis_name)
    loss = partial(generator_loss, cfg)
    state, gen_metrics = update(loss, cfg.optim, state, batch, k_gen, net="gen")
    extra = {**state.extra}
    fakes = extra.pop("fakes")
    if cfg.pool:
        fakes, extra = _seen(extra, fakes, k_pool, axis_name)
    state = state._replace(extra=extra or None)
    examples = {"a": (a, fakes["a"]), "b": (b, fakes["b"])}
    loss = partial(critic_loss, cfg)
    state, disc_metrics = update(loss, cfg.disc_optim, state, examples, k_disc, net="disc")
    return finish(state, _ema(cfg)), {**disc_metrics, **gen_metrics}


def evaluate(cfg: CycleConfig, state: State, batch, key) -> dict[str, Float[Array, "B"]]:
    """Returns, per example, the distance after a cycle and how real its translation looks.

    cycle_a, cycle_b: mean |F(G(a)) - a| and |G(F(b)) - b|, of pixels in [0, 1] or of coordinates.
    fake_a, fake_b: the critics' mean values of F(b) and G(a). 1 means real.
    """
    a, b = preprocess(cfg, batch)
    gen, disc = generators_of(cfg, state), state.params["disc"]
    fake_b, fake_a = translate(cfg, gen, a, "b"), translate(cfg, gen, b, "a")
    unit = 2.0 if len(cfg.shape) == 3 else 1.0
    return {
        "cycle_a": _distance(translate(cfg, gen, fake_b, "a"), a) / unit,
        "cycle_b": _distance(translate(cfg, gen, fake_a, "b"), b) / unit,
        **{
            f"fake_{of}": judge(cfg, disc, fake, of).reshape(len(a), -1).mean(-1)
            for of, fake in (("a", fake_a), ("b", fake_b))
        },
    }


# --------------------------------------------------------------------------------------- the family


def make_cycle(cfg: CycleConfig, *, axis_name: str | None = None) -> Family:
    """Returns CycleGAN as a Family. Its params are {"gen": {"a", "b"}, "disc": {"a", "b"}}.

    step: one update of both generators, then one of both critics.
    evaluate: see `evaluate`.
    sample: None. The model translates images (`translate`), it draws none.
    axis_name: the axis of devices in the per-device view (pmap, vmap, shard_map).
    """
    return Family(
        init=partial(init_state, cfg),
        step=partial(step, cfg, axis_name=axis_name),
        evaluate=partial(evaluate, cfg),
        sample=None,
    )
