"""The contract between the families and whatever trains them.

A family is four pure functions (`Family`) over a pytree of arrays (`State`). Nothing here
compiles, places, saves or prints. `jax.jit(family.step)` is the whole interface, and
`train.fit` one user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

PyTree = Any


class State(NamedTuple):
    """All arrays that the next step needs.

    `extra` holds what a model carries beside its parameters, equal on every device: BatchNorm
    statistics, a codebook, a history of losses. A model of several nets keeps
    `{"gen": ..., "disc": ...}` in params, opt_state and extra.
    """

    step: jax.Array  # int32 scalar: updates done so far
    params: PyTree
    opt_state: PyTree
    extra: PyTree = None
    ema: PyTree = None  # the average of what EMA.of picks; None: no average


class Family(NamedTuple):
    """A generative model as pure, un-jitted functions; `make(cfg)` of a family builds it.

    init(key) -> State
    step(state, batch, key) -> (State, metrics): scalars, among them the loss, the gradient norm
        before clipping and the learning rate
    evaluate(state, batch, key) -> {name: [B]}: one value per example
    sample(state, key, *, n, ...) -> [n, ...]: float32 in [0, 1] for images, data units for points,
        int32 tokens for text. None: the model draws nothing
    rules: ((regex searched in a State leaf's path, PartitionSpec), ...); the first match counts.
        What is still large is split over the axis data too (`train.engine.shardings_of`)
    """

    init: Callable
    step: Callable
    evaluate: Callable
    sample: Callable | None
    rules: tuple = ()


_NUMBERS = {bool: (bool, np.bool_), int: Integral, float: Real}  # of Python and of NumPy
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", type(None): "None"}
_hints = lru_cache(get_type_hints)  # of a class


def _fits(value, hint) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in args)
    if origin is tuple and isinstance(value, tuple | list):
        each = args[:1] * len(value) if args[-1:] == (...,) else args
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint in (int, float) and isinstance(value, bool):
        return False  # to Python it is an int
    return hint is Any or isinstance(value, _NUMBERS.get(hint, origin or hint))


def _in_words(hint) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        return ", or ".join(map(_in_words, args))
    if origin is tuple:
        count = "" if args[-1:] == (...,) else f" of {len(args)}"
        return f"a tuple{count}, each {_in_words(args[0])}"
    return _WORDS.get(hint) or f"of type {hint.__name__}"


def check_fields(cfg, *, name: str = "model") -> None:
    """Raises ValueError where a field of a dataclass does not hold what its annotation says.

    Numbers may be NumPy's. A list passes for a tuple, but a run folder refuses to record it.

    name: how messages call the dataclass.
    """
    for field, hint in _hints(type(cfg)).items():
        value = getattr(cfg, field)
        if not _fits(value, hint):
            raise ValueError(f"{name}.{field} must be {_in_words(hint)}, not {value!r:.60}")


def check_at_least(cfg, smallest: int, *fields: str, name: str = "model") -> None:
    """Raises ValueError where one of these fields is below `smallest`, or is NaN."""
    for field in fields:
        if not (value := getattr(cfg, field)) >= smallest:
            raise ValueError(f"{name}.{field} must be at least {smallest}, got {value}")


def check_data(cfg, info, *, pair: bool = False) -> None:
    """Raises ValueError where data do not have the shape, levels and classes of a Config.

    cfg: has the fields shape, (H, W, C) of images or (d,) of points, and levels, which is None
        where the examples are floats, such as latents. Labels are compared if it has `classes`.
    info: describes the data (`data.Info`).
    pair: the model takes pairs of sets (`data.pair`); any other one refuses them.
    """
    if info.other is not None and not pair:
        raise ValueError(
            "these data are a pair of sets, and this model takes one: give one of the two "
            "(gan.make_cycle takes pairs)"
        )
    shape, classes = tuple(cfg.shape), getattr(cfg, "classes", 0)
    is_image = len(shape) == 3 and cfg.levels is not None
    kind, plural = ("image", "images") if is_image else ("points", "points")
    if info.kind != kind:
        hint = ""
        if len(shape) == 3 and {kind, info.kind} == {"image", "points"}:
            hint = "; model.levels is None for latents, and the number of grey levels for images"
        holds = f"this data set holds {info.kind}"
        raise ValueError(f"model.shape {shape} is for {plural}, {holds}{hint}")
    if tuple(info.shape) != shape:
        raise ValueError(f"model.shape is {shape}, the {plural} are {tuple(info.shape)}")
    if kind == "image" and info.levels != cfg.levels:
        raise ValueError(f"model.levels is {cfg.levels}, the images have {info.levels} levels")
    if classes and info.classes is None:
        raise ValueError(f"model.classes is {classes}, but the {plural} have no labels")
    if classes and info.classes != classes:
        has = f"the {plural} have {info.classes} classes"
        raise ValueError(f"model.classes is {classes}, {has}")


def check_text(cfg, info) -> None:
    """Raises ValueError for data (a `data.Info`) that are no text or exceed cfg.vocab tokens."""
    if info.kind != "text":
        raise ValueError(f"this model trains on text, not on {info.kind}")
    if info.levels > cfg.vocab:
        raise ValueError(
            f"model.vocab is {cfg.vocab}, the tokenizer has {info.levels} tokens "
            "(data.info.levels): set model.vocab to at least that"
        )


def target_mask(batch: dict) -> jax.Array:
    """Returns the mask [B, T] of the targets tokens[:, 1:]: 1 where one counts, by default all."""
    if "mask" in batch:
        return jnp.asarray(batch["mask"])
    return jnp.ones_like(batch["tokens"][:, 1:], jnp.float32)


def _clip(norm: float):
    """Like optax.clip_by_global_norm, but differentiable where the whole gradient is 0."""

    def clipped(grads, params):
        square = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
        long = square >= norm**2
        length = jnp.sqrt(jnp.where(long, square, 1.0))
        return jax.tree.map(lambda g: jnp.where(long, g / length.astype(g.dtype) * norm, g), grads)

    return optax.stateless(clipped)


def _momentum(o):
    if o.momentum_end is None:
        return optax.trace(o.momentum) if o.momentum else optax.identity()
    rise = optax.linear_schedule(o.momentum, o.momentum_end, o.momentum_steps)

    def update(grads, state, params=None, *, step=None, **_):
        if step is None:
            raise ValueError(
                "optim.momentum_end needs the step of the update: pass step=state.step"
            )
        trace = jax.tree.map(lambda g, t: g + rise(step).astype(t.dtype) * t, grads, state.trace)
        return trace, optax.TraceState(trace)

    return optax.GradientTransformationExtraArgs(optax.trace(0.0).init, update)


def _scaled(o, first, accumulate):
    """Returns grad / (sqrt(v + eps_root) + eps) with v = accumulate(v, grad^2), as torch does."""

    def update(grads, state, params=None):
        v = jax.tree.map(lambda v, g: accumulate(v, jnp.square(g)), state[0], grads)
        return jax.tree.map(lambda g, v: g / (jnp.sqrt(v + o.eps_root) + o.eps), grads, v), type(
            state
        )(v)

    return optax.GradientTransformation(first.init, update)


_DIRECTIONS = {
    "sgd": _momentum,
    "adam": lambda o: optax.scale_by_adam(o.b1, o.b2, o.eps, o.eps_root),
    "rmsprop": lambda o: _scaled(
        o, optax.scale_by_rms(), lambda v, square: o.b2 * v + (1 - o.b2) * square
    ),
    "adagrad": lambda o: _scaled(o, optax.scale_by_rss(0.0), lambda v, square: v + square),
}
_CURVES = {
    "cosine": lambda lr, n, floor: optax.cosine_decay_schedule(lr, n, floor),
    "linear": lambda lr, n, floor: optax.linear_schedule(lr, floor * lr, n),
    "exponential": lambda lr, n, floor: optax.exponential_decay(lr, n, floor, end_value=floor * lr),
}


@dataclass(frozen=True)
class Optim:
    """An optimizer as data. Any object with `chain()` and `rate(step)` can replace it."""

    name: Literal["sgd", "adam", "rmsprop", "adagrad"] = "adam"
    lr: float = 1e-3  # peak learning rate
    b1: float = 0.9  # adam: decay of the first moment
    b2: float = 0.999  # adam, rmsprop: decay of the second moment
    eps: float = 1e-8  # adam, rmsprop, adagrad: added to the root of the second moment, as in torch
    momentum: float = 0.0  # sgd
    momentum_end: float | None = None  # sgd: the end of a linear change over momentum_steps
    momentum_steps: int = 0  # counted by State.step
    eps_root: float = 0.0  # added inside the square root: a derivative through the update needs it
    weight_decay: float = 0.0  # decoupled (AdamW), on leaves named kernel or embedding only
    clip: float = 0.0  # largest global norm of the gradient; 0: none
    warmup: int = 0  # steps of linear rise from 0 to lr
    hold: int | None = None  # steps at lr between the warm-up and the decay; None: none
    decay: int = 0  # steps from there to the floor; 0: constant
    curve: Literal["cosine", "linear", "exponential"] = "cosine"
    floor: float = 0.0  # the last rate divided by lr

    def __post_init__(self):
        check_fields(self, name="optim")
        check_at_least(self, 0, "lr", "eps", "eps_root", "weight_decay", "clip", name="optim")
        check_at_least(self, 0, "warmup", "decay", "momentum_steps", name="optim")
        if self.hold is not None and (self.hold < 0 or not self.decay):
            got = f"hold {self.hold} and decay {self.decay}"
            raise ValueError(f"optim.hold must be at least 0 and needs optim.decay, got {got}")
        for field in ("b1", "b2", "momentum", "momentum_end"):
            if not 0 <= (getattr(self, field) or 0) < 1:
                raise ValueError(f"optim.{field} must lie in [0, 1), got {getattr(self, field)}")
        if (self.momentum_end is None) != (self.momentum_steps == 0):
            got = f"got {self.momentum_end} and {self.momentum_steps}"
            raise ValueError(f"set both optim.momentum_end and optim.momentum_steps, {got}")
        if self.name != "sgd" and not self.eps + self.eps_root:
            raise ValueError(
                f"optim.eps is {self.eps}, as is eps_root: without a gradient the update would "
                "be 0 / 0"
            )
        if not 0 <= self.floor <= 1 or (
            self.curve == "exponential" and self.decay and not self.floor
        ):
            raise ValueError(
                "optim.floor must lie in [0, 1], above 0 for an exponential decay, got "
                f"{self.floor}"
            )

    def chain(self) -> optax.GradientTransformation:
        """The transformation: clip, direction, weight decay. `descend` multiplies it by `rate`."""

        def decays(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: getattr(path[-1], "key", None) in ("kernel", "embedding"), params
            )

        return optax.chain(
            _clip(self.clip) if self.clip else optax.identity(),
            _DIRECTIONS[self.name](self),
            optax.add_decayed_weights(self.weight_decay, decays)
            if self.weight_decay
            else optax.identity(),
        )

    def rate(self, step: ArrayLike) -> jax.Array:
        """The learning rate at `State.step`."""
        after = (
            _CURVES[self.curve](self.lr, self.decay, self.floor)
            if self.decay
            else lambda _: self.lr
        )
        if self.hold:
            after = optax.join_schedules([lambda _: self.lr, after], [self.hold])
        if self.warmup:
            after = optax.join_schedules(
                [optax.linear_schedule(0.0, self.lr, self.warmup), after], [self.warmup]
            )
        return jnp.asarray(after(step), jnp.float32)


# What a Config's `optim` may be: an Optim, a chain of optax, or an object with `chain()`
# and `rate(step)`. No type names all three, so it is Any. run.json and the command line
# read the Optim.
Optimizer = Annotated[Any, Optim]


def _has_rate(optim) -> bool:
    return hasattr(optim, "chain") and hasattr(optim, "rate")


def is_optimizer(optim) -> bool:
    """Whether this is an Optim, a chain of optax, or an object with `chain()` and `rate(step)`."""
    return not isinstance(optim, type) and (
        _has_rate(optim) or (hasattr(optim, "init") and hasattr(optim, "update"))
    )


def transformation(optim) -> optax.GradientTransformation:
    """The optax transformation of an optimizer; raises ValueError for anything else.

    A chain of optax holds its learning rate and counts its own updates. So a critic's
    schedule runs n_critic times as fast as that of an `Optim`, which is read at
    `State.step`.
    """
    if not is_optimizer(optim):
        known = "an Optim, a chain of optax or an object with chain() and rate(step)"
        raise ValueError(f"optim must be {known}, got {optim!r:.60}")
    return optim.chain() if _has_rate(optim) else optim


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of what `of` picks from a State.

    `of` picks parameters and the statistics that belong to them. It must not pick a history
    of losses or an image pool, whose average means nothing.

    Update t (State.step, from 0) has decay min(decay, (1 + t) / (10 + t)), the warm-up of
    TensorFlow and diffusers. So the average of a short run forgets the first parameters.
    DDPM's code copies the parameters at first and then uses a constant 0.9999.
    """

    decay: float = 0.0  # its largest value; 0: no average
    of: Callable[[State], PyTree] = lambda state: state.params

    def __post_init__(self):
        check_fields(self, name="ema")
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.decay}")

    def read(self, state: State) -> PyTree:
        """The average if there is one, else the values themselves; for sampling and evaluation."""
        return state.ema if self.decay else self.of(state)


def start(params: PyTree, optim, *, extra: PyTree = None, ema: EMA = EMA()) -> State:
    """The State before step 0. `optim` is one optimizer, or `{net: optim}`."""
    if isinstance(optim, dict):
        opt_state = {net: transformation(o).init(params[net]) for net, o in optim.items()}
    else:
        opt_state = transformation(optim).init(params)
    state = State(jnp.zeros((), jnp.int32), params, opt_state, extra)
    if not ema.decay:
        return state
    # A copy, because a buffer under two names cannot be donated.
    return state._replace(ema=jax.tree.map(lambda x: jnp.array(x, copy=True), ema.of(state)))


def labels(
    label, classes: int, leading: tuple[int, ...], *, in_turn: bool = False
) -> jax.Array | None:
    """Returns classes 0..classes-1 as int32 [*leading]; None for a model without classes.

    label: one class for all, or an array whose shape is the last axes of `leading`.
    in_turn: None means the classes 0, 1, 2 ... in turn.

    Raises ValueError for a missing or unwanted label, a wrong shape or type, and a class
    out of range. A traced class out of range cannot raise: it becomes -1, from which
    `one_hot` and ddpm.predict make NaN, and `train.fit` stops.
    """
    if in_turn and label is None and classes:
        label = np.arange(leading[-1]) % classes
    if (label is None) != (classes == 0):
        needs = f"a conditional model needs label=, a class in 0..{classes - 1} for each example"
        raise ValueError(needs if label is None else "model.classes is 0: it takes no labels")
    if label is None:
        return None
    label = _whole("label", label, classes, "")
    if label.shape != leading[max(0, len(leading) - label.ndim) :]:
        samples = " x ".join(map(str, leading))
        raise ValueError(
            f"label must be one class or have one entry for each of {samples} samples, got "
            f"{label.shape}"
        )
    if isinstance(label, jax.core.Tracer):
        label = label.astype(jnp.promote_types(label.dtype, jnp.int32))  # where classes is no int8
        label = jnp.where((label >= 0) & (label < classes), label.astype(jnp.int32), -1)
    return jnp.broadcast_to(jnp.asarray(label).astype(jnp.int32), leading)


def one_hot(label, classes: int, leading: tuple[int, ...]) -> jax.Array:
    """`labels` as float32 [*leading, classes]; a traced class out of range gives NaN."""
    label = labels(label, classes, leading)
    if label is None:
        return jnp.zeros((*leading, 0), jnp.float32)
    return jnp.where(
        label[..., None] < 0, jnp.nan, jax.nn.one_hot(label, classes, dtype=jnp.float32)
    )


def pixels(image, levels: int) -> jax.Array:
    """Returns a batch's whole-number pixels 0..levels-1 as float32.

    Raises ValueError for another type and, unless traced, for a level out of range.
    """
    hint = ": batches hold levels (uint8), floats go to the functions that take images, "
    hint += "such as encode or elbo"
    return jnp.asarray(_whole("image", image, levels, hint)).astype(jnp.float32)


def floats(name: str, x, *, within: tuple[int, int] | None = None):
    """Returns x unchanged, for functions that take images as a net sees them.

    Raises ValueError for whole-number pixels and, unless traced, for values outside `within`.
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        interval = "" if within is None else f" in [{within[0]}, {within[1]}]"
        raise ValueError(
            f"{name} must be floats{interval} here, got {dtype}: `preprocess` takes whole-number "
            "pixels"
        )
    if within is not None and np.size(x) and not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)
        if (
            known.min() < within[0] - 0.01 or known.max() > within[1] + 0.01
        ):  # bfloat16 rounds to two digits
            got = f"{known.min():.5g}..{known.max():.5g}"
            raise ValueError(
                f"{name} must lie in [{within[0]}, {within[1]}], got {got}: see `preprocess`"
            )
    return x


def _whole(name: str, x, count: int, hint: str):
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be whole numbers in 0..{count - 1}, got {x.dtype}{hint}")
    if x.size and not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)  # not jnp's minimum, which a surrounding jit would trace
        if known.min() < 0 or known.max() >= count:
            raise ValueError(f"{name} must lie in 0..{count - 1}, got {known.min()}..{known.max()}")
    return x


def step_key(key: jax.Array, step: ArrayLike, axis_name: str | None = None) -> jax.Array:
    """The key of one step, a function of its number: a resumed run draws the same noise.

    With `axis_name` (the per-device view) every device has its own key.
    """
    key = jax.random.fold_in(key, step)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def shard_rows(x: PyTree) -> PyTree:
    """Shards arrays that the model creates (such as noise) over the devices, like the batch.

    Otherwise every device of a mesh would create all rows. Without a mesh, and in the
    per-device view, this returns x.
    """
    if "data" not in jax.sharding.get_abstract_mesh().auto_axes:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec("data"))


spread = shard_rows  # its former name


def _part(batch: PyTree, n: int, i) -> PyTree:
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % n:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide into {n} equal parts")
    # The new axis goes behind the rows, so that each device splits its own rows.
    # As [n, B/n] the batch would be gathered, and every device would do all the work.
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(
            x.reshape(x.shape[0] // n, n, *x.shape[1:]), i, axis=1, keepdims=False
        ),
        batch,
    )


def parts(batch: PyTree, n: int) -> list[PyTree]:
    """Splits a batch into n equal ones; part i holds the rows i, i + n, i + 2n ...

    Raises ValueError if rows are left over.
    """
    return [_part(batch, n, i) for i in range(n)]


def descend(
    loss: Callable,
    optim,
    state: State,
    batch: PyTree,
    key: jax.Array,
    *,
    net: str | None = None,
    micro: int = 1,
    axis_name: str | None = None,
) -> tuple[State, dict]:
    """Updates `params` (or `params[net]`), its opt_state and `extra`; never step or ema.

    loss: `loss(params, state, batch, key) -> (scalar, (extra, metrics))` returns the whole new
        `extra`. The state that it gets has None in place of the parameters under training:
        read there, they would have no gradient. A loss that averages over a varying number
        of things, such as tokens, reports this number as `metrics["weight"]`. Parts and
        devices are then averaged by it, and the update equals that of the whole batch.
    optim: an `Optimizer`. A chain of optax gives params + updates, and reports no learning rate.
    micro: the batch is split into this many parts, one after another, to save memory. Part i gets
        `fold_in(key, i)` and the `extra` of the part before it. Gradients and metrics are means.
    axis_name: the per-device view. Gradients and metrics are means over the devices.

    Returns the new State and the metrics of the loss, with `loss, grad_norm, lr`
    (`<net>_loss ...` for a named net).
    """

    def pick(tree):
        return tree if net is None else tree[net]

    def put(tree, value):
        return value if net is None else {**tree, net: value}

    params = pick(state.params)
    hidden = state._replace(params=put(state.params, None))
    extra, weight, means = _gradient(loss, params, hidden, batch, key, micro)
    if axis_name is not None:
        part = _share(weight, jax.lax.pmean(weight, axis_name))
        means = jax.lax.pmean(jax.tree.map(lambda x: x * part, means), axis_name)
    grads, value, metrics = means
    own = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    chain = optax.with_extra_args_support(transformation(optim))
    direction, opt_state = chain.update(
        grads, pick(state.opt_state), params, value=value, step=state.step
    )
    if _has_rate(optim):
        lr = own["lr"] = optim.rate(state.step)
        params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), params, direction)
    else:
        params = optax.apply_updates(params, direction)

    new = state._replace(
        params=put(state.params, params), opt_state=put(state.opt_state, opt_state), extra=extra
    )
    named = {name if net is None else f"{net}_{name}": x for name, x in own.items()}
    return new, {**metrics, **named}


def _share(weight, total):
    return weight / jnp.where(total > 0, total, 1.0)  # total 0: no gradient, not NaN


def _gradient(loss: Callable, params, state: State, batch, key, micro: int) -> tuple:
    """(extra, weight, (gradients, loss, metrics)) of a batch: means over its `micro` parts."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def weighted(extra, batch, key):
        (value, (extra, metrics)), grads = gradient(params, state._replace(extra=extra), batch, key)
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        rest = {name: x for name, x in metrics.items() if name != "weight"}
        return extra, weight, (grads, value, rest)

    if micro == 1:
        return weighted(state.extra, batch, key)

    def add_part(carry, i):
        extra, total, sums = carry
        extra, weight, means = weighted(extra, _part(batch, micro, i), jax.random.fold_in(key, i))
        sums = jax.tree.map(lambda a, x: a + weight * x, sums, means)
        return (extra, total + weight, sums), None

    shapes = jax.eval_shape(weighted, state.extra, _part(batch, micro, 0), key)[2]
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.result_type(s.dtype, jnp.float32)), shapes
    )
    start = (state.extra, jnp.float32(0), zeros)
    (extra, weight, sums), _ = jax.lax.scan(add_part, start, jnp.arange(micro))  # saves memory
    return extra, weight, jax.tree.map(lambda x: x * _share(1.0, weight), sums)


def finish(state: State, ema: EMA) -> State:
    """Ends a step, once for all of its updates: moves the average and counts the step."""
    if ema.decay:
        weight = jnp.maximum(1 - ema.decay, 9 / (10 + state.step))
        moved = jax.tree.map(
            lambda a, x: a + weight.astype(a.dtype) * (x - a), state.ema, ema.of(state)
        )
        state = state._replace(ema=moved)
    return state._replace(step=state.step + 1)


def make_step(
    loss: Callable, optim, *, ema: EMA = EMA(), micro: int = 1, axis_name: str | None = None
) -> Callable:
    """Returns the step of a model with one loss: `descend`, then `finish`."""

    def step(state, batch, key):
        state, metrics = descend(loss, optim, state, batch, key, micro=micro, axis_name=axis_name)
        return finish(state, ema), metrics

    return step
