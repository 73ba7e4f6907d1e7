"""GANs against closed forms, brute force and exact optima."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import core, data, gan, train
from aigc_jax.core import Optim

# A sum of a function of the real logit and one of the fake logit; "relativistic" is none.
SEPARATE = ("minimax", "non_saturating", "least_squares", "wasserstein", "hinge")
LOSSES = (*SEPARATE, "relativistic")
SGD, STILL = Optim("sgd", lr=0.05), Optim("sgd", lr=0.0)
DIGITS = data.load("digits")
# Both nets linear: what one update does can be written down.
LINEAR = gan.Config(
    shape=(2,),
    latent_dim=2,
    gen=gan.NetConfig(widths=()),
    disc=gan.NetConfig(widths=()),
    optim=SGD,
    disc_optim=SGD,
)
SMALL = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=4,
    gen=gan.NetConfig(widths=(16,), norm="batch"),
    disc=gan.NetConfig(widths=(12,), activation="leaky_relu", norm="batch"),
)


def key(i):
    return jax.random.key(i)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b):
    return all((x == y).all() for x, y in zip(leaves(a), leaves(b), strict=True))


# -------------------------------------------------------------------------------------------------- losses, penalties


def test_losses_are_their_definitions():
    r, f = np.random.default_rng(0).normal(size=(2, 50)) * 3
    d_r, d_f = 1 / (1 + np.exp(-r)), 1 / (1 + np.exp(-f))
    expected = {
        "minimax": (-np.log(d_r) - np.log(1 - d_f), np.log(1 - d_f)),
        "non_saturating": (-np.log(d_r) - np.log(1 - d_f), -np.log(d_f)),
        "least_squares": (((r - 1) ** 2 + f**2) / 2, (f - 1) ** 2 / 2),
        "wasserstein": (f - r, -f),
        "hinge": (np.maximum(0, 1 - r) + np.maximum(0, 1 + f), -f),
        "relativistic": (np.log1p(np.exp(f - r)), np.log1p(np.exp(r - f))),
    }
    assert set(expected) == set(LOSSES)
    for name, (disc, gen) in expected.items():
        np.testing.assert_allclose(
            gan.discriminator_loss(name, jnp.float32(r), jnp.float32(f)), disc, atol=1e-5
        )
        got = gan.generator_loss(name, jnp.float32(f), jnp.float32(r))
        np.testing.assert_allclose(got, gen, atol=1e-5)
    with pytest.raises(ValueError, match="needs real_logits"):
        gan.generator_loss("relativistic", jnp.zeros(3))


def test_losses_survive_large_logits():
    far = jnp.array([-1e4, 1e4])
    for name in LOSSES:
        slopes = jax.grad(lambda f, name=name: gan.generator_loss(name, f, -far).sum())(far)
        assert (
            np.isfinite(slopes).all() and np.isfinite(gan.discriminator_loss(name, far, -far)).all()
        )
    # Where D is sure of a fake, the first loss of the paper has no slope left and the second all of it.
    assert jax.grad(lambda f: gan.generator_loss("minimax", f).sum())(far)[0] == 0
    assert jax.grad(lambda f: gan.generator_loss("non_saturating", f).sum())(far)[0] == -1


def test_the_best_discriminator_gives_the_jensen_shannon_divergence():
    """GAN, proposition 1 and theorem 1: D* = p / (p + q), and its loss is log 4 - 2 JSD(p, q)."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(7), size=2)

    def expected(name, logits):
        loss = [
            gan.discriminator_loss(name, logits, jnp.full(7, f)) for f in np.float32(logits)
        ]  # [fake, real]
        return jnp.einsum("fr,f,r->", jnp.stack(loss), jnp.float32(q), jnp.float32(p))

    m = (p + q) / 2
    jsd = (p * np.log(p / m) + q * np.log(q / m)).sum() / 2
    best = jnp.float32(np.log(p / q))
    np.testing.assert_allclose(expected("minimax", best), np.log(4) - 2 * jsd, atol=1e-5)

    def separate(
        name, logits
    ):  # the same, differentiable: the loss is a sum of a real and a fake part
        zero = jnp.zeros(7)
        real = gan.discriminator_loss(name, logits, zero) - gan.discriminator_loss(name, zero, zero)
        fake = gan.discriminator_loss(name, zero, logits)
        return (jnp.float32(p) * real + jnp.float32(q) * fake).sum()

    np.testing.assert_allclose(jax.grad(lambda r: separate("minimax", r))(best), 0, atol=1e-6)
    # Least squares has the same decision p / (p + q), as its value (Mao et al. 2017, eq. 5 with a = 0, b = 1).
    np.testing.assert_allclose(
        jax.grad(lambda r: separate("least_squares", r))(jnp.float32(p / (p + q))), 0, atol=1e-6
    )


def test_penalties_of_a_linear_critic_are_known():
    w = jax.random.normal(key(0), (5, 4, 3))
    norm = float(jnp.sqrt((w**2).sum()))

    def critic(x):
        return jnp.einsum("bhwc,hwc->b", x, w)

    real, fake = jax.random.normal(key(1), (2, 6, 5, 4, 3))
    np.testing.assert_allclose(
        gan.gradient_penalty(critic, real, fake, key(2)), (norm - 1) ** 2, rtol=1e-5
    )
    np.testing.assert_allclose(gan.r1_penalty(critic, real), norm**2, rtol=1e-5)


def test_penalty_is_taken_between_the_samples_and_one_by_one():
    """The slope of |x|^2 / 2 is x itself, so the penalty says where it was taken: uniformly on each line."""
    n = 4000
    real, fake = jnp.zeros((n, 2)), jnp.tile(jnp.array([[3.0, 4.0]]), (n, 1))
    penalty = gan.gradient_penalty(lambda x: (x**2).sum(-1) / 2, real, fake, key(0))
    # Along the line |x| = 5 t with t uniform: E (5 t - 1)^2 = 25/3 - 5 + 1.
    error = float(penalty.std()) / n**0.5
    assert abs(float(penalty.mean()) - (25 / 3 - 4)) < 4 * error
    assert len(np.unique(np.asarray(penalty))) > n // 2
    np.testing.assert_allclose(gan.r1_penalty(lambda x: (x**2).sum(-1) / 2, fake), 25.0, rtol=1e-6)


def test_penalty_of_a_flat_critic_has_a_slope():
    """At slope 0 the square root has none: the penalty is 1 and its derivative 0, never NaN."""
    x = jax.random.normal(key(0), (4, 3))

    def penalty(a):
        return gan.gradient_penalty(lambda x: a * (x**2).sum(-1), x, -x, key(1)).mean()

    assert penalty(0.0) == 1 and jax.grad(penalty)(0.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "best"), [("gp", 1 + 0.8 / 10), ("r1", 0.8 / 5)])
def test_wasserstein_critic_reaches_its_exact_optimum(kind, best):
    """Real points at 0, fake ones at distance a: of all linear critics -w.x the best under lambda (|w| - 1)^2 has
    |w| = 1 + a / (2 lambda), under gamma/2 |w|^2 it has a / gamma, and the step finds it."""
    a, weight = 0.8, 5.0
    cfg = replace(LINEAR, loss="wasserstein", penalty=kind, penalty_weight=weight, optim=STILL)
    family = gan.make(cfg)
    state = jax.jit(family.init)(key(0))
    fixed = jax.tree.map(jnp.zeros_like, state.params["gen"])
    fixed["Dense_0"]["bias"] = jnp.array([a, 0.0])
    state = state._replace(params={**state.params, "gen": fixed})
    step = jax.jit(family.step)
    for i in range(300):
        state, metrics = step(
            state, {"points": np.zeros((8, 2), np.float32)}, core.step_key(key(1), i)
        )
    slope = np.asarray(state.params["disc"]["Dense_0"]["kernel"])[:, 0]
    np.testing.assert_allclose(slope, [-best, 0], atol=1e-4)
    np.testing.assert_allclose(metrics["real_logit"] - metrics["fake_logit"], a * best, rtol=1e-3)


@pytest.mark.slow
def test_micro_batches_of_both_nets_are_averaged():
    """A generator without noise: two halves of the batch, one after another, give the step of the whole."""
    batch = {"points": np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)}
    ends = []
    for micro in (1, 2):
        family = gan.make(replace(LINEAR, micro=micro))
        state = jax.jit(family.init)(key(0))
        fixed = jax.tree.map(jnp.zeros_like, state.params["gen"])
        state = state._replace(params={**state.params, "gen": fixed})
        params = jax.jit(family.step)(state, batch, key(1))[0].params
        ends.append([*params["disc"]["Dense_0"].values(), params["gen"]["Dense_0"]["bias"]])
    before = [*state.params["disc"]["Dense_0"].values(), jnp.zeros(2)]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(ends[0], before, strict=True))
    for whole, halves in zip(*ends, strict=True):
        np.testing.assert_allclose(halves, whole, atol=1e-6)


def test_penalties_begin_with_the_weights_of_their_papers():
    for kind, weight in (("gp", 10.0), ("r1", 10.0), ("clip", 0.01)):
        assert gan.Config(loss="wasserstein", penalty=kind).weight == weight
    assert gan.Config(loss="wasserstein", penalty="clip", penalty_weight=0.1).weight == 0.1


# ------------------------------------------------------------------------------------------------------------ updates


@pytest.mark.slow
def test_each_update_leaves_the_other_net_alone():
    for still, moving in (("gen", "disc"), ("disc", "gen")):
        optims = {"gen": SMALL.optim, "disc": SMALL.disc_optim, still: STILL}
        family = gan.make(replace(SMALL, optim=optims["gen"], disc_optim=optims["disc"]))
        state = jax.jit(family.init)(key(0))
        new, _ = jax.jit(family.step)(state, DIGITS.batch(0, 0, 16), key(1))
        assert same(new.params[still], state.params[still])
        assert not same(new.params[moving], state.params[moving])


@pytest.mark.slow
def test_no_gradient_reaches_the_other_optimizer():
    """The moments of each Adam depend on its own net's loss alone: G's loss scaled by 0 changes nothing in D's."""
    batch = DIGITS.batch(0, 0, 16)
    state = jax.jit(gan.make(SMALL).init)(key(0))
    steep, flat = (
        jax.jit(gan.make(replace(SMALL, loss=loss)).step)(state, batch, key(1))[0]
        for loss in ("non_saturating", "minimax")  # D's loss is the same, G's is not
    )
    assert same(steep.params["disc"], flat.params["disc"])
    assert same(steep.opt_state["disc"], flat.opt_state["disc"])
    assert same(steep.extra["disc"], flat.extra["disc"])
    assert not same(steep.opt_state["gen"], flat.opt_state["gen"])


@pytest.mark.slow
@pytest.mark.parametrize("unrolled", [0, 2])
def test_a_simultaneous_step_updates_both_nets_from_the_parameters_before_it(unrolled):
    """G moves as if D rested, D as if G rested."""
    disc = gan.NetConfig(widths=(12,), activation="leaky_relu")
    adam = Optim(lr=2e-4, b1=0.5, eps_root=1e-12)
    cfg = replace(SMALL, disc=disc, disc_optim=adam, simultaneous=True)
    cfg = replace(cfg, unrolled=unrolled)
    state = jax.jit(gan.make(cfg).init)(key(0))

    def after(cfg):
        family, given = gan.make(cfg), state
        if cfg.disc_optim == STILL:
            opt_state = {**state.opt_state, "disc": family.init(key(0)).opt_state["disc"]}
            given = state._replace(opt_state=opt_state)
        return jax.jit(family.step)(given, DIGITS.batch(0, 0, 16), key(1))[0]

    both, in_turn = after(cfg), after(replace(cfg, simultaneous=None))
    assert int(both.step) == 1
    for tree in ("params", "opt_state", "extra"):
        assert same(getattr(both, tree)["disc"], getattr(in_turn, tree)["disc"])
    assert not same(both.params["gen"], in_turn.params["gen"])
    if not unrolled:
        d_rests = after(replace(cfg, disc_optim=STILL, simultaneous=None))
        for tree in ("params", "opt_state", "extra"):
            assert same(getattr(both, tree)["gen"], getattr(d_rests, tree)["gen"])


@pytest.mark.slow
def test_statistics_of_the_discriminator_come_from_real_then_fake():
    """One update with all weights held still, G a constant grey: the running mean is .9 (.9 0 + .1 real) + .1 fake."""
    disc = gan.NetConfig(widths=(12, 12), activation="leaky_relu", norm="batch")
    cfg = replace(SMALL, gen=gan.NetConfig(widths=()), disc=disc, optim=STILL, disc_optim=STILL)
    family = gan.make(cfg)
    state = jax.jit(family.init)(key(0))
    grey = jax.tree.map(jnp.zeros_like, state.params["gen"])
    batch = DIGITS.batch(0, 0, 16)
    new, _ = jax.jit(family.step)(
        state._replace(params={**state.params, "gen": grey}), batch, key(1)
    )

    layers = state.params["disc"]["_MLP_0"]

    def mean(pixels):
        h = pixels.reshape(16, 64) @ np.asarray(layers["Dense_0"]["kernel"])
        return (np.where(h > 0, h, 0.2 * h) @ np.asarray(layers["Dense_1"]["kernel"])).mean(0)

    expected = 0.09 * mean(batch["image"] / 16) + 0.1 * mean(np.full((16, 64), 0.5))
    [running] = [
        x for p, x in jax.tree_util.tree_leaves_with_path(new.extra["disc"]) if "mean" in str(p)
    ]
    np.testing.assert_allclose(
        running, expected, atol=1e-5
    )  # G's update saw D too, and left no trace


@pytest.mark.slow
def test_critic_updates_take_the_parts_of_the_batch_in_turn():
    cfg = replace(LINEAR, n_critic=3, disc_optim=STILL, loss="hinge")
    family = gan.make(cfg)
    state = jax.jit(family.init)(key(0))
    x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    _, metrics = jax.jit(family.step)(state, {"points": x}, key(1))
    variables = {"params": state.params["disc"], "batch_stats": {}}
    np.testing.assert_allclose(
        metrics["real_logit"],
        gan.discriminate(cfg, variables, jnp.asarray(x[2::3])).mean(),
        rtol=1e-5,
    )


def adam(lr, b1=0.5, b2=0.9, eps=1e-8, root=1e-6):
    return Optim(lr=lr, b1=b1, b2=b2, eps=eps, eps_root=root)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# Of D's loss of a real and of a fake logit, and of G's loss: the value and the slope, in float64.
SOFTPLUS = (lambda f: np.logaddexp(0, f), sigmoid)
MINUS = (lambda r: np.logaddexp(0, -r), lambda r: -sigmoid(-r))
WRITTEN = {
    "minimax": (MINUS, SOFTPLUS, lambda f: -np.logaddexp(0, f)),
    "non_saturating": (MINUS, SOFTPLUS, lambda f: np.logaddexp(0, -f)),
    "least_squares": (
        (lambda r: (r - 1) ** 2 / 2, lambda r: r - 1),
        (lambda f: f**2 / 2, lambda f: f),
        lambda f: (f - 1) ** 2 / 2,
    ),
    "wasserstein": (
        (lambda r: -r, lambda r: 0 * r - 1),
        (lambda f: f, lambda f: 0 * f + 1),
        lambda f: -f,
    ),
    "hinge": (
        (lambda r: np.maximum(0, 1 - r), lambda r: -1.0 * (r < 1)),
        (lambda f: np.maximum(0, 1 + f), lambda f: 1.0 * (f > -1)),
        lambda f: -f,
    ),
}
assert set(WRITTEN) == set(SEPARATE)


class Written:
    """D's updates on a linear logit w.x + v, fakes all at c, gamma / 2 |w|^2 its penalty: float64 numpy, on its own."""

    def __init__(self, loss, optim, packing=1, gamma=0.0):
        (self.real, self.fake, self.gen), self.o, self.p, self.gamma = (
            WRITTEN[loss],
            optim,
            packing,
            gamma,
        )
        self.m = self.s = np.zeros(2 * packing + 1)
        self.t = 0

    def logits(self, theta, x, c):
        packed = x.reshape(-1, 2 * self.p), np.tile(c, (len(x) // self.p, self.p))
        return [np.column_stack([a, np.ones(len(a))]) for a in packed], [
            a @ theta[:-1] + theta[-1] for a in packed
        ]

    def loss(self, theta, x, c):
        _, (r, f) = self.logits(theta, x, c)
        return (
            self.real[0](r).mean()
            + self.fake[0](f).mean()
            + self.gamma / 2 * (theta[:-1] ** 2).sum()
        )

    def update(self, theta, x, c):
        (x, c), (r, f) = self.logits(theta, x, c)
        g = (self.real[1](r)[:, None] * x + self.fake[1](f)[:, None] * c).mean(0)
        g[:-1] += self.gamma * theta[:-1]
        if self.o.name == "sgd":
            return theta - self.o.lr * g
        self.t += 1
        self.m = self.o.b1 * self.m + (1 - self.o.b1) * g
        self.s = self.o.b2 * self.s + (1 - self.o.b2) * g**2
        m, s = self.m / (1 - self.o.b1**self.t), self.s / (1 - self.o.b2**self.t)
        return theta - self.o.lr * m / (np.sqrt(s + self.o.eps_root) + self.o.eps)


def at_a_point(cfg, c):
    """A family and a state whose G puts all its mass at its bias c; its SGD of rate 1 shows the gradient."""
    family = gan.make(replace(cfg, optim=Optim("sgd", lr=1.0)))
    state = jax.jit(family.init)(key(3))
    fixed = jax.tree.map(jnp.zeros_like, state.params["gen"])
    fixed["Dense_0"]["bias"] = jnp.float32(c)
    return family, state._replace(params={**state.params, "gen": fixed})


def theta_of(state):
    layer = state.params["disc"]["Dense_0"]
    return np.concatenate(
        [np.asarray(layer["kernel"], np.float64)[:, 0], np.asarray(layer["bias"], np.float64)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, unrolled, optim, packing, n_critic",
    [
        *((loss, 2, adam(0.1), 1, 1) for loss in SEPARATE),
        *((loss, 1, Optim("sgd", lr=0.3), 1, 1) for loss in SEPARATE),
        ("non_saturating", 0, adam(0.1), 1, 1),
        ("minimax", 0, Optim("sgd", lr=0.3), 1, 1),
        ("minimax", 3, adam(0.1), 2, 2),
        ("least_squares", 2, Optim("sgd", lr=0.3), 4, 3),
    ],
)
def test_unrolled_gradient_is_the_whole_derivative(loss, unrolled, optim, packing, n_critic):
    """d/dc of minus D's whole loss at (theta_K(c), c), by finite differences of the written updates."""
    penalty = {"penalty": "r1", "penalty_weight": 0.7} if loss == "wasserstein" else {}
    cfg = replace(
        LINEAR,
        loss=loss,
        unrolled=unrolled,
        disc_optim=optim,
        packing=packing,
        n_critic=n_critic,
        **penalty,
    )
    c = np.array([0.4, -0.7])
    family, state = at_a_point(cfg, c)
    x = np.float32(np.random.default_rng(5).normal(size=(16 * n_critic, 2)) + 1).astype(np.float64)
    new, _ = jax.jit(family.step)(state, {"points": np.float32(x)}, key(1))
    got = c - np.asarray(new.params["gen"]["Dense_0"]["bias"], np.float64)
    parts = [x[i::n_critic] for i in range(n_critic)]

    def objective(at, ahead=unrolled):
        written = Written(loss, optim, packing, 0.7 if penalty else 0.0)
        theta = theta_of(state)
        for part in parts:  # the updates of D itself: G's loss does not look through them
            theta = written.update(theta, part, c)
        own = theta
        for _ in range(ahead):
            theta = written.update(theta, parts[-1], at)
        whole = -written.loss(theta, parts[-1], at)
        return own, whole if ahead else written.gen(
            written.logits(theta, parts[-1], at)[1][1]
        ).mean()

    h = 1e-5 * np.eye(2)
    expected = [(objective(c + d)[1] - objective(c - d)[1]) / 2e-5 for d in h]
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=3e-5)
    # Only the surrogate looked ahead: D itself made n_critic updates.
    np.testing.assert_allclose(theta_of(new), objective(c)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, penalty",
    [
        ("minimax", "none"),
        *((loss, "none") for loss in SEPARATE if loss not in ("minimax", "wasserstein")),
        ("wasserstein", "gp"),
        ("hinge", "r1"),
    ],
)
def test_the_unrolled_generator_rests_on_the_data(loss, penalty):
    """G = data, D undecided: nothing that G could do to D in its next updates makes G move."""
    cfg = replace(
        LINEAR, loss=loss, unrolled=2, penalty=penalty, disc_optim=Optim("sgd", lr=0.3, clip=1.0)
    )
    c = np.array([0.4, -0.7])
    family, state = at_a_point(cfg, c)
    even = jax.tree.map(jnp.zeros_like, state.params["disc"])
    even["Dense_0"]["bias"] += 0.5 if loss == "least_squares" else 0.0
    state = state._replace(params={**state.params, "disc": even})
    new, metrics = jax.jit(family.step)(state, {"points": np.tile(np.float32(c), (8, 1))}, key(1))
    np.testing.assert_allclose(new.params["gen"]["Dense_0"]["bias"], c, atol=1e-6)
    np.testing.assert_allclose(metrics["gen_loss"], -metrics["disc_loss"], rtol=1e-6)


@pytest.mark.slow
def test_clipping_bounds_every_weight_of_the_critic_only():
    cfg = replace(SMALL, loss="wasserstein", penalty="clip", penalty_weight=0.01)
    family = gan.make(cfg)
    new, _ = jax.jit(family.step)(jax.jit(family.init)(key(0)), DIGITS.batch(0, 0, 16), key(1))
    assert max(np.abs(w).max() for w in leaves(new.params["disc"])) == np.float32(0.01)
    assert max(np.abs(w).max() for w in leaves(new.params["gen"])) > 0.1


# ---------------------------------------------------------------------------------------------------------- the nets


@pytest.mark.slow
def test_maxout_and_the_first_discriminator_by_hand():
    """Both maxout layers and the sigmoid's logit of GAN's D, in numpy, on pixels taken back to [0, 1]."""
    cfg = gan.Config(
        shape=(4, 4, 1),
        latent_dim=3,
        disc=gan.NetConfig(widths=(6, 5), activation="maxout", pieces=3),
    )
    params = jax.jit(gan.make(cfg).init)(key(0)).params["disc"]
    x = jax.random.uniform(key(1), (7, 4, 4, 1), minval=-1, maxval=1)
    h = (np.asarray(x).reshape(7, 16) + 1) / 2
    for i, width in enumerate((6, 5)):
        layer = params["_MLP_0"][f"Dense_{i}"]
        pieces = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        h = np.max([pieces[:, p * width : (p + 1) * width] for p in range(3)], 0)
    logits = h @ np.asarray(params["Dense_0"]["kernel"])[:, 0] + np.asarray(
        params["Dense_0"]["bias"]
    )
    got = gan.discriminate(cfg, {"params": params}, x)
    np.testing.assert_allclose(got, logits, atol=1e-5)


@pytest.mark.slow
def test_dropout_keeps_the_mean_of_a_linear_net_and_rests_outside_training():
    cfg = replace(
        LINEAR,
        disc=gan.NetConfig(widths=(), dropout=(0.2, 0.5)),
        loss="wasserstein",
        penalty="clip",
        penalty_weight=1e6,
        disc_optim=STILL,
    )
    family = gan.make(cfg)
    state = jax.jit(family.init)(key(0))
    x = np.full((20_000, 2), 1.0, np.float32)
    _, metrics = jax.jit(family.step)(state, {"points": x}, key(1))
    w = np.asarray(state.params["disc"]["Dense_0"]["kernel"])[:, 0]
    # Each input is kept with .8 and scaled by 1.25: mean w_1 + w_2, variance .25 |w|^2.
    error = 0.5 * np.sqrt((w**2).sum() / len(x))
    assert abs(float(metrics["real_logit"]) - w.sum()) < 4 * error
    assert float(metrics["real_logit"]) != pytest.approx(w.sum(), abs=1e-7)
    values = family.evaluate(state, {"points": jnp.asarray(x[:4])}, key(2))
    np.testing.assert_allclose(values["real_logit"], w.sum(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "dcgan", "resnet"])
def test_spectral_norm_makes_every_layer_no_steeper_than_one(kind):
    """Held still, the power iteration converges to the singular values that numpy finds."""
    disc = gan.NetConfig(kind, (6,), "leaky_relu", norm="spectral")
    cfg = replace(
        SMALL, disc=disc, disc_optim=STILL, optim=STILL, classes=10, condition="projection"
    )
    family = gan.make(cfg)
    state = jax.jit(family.init)(key(0))
    step = jax.jit(family.step)
    for i in range(40):
        state, _ = step(state, DIGITS.batch(0, i, 8), core.step_key(key(1), i))
    kernels = {
        jax.tree_util.keystr(p): np.asarray(w)
        for p, w in jax.tree_util.tree_leaves_with_path(state.params["disc"])
        if "kernel" in jax.tree_util.keystr(p)
    }
    sigmas = sorted(
        float(s)
        for p, s in jax.tree_util.tree_leaves_with_path(state.extra["disc"])
        if "sigma" in jax.tree_util.keystr(p)
    )
    exact = sorted(
        np.linalg.svd(w.reshape(-1, w.shape[-1]), compute_uv=False)[0] for w in kernels.values()
    )
    np.testing.assert_allclose(sigmas, exact, rtol=0.02)
    assert len(sigmas) == len(kernels) >= 3


def test_spectral_norm_of_one_linear_layer_is_slope_one():
    cfg = replace(LINEAR, disc=gan.NetConfig(widths=(), norm="spectral"))
    state = jax.jit(gan.make(cfg).init)(key(0))
    variables = {"params": state.params["disc"], "batch_stats": state.extra["disc"]}
    slope = jax.grad(lambda x: gan.discriminate(cfg, variables, x[None])[0])(jnp.array([0.3, 2.0]))
    np.testing.assert_allclose(jnp.sqrt((slope**2).sum()), 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["concat", "projection"])
@pytest.mark.parametrize("kind", ["mlp", "dcgan", "resnet"])
def test_both_nets_listen_to_the_label(kind, condition):
    nets = {
        "gen": gan.NetConfig(kind, (4, 4), norm="batch"),
        "disc": gan.NetConfig(kind, (4, 4), "leaky_relu"),
    }
    cfg = replace(SMALL, classes=10, condition=condition, **nets)
    state = jax.jit(gan.make(cfg).init)(key(0))
    gen = {"params": state.params["gen"], "batch_stats": state.extra["gen"]}
    z = gan.noise(cfg, key(1), 3)
    a, b = jnp.array([1, 2, 3]), jnp.array([1, 5, 3])
    generate, discriminate = (jax.jit(partial(f, cfg)) for f in (gan.generate, gan.discriminate))
    x, other = generate(gen, z, a), generate(gen, z, b)
    assert x.shape == (3, 8, 8, 1) and np.abs(np.asarray(x)).max() <= 1
    assert same(x[::2], other[::2]) and not same(x[1], other[1])
    disc = {"params": state.params["disc"]}
    logits, others = (discriminate(disc, x, label) for label in (a, b))
    assert same(logits[::2], others[::2]) and logits[1] != others[1]
    with pytest.raises(ValueError, match="needs label="):
        gan.generate(cfg, gen, z)


def test_projection_is_an_inner_product_with_the_label():
    """logit(y) - logit(y') = <V_y - V_y', phi(x)>, phi the last features."""
    cfg = replace(
        SMALL,
        classes=10,
        condition="projection",
        disc=gan.NetConfig(widths=(5,), activation="tanh"),
    )
    params = jax.jit(gan.make(cfg).init)(key(0)).params["disc"]
    x = jax.random.uniform(key(1), (3, 8, 8, 1))
    one, two = (gan.discriminate(cfg, {"params": params}, x, jnp.full(3, y)) for y in (2, 7))
    layer = params["_MLP_0"]["Dense_0"]
    phi = np.tanh(
        (np.asarray(x).reshape(3, -1) + 1) / 2 @ np.asarray(layer["kernel"])
        + np.asarray(layer["bias"])
    )
    v = np.asarray(params["Dense_1"]["kernel"])
    np.testing.assert_allclose(one - two, phi @ (v[2] - v[7]), atol=1e-5)


@pytest.mark.slow
def test_packed_discriminator_judges_neighbours_together():
    cfg = replace(SMALL, packing=3, disc=gan.NetConfig("dcgan", (4,), "leaky_relu"), classes=10)
    params = jax.jit(gan.make(cfg).init)(key(0)).params["disc"]
    x = jax.random.uniform(key(1), (6, 8, 8, 1), minval=-1)
    y = jax.nn.one_hot(jnp.arange(6), 10)
    judge = jax.jit(lambda x, y: gan.Discriminator(cfg.disc).apply({"params": params}, x, y, False))
    got = jax.jit(partial(gan.discriminate, cfg))({"params": params}, x, jnp.arange(6))
    for i in range(6):
        rows = [(i + j) % 6 for j in range(3)]
        stacked = jnp.concatenate([x[r] for r in rows], -1)[None]
        alone = judge(stacked, jnp.concatenate([y[r] for r in rows])[None])
        np.testing.assert_allclose(got[i], alone[0], atol=1e-5)
    # In training the groups are rows 0..2 and 3..5.
    packed = gan._pack(cfg, x)
    np.testing.assert_array_equal(packed[1], jnp.concatenate([x[3], x[4], x[5]], -1))
    points = jax.random.normal(key(2), (6, 2))
    np.testing.assert_array_equal(gan._pack(cfg, points)[0], points[:3].reshape(-1))


@pytest.mark.slow
def test_batch_norm_of_a_packed_generator_sees_one_sample_of_each_pack():
    """The i-th samples of all packs are normalised together; statistics are the mean over i."""
    cfg = replace(SMALL, packing=2, disc=gan.NetConfig(widths=(12,)))
    state = jax.jit(gan.make(cfg).init)(key(0))
    params, stats = state.params["gen"], state.extra["gen"]
    y = jnp.zeros((6, 0))
    x, new = gan._fake_examples(cfg, params, stats, y, key(1), None)
    z = gan.noise(cfg, jax.random.split(key(1))[0], 6)
    whole = gan._nets(cfg)["gen"]
    halves = [
        whole.apply(state_of(params, stats), z[i::2], y[:3], True, mutable=["batch_stats"])
        for i in (0, 1)
    ]
    for i, (part, _) in enumerate(halves):
        np.testing.assert_allclose(x[i::2], part, atol=1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(found["batch_stats"] for _, found in halves))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), new, mean)
    together, _ = gan._apply(cfg, "gen", params, stats, z, y, key(2), None)
    assert not np.allclose(x, together, atol=1e-3)


def state_of(params, stats):
    return {"params": params, "batch_stats": stats}


def test_the_first_biases_are_the_mean_picture():
    """GAN's code starts the last layer at the logits of the mean pixels: without noise G draws the mean image."""
    mean = np.random.default_rng(0).uniform(0.05, 0.95, 64)
    bias = tuple(float(b) for b in np.log(mean / (1 - mean)))
    cfg = replace(SMALL, output_bias=bias, gen=gan.NetConfig(widths=()))
    params = jax.tree.map(
        lambda w: w if w.ndim == 1 else 0 * w, jax.jit(gan.make(cfg).init)(key(0)).params["gen"]
    )
    x = gan.generate(cfg, {"params": params}, jnp.zeros((1, 4)))
    np.testing.assert_allclose((x.reshape(-1) + 1) / 2, mean, atol=1e-5)


def test_uniform_noise_is_the_unit_cube():
    z = np.asarray(gan.noise(replace(LINEAR, latent="unit_uniform"), key(0), 5000))
    assert -(3**0.5) <= z.min() < -1.7 and 1.7 < z.max() <= 3**0.5
    np.testing.assert_allclose(z.var(), 1, atol=0.03)
    z = np.asarray(gan.noise(replace(LINEAR, latent="uniform"), key(0), 5000))
    assert 0 <= z.min() < 0.01 and 0.99 < z.max() < 1
    assert abs(gan.noise(LINEAR, key(0), 5000).std() - 1) < 0.05


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"penalty": "gp"},
            "penalty 'gp' needs .*disc.norm 'batch' makes a logit depend on the whole batch",
        ),
        ({"penalty": "r1"}, "penalty 'r1'"),
        ({"n_critic": 0}, "n_critic must be at least 1, got 0"),
        ({"packing": 0}, "packing must be at least 1"),
        ({"simultaneous": True, "n_critic": 2}, "one update of each net, but model.n_critic is 2"),
        ({"unrolled": 2}, "disc_optim.eps_root"),
        (
            {"unrolled": 2, "disc_optim": Optim("rmsprop")},
            "D's rmsprop, whose square root has no derivative at 0",
        ),
        (
            {"gen": gan.NetConfig("dcgan", (4, 4, 4, 4))},
            r"model.gen.widths .* halve H and W 4 times",
        ),
        ({"gen": gan.NetConfig(norm="spectral")}, "gen.norm 'spectral' is for the discriminator"),
        (
            {"disc": gan.NetConfig("dcgan", (4,), "maxout")},
            "model.disc: maxout and dropout are for kind mlp",
        ),
        ({"disc": gan.NetConfig(dropout=(0.2, 1.0))}, "model.disc.dropout must be two shares"),
        ({"output_bias": (0.0,) * 3}, "output_bias needs gen.kind mlp and 64 values, got 3"),
        ({"shape": (8, 8)}, r"model.shape must be \(H, W, C\) or \(d,\)"),
        ({"penalty_weight": 0.0}, "penalty_weight must be positive"),
        (
            {"loss": "wasserstein"},
            "'wasserstein' needs a Lipschitz constraint on the critic: set penalty",
        ),
        (
            {
                "loss": "wasserstein",
                "disc": gan.NetConfig("dcgan", (4,), norm="spectral", attention=4),
            },
            "disc.norm to spectral without disc.attention",
        ),
        (
            {"disc": gan.NetConfig("dcgan", (4, 4, 4), norm="instance")},
            "norm 'instance' makes maps of one pixel 0: use fewer than 3 widths",
        ),
        ({"condition": "projection"}, "'projection' needs classes"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "run", "source", "words"),
    [
        (
            {"packing": 3},
            {},
            DIGITS,
            "16 does not divide by 1 devices x 1 micro-batches x 1 n_critic x 3 packing",
        ),
        ({"n_critic": 5}, {}, DIGITS, "x 5 n_critic x 1 packing"),
        (
            {"classes": 10},
            {},
            data.from_arrays({"image": np.zeros((9, 8, 8, 1), np.uint8)}, levels=17),
            "no labels",
        ),
        ({"classes": 7}, {}, DIGITS, "model.classes is 7, the images have 10 classes"),
        ({"levels": 256}, {}, DIGITS, "model.levels is 256, the images have 17"),
        ({"packing": 2}, {}, data.pair(DIGITS, DIGITS), "these data are a pair of sets"),
        (
            {},
            {},
            data.load("ring"),
            r"model.shape \(8, 8, 1\) is for images, this data set holds points",
        ),
        (
            {"shape": (16, 16, 1)},
            {},
            DIGITS,
            r"model.shape is \(16, 16, 1\), the images are \(8, 8, 1\)",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused_before_anything_compiles(
    change, run, source, words, monkeypatch
):
    monkeypatch.setattr(
        train.engine.Engine, "__init__", lambda *_: pytest.fail("it went on to compile")
    )
    with pytest.raises(train.Refused, match=words):
        train.fit(
            gan.make, replace(SMALL, **change), train.Run(batch_size=16, devices=1, **run), source
        )


@pytest.mark.slow
def test_divergence_names_the_nets_and_the_step():
    """D explodes; G's gradient through it overflows first, so the message shows D's numbers beside it."""
    cfg = replace(LINEAR, loss="least_squares", disc_optim=Optim("sgd", lr=1e3), optim=STILL)
    with pytest.raises(train.NonFinite) as e:
        train.fit(gan.make, cfg, train.Run(steps=50, batch_size=8, log_every=1), data.load("ring"))
    said = re.match(
        r"step \d+: gen_grad_norm = inf, disc_loss = (\S+), .*disc_grad_norm = ([\d.e+]+)",
        str(e.value),
    )
    assert said and float(said[1]) > 1e6, str(e.value)


@pytest.mark.slow
def test_resume_is_exact_with_statistics_and_both_optimizers(tmp_path):
    cfg = replace(
        SMALL,
        disc=gan.NetConfig(widths=(12,), activation="leaky_relu", norm="spectral"),
        ema=0.9,
        n_critic=2,
    )

    def run(steps, folder):
        return train.Run(
            folder=folder, steps=steps, batch_size=16, save_every=4, steps_per_call=3, devices=1
        )

    whole = train.fit(gan.make, cfg, run(11, ""), DIGITS).state
    train.fit(gan.make, cfg, run(5, str(tmp_path / "run")), DIGITS)
    again = train.fit(gan.make, cfg, run(11, str(tmp_path / "run")), DIGITS).state
    assert same(whole, again) and whole.extra["gen"] and whole.extra["disc"]
