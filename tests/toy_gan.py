"""The contract's row for GANs until the family is built: WGAN-GP on points, BatchNorm in the generator, n_critic."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from aigc_jax.core import EMA, Family, Optim, descend, finish, parts, spread, start


@dataclass(frozen=True)
class Config:
    n_critic: int = 2
    ema: float = 0.0
    micro: int = 1
    optim: Optim = Optim(lr=1e-3, b1=0.5)
    critic: Optim = Optim(lr=1e-3, b1=0.5)


class Generator(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z, train):
        h = nn.Dense(16)(z)
        h = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name if train else None)(h)
        return nn.Dense(2)(nn.relu(h))


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(16)(x)))[..., 0]


def make(cfg, *, axis_name=None):
    gen, critic = Generator(axis_name), Critic()
    optims = {"gen": cfg.optim, "disc": cfg.critic}
    ema = EMA(cfg.ema, of=lambda state: {"params": state.params["gen"], "batch_stats": state.extra["gen"]})

    def init(key):
        k_gen, k_disc = jax.random.split(key)
        variables = Generator().init(k_gen, jnp.zeros((1, 2)), True)
        params = {"gen": variables["params"], "disc": critic.init(k_disc, jnp.zeros((1, 2)))["params"]}
        return start(params, optims, extra={"gen": variables["batch_stats"], "disc": {}}, ema=ema)

    def fake(params, stats, key, n):
        variables = {"params": params, "batch_stats": stats}
        return gen.apply(variables, spread(jax.random.normal(key, (n, 2))), True, mutable=["batch_stats"])

    def disc_loss(params, state, batch, key):
        k_z, k_mix = jax.random.split(key)
        real = batch["points"]
        fakes, _ = fake(state.params["gen"], state.extra["gen"], k_z, len(real))
        mixed = real + jax.random.uniform(k_mix, (len(real), 1)) * (fakes - real)
        slope = jax.vmap(jax.grad(lambda x: critic.apply({"params": params}, x)))(mixed)
        penalty = jnp.square(jnp.sqrt(jnp.sum(jnp.square(slope), -1) + 1e-12) - 1).mean()
        gap = critic.apply({"params": params}, fakes).mean() - critic.apply({"params": params}, real).mean()
        return gap + 10 * penalty, (state.extra, {"gap": gap})

    def gen_loss(params, state, batch, key):
        fakes, new = fake(params, state.extra["gen"], key, len(batch["points"]))
        score = critic.apply({"params": state.params["disc"]}, fakes).mean()
        return -score, ({**state.extra, "gen": new["batch_stats"]}, {})

    def step(state, batch, key):
        k_disc, k_gen = jax.random.split(key)
        shared = {"axis_name": axis_name, "micro": cfg.micro}
        for i, part in enumerate(parts(batch, cfg.n_critic)):
            k_i = jax.random.fold_in(k_disc, i)
            state, seen = descend(disc_loss, cfg.critic, state, part, k_i, net="disc", **shared)
        state, metrics = descend(gen_loss, cfg.optim, state, part, k_gen, net="gen", **shared)
        return finish(state, ema), seen | metrics

    def evaluate(state, batch, key):
        return {"score": critic.apply({"params": state.params["disc"]}, batch["points"])}

    def sample(state, key, *, n):
        return gen.apply(ema.read(state), jax.random.normal(key, (n, 2)), False)

    return Family(init, step, evaluate, sample)
