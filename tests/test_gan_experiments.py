"""What the GAN scripts compute beside training: kinds of stacks, arithmetic, mixing, random networks, and their refusals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, gan, metrics, train
from experiments import _cli, dcgan_arithmetic, loss_zoo, stacked_digits, stylegan
from experiments._cli import Source

DIGITS = data.load("digits")


# ---------------------------------------------------------------------------- stacked digits


def test_the_kind_of_a_stack_is_read_channel_by_channel():
    """A stack of known digits has the number that the classifier reads in each of them."""
    arrays = _cli.arrays(DIGITS)
    classifier = metrics.load_classifier("digits")
    read = classifier.apply(arrays["image"] / 16.0)[0].argmax(-1)
    rows = np.random.default_rng(0).integers(0, len(read), (50, 3))
    stack = np.concatenate([arrays["image"][rows[:, c]] for c in range(3)], -1)
    expected = 100 * read[rows[:, 0]] + 10 * read[rows[:, 1]] + read[rows[:, 2]]
    np.testing.assert_array_equal(stacked_digits.kinds(stack / 16.0, classifier), expected)


def test_stacks_are_made_of_whole_digits():
    digits = _cli.arrays(DIGITS)["image"]
    stacks = stacked_digits.stacked(digits, 40, seed=3)
    assert stacks.shape == (40, 8, 8, 3) and stacks.dtype == digits.dtype
    known = {digit.tobytes() for digit in digits}
    assert all(
        np.ascontiguousarray(s[..., [c]]).tobytes() in known for s in stacks for c in range(3)
    )
    # Equal channels would be one digit, drawn once.
    assert not all((s[..., 0] == s[..., 1]).all() for s in stacks)


def test_scores_of_one_kind_and_of_all(monkeypatch):
    """One kind: 1 mode and log 1000 nats. Each kind equally often: 1,000 modes and 0 nats."""
    for found, modes, kl in (
        (np.full(2000, 7), 1, np.log(1000)),
        (np.tile(np.arange(1000), 2), 1000, 0.0),
    ):
        monkeypatch.setattr(stacked_digits, "kinds", lambda images, classifier, k=found: k)
        scores = stacked_digits.scores(np.zeros((2000, 8, 8, 3)), None)
        assert scores["modes"] == modes
        np.testing.assert_allclose(scores["kl"], kl, atol=1e-12)


# ---------------------------------------------------------------------------- arithmetic


def linear(monkeypatch):
    """Makes G the identity: image [2, 1, 1] = (class, ink) of a latent [2]."""
    monkeypatch.setattr(dcgan_arithmetic, "drawn", lambda result, z: z.reshape(-1, 2, 1, 1))


def test_concepts_are_the_boldest_and_thinnest_tenths():
    """Class 0 has 100 images whose ink is known, class 1 too few."""
    order = np.random.default_rng(0).permutation(100)
    images = np.concatenate([order / 100.0, np.zeros(5)]).reshape(-1, 1, 1, 1)
    found = dcgan_arithmetic.concepts(images, np.array([0] * 100 + [1] * 5))
    assert set(found) == {0}
    bold, thin, middle = found[0]
    assert set(order[bold]) == set(range(90, 100)) and set(order[thin]) == set(range(10))
    np.testing.assert_allclose(middle, 0.495)


def test_means_are_of_three_latents_of_their_concept():
    """Latents of class k are k on axis 0; bold ones have 1 on axis 1, thin ones 0."""
    z = np.array([[k, bold] for k in range(3) for bold in (0.0, 1.0) for _ in range(20)])
    rows = {
        k: (np.arange(40 * k + 20, 40 * k + 40), np.arange(40 * k, 40 * k + 20), 0.5)
        for k in range(3)
    }
    found = dcgan_arithmetic.triples(z, rows, 30)
    b = found["class"]
    np.testing.assert_allclose(found["bold a"][:, 1], 1)
    np.testing.assert_allclose(found["thin a"][:, 1], 0)
    np.testing.assert_allclose(found["thin b"][:, 0], b)
    np.testing.assert_allclose(found["bold a"][:, 0], found["thin a"][:, 0])
    assert (found["bold a"][:, 0] != b).all()
    # With a linear G the arithmetic is exact: a bold b.
    result = found["bold a"] - found["thin a"] + found["thin b"]
    np.testing.assert_allclose(result, np.stack([b, np.ones(30)], -1))


def test_a_linear_generator_walks_in_equal_steps(monkeypatch):
    linear(monkeypatch)
    cfg = gan.Config(shape=(2,), latent_dim=2)
    _, steps = dcgan_arithmetic.walks(train.Result(None, None, cfg, None, None))
    assert steps.shape == (64, 32)
    np.testing.assert_allclose(steps.max(-1), steps.mean(-1), rtol=1e-4)


# ---------------------------------------------------------------------------- StyleGAN


def test_mixing_with_itself_changes_nothing_and_truncation_0_is_the_mean():
    """The first row and column of the figure are G's own pictures, and the corner is empty."""
    cfg = gan.Config(
        shape=(8, 8, 1),
        levels=17,
        latent_dim=4,
        gen=gan.NetConfig("style", (4, 4)),
        disc=gan.NetConfig("style", (4, 4)),
    )
    state = gan.make(cfg).init(jax.random.key(0))
    result = train.Result(gan.make(cfg), state, cfg, None, None)
    grid = stylegan.mixed(result, 2, 3, jax.random.key(1)).reshape(3, 4, 8, 8, 1)
    assert not grid[0, 0].any()
    z = gan.noise(cfg, jax.random.key(1), 5)
    z = jnp.concatenate([z[:, :4], jnp.tile(z[:1, 4:], (5, 1))], -1)  # one draw of noise inputs
    own = (gan.generate(cfg, gan.generator_of(cfg, state), z) + 1) / 2
    own = np.clip(own, 0, 1)
    np.testing.assert_allclose(grid[1:, 0], own[:2], atol=1e-5)
    np.testing.assert_allclose(grid[0, 1:], own[2:], atol=1e-5)
    assert np.abs(grid[1, 1] - grid[1, 0]).max() > 1e-3  # its fine styles are the column's
    assert np.abs(grid[1, 1] - grid[0, 1]).max() > 1e-3

    at_0 = stylegan.truncated(result, 0.0, 3, jax.random.key(2))
    assert at_0.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(
        at_0, np.tile(at_0[:1], (3, 1, 1, 1)), atol=1e-6
    )  # strength 0 of noise


# ---------------------------------------------------------------------------- the zoo


def test_every_recipe_is_a_model_for_every_network():
    nets = loss_zoo.networks(40)
    assert len({str(net) for net in nets}) > 20
    assert loss_zoo.networks(3) == nets[:3]
    for recipe, (fields, norm) in loss_zoo.ZOO.items():
        for net in nets:
            cfg = loss_zoo.config(loss_zoo.DIGITS, recipe, net)
            assert (cfg.disc.norm, cfg.gen.norm) == (norm, net["norm"])
            assert (cfg.loss, cfg.disc.widths) == (fields["loss"], net["widths"])


def test_rank_correlation_of_the_critics_loss():
    """1 where the distance rises with minus the loss, -1 where it falls; their mean is 0."""
    rising = {"critic_loss": np.array([-1.0, -2.0, -4.0]), "fid": np.array([1.0, 10.0, 11.0])}
    falling = {**rising, "fid": rising["fid"][::-1]}
    np.testing.assert_allclose(loss_zoo.correlation([rising]), 1)
    np.testing.assert_allclose(loss_zoo.correlation([rising, falling]), 0, atol=1e-12)


def test_toy_scores_of_points_at_the_modes():
    """Points at 24 of 25 modes, and one far from all."""
    modes = data.points.grid_modes(step=loss_zoo.STEP)
    found = loss_zoo.toy_scores(np.concatenate([modes[:24], [[0.9, 0.9]]]))
    assert found["modes"] == 24
    np.testing.assert_allclose(found["quality"], 24 / 25)


@pytest.mark.parametrize(
    "script, change, words",
    [
        (loss_zoo, {"zoo": ("other",)}, "zoo must hold some of non-saturating, "),
        (loss_zoo, {"networks": 0}, "networks must be at least 1, got 0"),
        (stacked_digits, {"seeds": 0}, "seeds must be at least 1, got 0"),
        (dcgan_arithmetic, {"data": Source("images:/tmp")}, "data.name mnist or digits"),
        (dcgan_arithmetic, {"pool": 9}, "pool must be at least 100, got 9"),
        (stylegan, {"samples": 9}, "samples must be at least 80, got 9"),
        (stylegan, {"data": Source("images:/tmp")}, "fashion_mnist, mnist or digits"),
    ],
)
def test_what_the_scripts_refuse(script, change, words):
    with pytest.raises(ValueError, match=words):
        replace(script.SCALES["cpu"].setup, **change)


@pytest.mark.slow
@pytest.mark.parametrize("script", [loss_zoo, stacked_digits, dcgan_arithmetic, stylegan])
def test_the_scripts_run_at_scale_smoke(script, tmp_path):
    setup = script.SCALES["smoke"].setup
    rows = script.run(replace(setup, run=replace(setup.run, folder=str(tmp_path))), tmp_path)
    assert all(row.ours is None or np.isfinite(row.ours) for row in rows)
    assert list(tmp_path.glob("*.png"))
