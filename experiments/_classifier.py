"""A small classifier as a family, for the metrics that need one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from aigc_jax import metrics, train
from aigc_jax.core import EMA, Family, Optim, make_step, start


@dataclass(frozen=True)
class Config:
    """A classifier and how its images are moved in training."""

    shape: tuple[int, int, int] = (28, 28, 1)
    levels: int = 256
    classes: int = 10
    channels: tuple[int, ...] = (16, 32, 48, 32)  # see metrics.Classifier
    width: int = 64  # features
    shift: int = 2  # most pixels by which an image moves along each axis; 0 comes in
    mirror: bool = False  # half of the images are mirrored, left to right
    ema: float = 0.999
    optim: Optim = Optim()

    def check(self, info) -> None:
        """Raises ValueError for data that do not fit the model."""
        if (info.shape, info.levels, info.classes) != (self.shape, self.levels, self.classes):
            raise ValueError(
                f"model has shape {self.shape}, {self.levels} levels, {self.classes} classes, "
                f"the data {info.shape}, {info.levels}, {info.classes}"
            )


def moved(images, key, *, shift: int, mirror: bool):
    """Returns each image [H, W, C] shifted by its own whole numbers of pixels, and mirrored or not."""
    k_shift, k_mirror = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    corners = jax.random.randint(k_shift, (len(images), 2), 0, 2 * shift + 1)
    size = images.shape[1:]
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), size))
    images = cut(padded, corners)
    flip = jax.random.bernoulli(k_mirror, 0.5 * mirror, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def make(cfg: Config, *, axis_name=None) -> Family:
    """Returns the classifier as a family; `evaluate` gives nats and the error, 0 or 1."""
    net, ema = metrics.Classifier(cfg.channels, cfg.width, cfg.classes), EMA(cfg.ema)

    def cross_entropy(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def init(key):
        return start(net.init(key, jnp.zeros((1, *cfg.shape))), cfg.optim, ema=ema)

    def loss(params, state, batch, key):
        images = moved(batch["image"] / (cfg.levels - 1.0), key, shift=cfg.shift, mirror=cfg.mirror)
        return cross_entropy(net.apply(params, images)[0], batch).mean(), (state.extra, {})

    def evaluate(state, batch, key):
        logits, _ = net.apply(ema.read(state), batch["image"] / (cfg.levels - 1.0))
        error = (logits.argmax(-1) != batch["label"]) * 1.0
        return {"nll_nats": cross_entropy(logits, batch), "error": error}

    def sample(state, key, *, n):
        raise train.Refused("a classifier makes no samples")

    return Family(init, make_step(loss, cfg.optim, ema=ema, axis_name=axis_name), evaluate, sample)
