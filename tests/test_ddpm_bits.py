"""The binomial process against enumeration: few bits, every sequence counted."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import ddpm
from aigc_jax.core import Optim
from aigc_jax.ddpm import binomial

RATE, T = 0.2, 12
SCHEDULE = ddpm.cosine_schedule(T)
WORDS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
SHARES = np.array([0.3, 0.05, 0.0, 0.1, 0.15, 0.2, 0.05, 0.15])  # of WORDS


def key(i):
    return jax.random.key(i)


def kernel(alpha, dim=3):
    """P(y | x) for all words, each bit kept with probability alpha and else drawn from B(RATE)."""
    one = np.array(
        [
            [alpha + (1 - alpha) * (1 - RATE), (1 - alpha) * RATE],
            [(1 - alpha) * (1 - RATE), alpha + (1 - alpha) * RATE],
        ]
    )
    whole = np.ones((1, 1))
    for _ in range(dim):
        whole = np.kron(whole, one)
    return whole


def exact_logits(x_t, t):
    """Of P(x_0^i = 1 | x_t), by Bayes' rule over all words."""
    alpha = np.asarray(SCHEDULE.alpha_bar)
    tables = []
    for a in alpha:
        joint = SHARES[:, None] * kernel(a)
        p = (joint[:, :, None] * WORDS[:, None]).sum(0) / joint.sum(0)[:, None]
        tables.append(np.log(p) - np.log1p(-p))
    index = (x_t @ jnp.array([4.0, 2.0, 1.0])).astype(int)
    return jnp.asarray(np.array(tables), jnp.float32)[t, index]


def test_the_process_is_its_steps_and_the_posterior_bayes_rule():
    x_0, whole = jnp.array([[0.0], [1.0]]), np.eye(2)
    for t in range(T):
        earlier = whole
        step = kernel(1 - SCHEDULE.beta[t], 1)
        whole = earlier @ step
        got = binomial.q_marginal(SCHEDULE, x_0, jnp.full(2, t), RATE)[:, 0]
        np.testing.assert_allclose(got, [whole[0, 1], whole[1, 1]], rtol=1e-5)
        for a, b in itertools.product((0, 1), repeat=2):
            joint = earlier[a] * step[:, b]  # P(x_{t-1}, x_t = b | x_0 = a)
            bits = (jnp.full((1, 1), float(bit)) for bit in (a, b))
            got = binomial.q_posterior(SCHEDULE, *bits, jnp.array([t]), RATE)
            np.testing.assert_allclose(got[0, 0], joint[1] / joint.sum(), atol=1e-6)


def test_a_path_that_is_no_probability_is_refused():
    straight, bits = ddpm.straight_schedule(T), jnp.zeros((2, 3))
    for call in (
        lambda: binomial.vlb(straight, lambda x, t: x, bits, key(0), rate=RATE),
        lambda: binomial.sample(straight, lambda x, t: x, bits, key(0), rate=RATE),
    ):
        with pytest.raises(ValueError, match="bits need a schedule that preserves variance"):
            call()


def test_the_bound_of_one_bit_is_its_entropy():
    """With the exact denoiser of a single bit the reversed chain is the true one: only the end of the noise costs."""
    share = 0.3
    prob = np.array([1 - share, share])
    tables = []
    for a in SCHEDULE.alpha_bar:
        joint = prob[:, None] * kernel(a, 1)
        p = joint[1] / joint.sum(0)
        tables.append(np.log(p) - np.log1p(-p))
    tables = jnp.asarray(np.array(tables), jnp.float32)

    def logits_fn(x_t, t):
        return tables[t, x_t[:, 0].astype(int)][:, None]

    x_0 = (jax.random.uniform(key(0), (40_000, 1)) < share).astype(jnp.float32)
    got = jax.jit(lambda x, k: binomial.vlb(SCHEDULE, logits_fn, x, k, rate=RATE))(x_0, key(1))
    entropy = -(prob * np.log(prob)).sum()
    last = prob @ kernel(SCHEDULE.alpha_bar[-1], 1)
    due = entropy + (last * np.log(last / np.array([1 - RATE, RATE]))).sum()
    assert abs(got.mean() - due) < 4 * got.std() / 200 and got.std() / 200 < 0.01


@pytest.mark.slow
def test_no_bound_lies_below_the_entropy_and_the_exact_net_is_best():
    x_0 = jnp.asarray(WORDS[np.random.default_rng(0).choice(8, 20_000, p=SHARES)], jnp.float32)
    found = {}
    for name, logits_fn in (
        ("exact", exact_logits),
        ("blunt", lambda x, t: 0.5 * exact_logits(x, t)),
        ("ignorant", lambda x, t: jnp.zeros_like(x)),
    ):
        got = jax.jit(lambda x, k, f=logits_fn: binomial.vlb(SCHEDULE, f, x, k, rate=RATE))(
            x_0, key(1)
        )
        found[name] = float(got.mean()), float(got.std()) / 20_000**0.5
    held = SHARES > 0
    entropy = -(SHARES[held] * np.log(SHARES[held])).sum()
    assert (
        entropy - 3 * found["exact"][1]
        < found["exact"][0]
        < found["blunt"][0]
        < found["ignorant"][0]
    )


def test_samples_have_the_distribution_of_the_data():
    x_T = jax.random.bernoulli(key(0), RATE, (20_000, 3)).astype(jnp.float32)
    fine = ddpm.cosine_schedule(T)
    x = np.asarray(
        jax.jit(lambda x, k: binomial.sample(fine, exact_logits, x, k, rate=RATE))(x_T, key(1))
    )
    got = np.bincount((x @ [4, 2, 1]).astype(int), minlength=8) / len(x)
    # Bits of one step are drawn apart, so that twelve steps come near the shares and not to them.
    assert np.abs(got - SHARES).sum() < 0.25 and np.abs(x.mean(0) - SHARES @ WORDS).max() < 0.02


@pytest.mark.slow
def test_a_heartbeat_is_learnt():
    """One 1 in every five bits, at a random phase: after a short training most samples are such sequences."""
    cfg = ddpm.DiscreteConfig(
        dim=10,
        T=30,
        net=ddpm.NetConfig("mlp", (64, 64), dropout=0.0),
        optim=Optim(lr=5e-3),
        ema=0.9,
    )
    family = ddpm.make_discrete(cfg)
    beats = np.array(
        [[float((i + phase) % 5 == 0) for i in range(10)] for phase in range(5)], np.float32
    )
    rng, state, step = np.random.default_rng(0), jax.jit(family.init)(key(0)), jax.jit(family.step)
    for i in range(800):
        state, metrics = step(state, {"points": beats[rng.integers(0, 5, 256)]}, key(i))
    x = np.asarray(jax.jit(lambda s, k: family.sample(s, k, n=500))(state, key(1)))
    valid = (x[:, None] == beats[None]).all(-1)
    assert valid.any(1).mean() > 0.7 and valid.any(0).all()
    bound = jax.jit(family.evaluate)(state, {"points": np.tile(beats, (60, 1))}, key(2))["nll_nats"]
    assert math.log(5) - 3 * bound.std() / 300**0.5 < bound.mean() < 1.6 * math.log(5)
    few = ddpm.make_discrete(dataclasses.replace(cfg, terms=6))
    several = [
        float(
            jax.jit(few.evaluate)(state, {"points": np.tile(beats, (60, 1))}, key(i))[
                "nll_nats"
            ].mean()
        )
        for i in range(20)
    ]
    assert abs(np.mean(several) - bound.mean()) < 5 * (
        np.std(several) / 20**0.5 + bound.std() / 300**0.5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rate": 1.0}, "model.rate must lie between 0 and 1, got 1.0"),
        ({"dim": 0}, "model.dim must be at least 1, got 0"),
        ({"net": ddpm.NetConfig()}, "model.net.kind must be mlp for bits, not 'unet'"),
    ],
)
def test_bad_values_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ddpm.DiscreteConfig(**change)
