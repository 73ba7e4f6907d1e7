"""The contract's row for diffusion until the family is built: eps on points, a history of losses in extra."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from aigc_jax.core import EMA, Family, Optim, make_step, start

T = 10


@dataclass(frozen=True)
class Config:
    ema: float = 0.0
    micro: int = 1
    optim: Optim = Optim(lr=1e-3, clip=1.0, warmup=10)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        h = nn.Dense(16)(x_t) + nn.Embed(T, 16)(t)
        return nn.Dense(2)(nn.swish(h))


def make(cfg, *, axis_name=None):
    net, ema = Net(), EMA(cfg.ema)
    alpha_bar = jnp.cumprod(1 - jnp.linspace(0.05, 0.5, T))

    def init(key):
        params = net.init(key, jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32))
        return start(params, cfg.optim, extra={"history": jnp.zeros(T), "count": jnp.zeros(T, jnp.int32)}, ema=ema)

    def mse(params, x_0, key):
        k_t, k_eps = jax.random.split(key)
        t = jax.random.randint(k_t, (len(x_0),), 0, T)
        eps = jax.random.normal(k_eps, x_0.shape)
        a = alpha_bar[t][:, None]
        x_t = jnp.sqrt(a) * x_0 + jnp.sqrt(1 - a) * eps
        return t, jnp.square(net.apply(params, x_t, t) - eps).sum(-1)

    def loss(params, state, batch, key):
        t, each = mse(params, batch["points"], key)
        seen = jnp.zeros(T).at[t].add(each), jnp.zeros(T, jnp.int32).at[t].add(1)
        if axis_name is not None:  # extra is equal on every device: what is recorded is gathered
            seen = jax.lax.psum(seen, axis_name)
        history = jnp.where(seen[1] > 0, 0.9 * state.extra["history"] + 0.1 * seen[0], state.extra["history"])
        return each.mean(), ({"history": history, "count": state.extra["count"] + seen[1]}, {"mse": each.mean()})

    def evaluate(state, batch, key):
        return {"mse": mse(ema.read(state), batch["points"], key)[1]}

    def sample(state, key, *, n):
        def back(x_t, t):
            eps_hat = net.apply(ema.read(state), x_t, jnp.full(n, t))
            a, before = alpha_bar[t], jnp.where(t > 0, alpha_bar[t - 1], 1.0)
            x_0 = (x_t - jnp.sqrt(1 - a) * eps_hat) / jnp.sqrt(a)
            return jnp.sqrt(before) * x_0 + jnp.sqrt(1 - before) * eps_hat, None

        return jax.lax.scan(back, jax.random.normal(key, (n, 2)), jnp.arange(T - 1, -1, -1))[0]

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    rules = ((r"Dense_0.*kernel", P(None, "data")),)
    return Family(init, step, evaluate, sample, rules)
