"""What the GAN scripts compute beside training: kinds of stacks, arithmetic, mixing, random networks, and their refusals."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from PIL import Image

from aigc_jax import data, gan, metrics, train
from experiments import (
    _cli,
    _runs,
    cycle_emoji,
    cycle_toys,
    dcgan_arithmetic,
    loss_zoo,
    mode_collapse,
    stacked_digits,
    stylegan,
    unrolled_gan,
)
from experiments._cli import Source

DIGITS = data.load("digits")


# ---------------------------------------------------------------------------- stacked digits


def test_the_kind_of_a_stack_is_read_channel_by_channel():
    """A stack has the number that the classifier reads in its digits, if it is sure of all three."""
    rng, digits = np.random.default_rng(0), _cli.arrays(DIGITS)["image"] / 16.0
    digits = np.concatenate([digits, (digits[:200] + digits[200:400]) / 2])  # and blends of two
    classifier = metrics.load_classifier("digits")
    p = scipy.special.softmax(classifier.apply(digits)[0], -1)
    read, sure = p.argmax(-1), p.max(-1) >= 0.9
    rows = rng.integers(0, len(read), (300, 3))
    rows[range(3), range(3)] = np.flatnonzero(~sure)[:3]  # a blend that it cannot read, by channel
    stack = np.concatenate([digits[rows[:, c]] for c in range(3)], -1)
    expected = 100 * read[rows[:, 0]] + 10 * read[rows[:, 1]] + read[rows[:, 2]]
    expected = np.where(sure[rows].all(-1), expected, -1)
    assert (expected[:3] == -1).all() and (expected >= 0).mean() > 0.5
    np.testing.assert_array_equal(stacked_digits.kinds(stack, classifier), expected)


def test_noise_keeps_each_pixel_in_its_place():
    """Digits whose pixel (y, x) has only the values 10 y + x and 100 more."""
    plane = (10 * np.arange(8)[:, None] + np.arange(8))[None, :, :, None]
    digits = np.concatenate([plane, plane + 100])
    images = stacked_digits.noise(digits, 200, 0)
    assert images.shape == (200, 8, 8, 3)
    share = (images == plane + 100).mean(0)
    assert ((images == plane) | (images == plane + 100)).all()
    assert (np.abs(share - 0.5) < 0.2).all()
    assert len(np.unique(images.reshape(200, -1), axis=0)) == 200


def test_noise_has_fewer_kinds_than_real_stacks():
    classifier, digits = metrics.load_classifier("digits"), _cli.arrays(DIGITS)["image"]
    real = stacked_digits.scores(stacked_digits.stacked(digits, 3000, 0) / 16, classifier)
    noise = stacked_digits.scores(stacked_digits.noise(digits, 3000, 0) / 16, classifier)
    assert noise["modes"] < 0.5 * real["modes"] and noise["kl"] > 2 * real["kl"]
    assert noise["sure"] < 50 < real["sure"]


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
        assert scores["sure"] == 100
    monkeypatch.setattr(stacked_digits, "kinds", lambda images, classifier: np.full(2000, -1))
    none = stacked_digits.scores(np.zeros((2000, 8, 8, 3)), None)
    assert none == {"modes": 0, "kl": float(np.log(1000)), "sure": 0.0}


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
    np.testing.assert_allclose(found["thin b"], np.stack([b, np.zeros(30)], -1))
    np.testing.assert_allclose(found["bold b"], np.stack([b, np.ones(30)], -1))
    np.testing.assert_allclose(found["bold a"][:, 0], found["thin a"][:, 0])
    assert (found["bold a"][:, 0] != b).all()
    # With a linear G the arithmetic is exact: a bold b.
    result = found["bold a"] - found["thin a"] + found["thin b"]
    np.testing.assert_allclose(result, np.stack([b, np.ones(30)], -1))


def test_arithmetic_is_exact_for_a_linear_generator(monkeypatch):
    """An image is (class, ink): all results are bold samples of their class, no thin b is."""
    linear(monkeypatch)

    def classify(images):  # of class 0 .. 2, the nearest
        return -np.square(images.reshape(-1, 2)[:, :1] - np.arange(3)), None

    monkeypatch.setattr(dcgan_arithmetic, "ink", lambda x: x.reshape(-1, 2)[:, 1])
    loaded = SimpleNamespace(apply=classify)
    monkeypatch.setattr(dcgan_arithmetic.metrics, "load_classifier", lambda name: loaded)
    setup = replace(dcgan_arithmetic.SCALES["smoke"].setup, pool=300, triples=40)
    rng = np.random.default_rng(0)
    z = np.stack([rng.integers(0, 3, 300), rng.random(300)], -1)
    monkeypatch.setattr(dcgan_arithmetic.gan, "noise", lambda cfg, key, n: z)
    rows, pictures = dcgan_arithmetic.arithmetic(setup, train.Result(None, None, None, None, None))
    found = {row.quantity: (row.ours, row.oracle) for row in rows}
    assert found[dcgan_arithmetic.SAME] == found[dcgan_arithmetic.JOINT] == (100, 100)
    assert found[dcgan_arithmetic.THIN] == (0, None)
    assert found[dcgan_arithmetic.RANDOM][0] < 60  # it leaves the class, or is thin
    assert pictures.shape == (32, 2, 1, 1)


def test_a_linear_generator_walks_in_equal_steps(monkeypatch):
    linear(monkeypatch)
    cfg = gan.Config(shape=(2,), latent_dim=2)
    _, steps = dcgan_arithmetic.walks(train.Result(None, None, cfg, None, None))
    assert steps.shape == (64, 32)
    np.testing.assert_allclose(steps.max(-1), steps.mean(-1), rtol=1e-4)


# ---------------------------------------------------------------------------- StyleGAN


@pytest.mark.slow
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


def test_noise_is_no_success_and_real_digits_are():
    """Black and white pixels have 60 % of the digits' classifier score, but are far from them."""
    classify = metrics.load_classifier("digits").apply
    digits = _cli.arrays(DIGITS)["image"] / 16.0
    rng = np.random.default_rng(0)
    scores = partial(loss_zoo.digit_scores, classify, classify(digits[:1000])[1])
    real = scores(digits[1000:])
    blends = scores((digits[:1000] + digits[rng.permutation(1000)]) / 2)
    noise = scores(rng.integers(0, 2, (1000, 8, 8, 1)).astype(float))
    assert noise["score"] > 0.55 * real["score"]
    assert loss_zoo.succeeds(real, real, blends)
    assert not loss_zoo.succeeds(noise, real, blends)
    assert not loss_zoo.succeeds(blends, real, blends)


def test_rank_correlation_of_the_critics_loss():
    """1 where the distance rises with minus the loss, -1 where it falls; their mean is 0."""
    still = {"critic_loss": np.zeros(3), "fid": np.arange(3.0)}
    assert loss_zoo.correlation([still]) is None
    rising = {"critic_loss": np.array([-1.0, -2.0, -4.0]), "fid": np.array([1.0, 10.0, 11.0])}
    falling = {**rising, "fid": rising["fid"][::-1]}
    np.testing.assert_allclose(loss_zoo.correlation([rising]), 1)
    np.testing.assert_allclose(loss_zoo.correlation([rising, still]), 1)
    np.testing.assert_allclose(loss_zoo.correlation([rising, falling]), 0, atol=1e-12)


def test_toy_scores_of_points_at_the_modes():
    """Points at 24 of 25 modes, and one far from all."""
    modes = data.points.grid_modes(step=loss_zoo.STEP)
    found = loss_zoo.toy_scores(np.concatenate([modes[:24], [[0.9, 0.9]]]))
    assert found["modes"] == 24
    np.testing.assert_allclose(found["quality"], 24 / 25)


# ---------------------------------------------------------------------------- unrolled GAN, CycleGAN


def test_the_demonstrations_ring_has_seven_modes_one_of_them_twice():
    """np.linspace(0, 2 pi, 8) names the first point twice."""
    x = unrolled_gan.demonstration(np.random.default_rng(0), 80_000)
    angles = np.linspace(0, 2 * np.pi, 8)
    theirs = np.stack([np.cos(angles), np.sin(angles)], -1)
    count = metrics.mode_count(x, theirs[:7], 0.01)
    assert count.modes == 7 and abs(count.high_quality - (1 - np.exp(-4.5))) < 2e-3
    share = count.histogram / count.histogram.sum()
    np.testing.assert_allclose(share, [2 / 8] + [1 / 8] * 6, atol=0.006)


def test_recoloured_sets_have_the_moments_of_the_other():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, 3)) / 40
    sets = {
        "a": 0.5 + 0.03 * rng.normal(size=(20, 8, 8, 3)),
        "b": [0.4, 0.5, 0.6] + rng.normal(size=(30, 8, 8, 3)) @ mix,
    }
    for to, origin in (("b", "a"), ("a", "b")):
        moved = cycle_emoji.recoloured(sets, sets[origin], to).reshape(-1, 3).astype(np.float64)
        wanted = sets[to].reshape(-1, 3)
        np.testing.assert_allclose(moved.mean(0), wanted.mean(0), atol=1e-4)
        np.testing.assert_allclose(np.cov(moved.T), np.cov(wanted.T), atol=1e-5)


def test_recall_counts_the_pictures_that_are_nearest_to_their_own():
    true = np.eye(6, dtype=np.float32).reshape(6, 2, 3, 1)
    assert cycle_emoji.recall(true, true) == 100
    found = true.copy()
    found[0] = true[1]  # it is nearer to another
    np.testing.assert_allclose(cycle_emoji.recall(found, true), 500 / 6)


def test_rates_of_cyclegan_are_constant_and_then_fall_to_zero():
    setup = cycle_emoji.SCALES["cpu"].setup
    cfg = cycle_emoji.schedule(replace(setup, run=replace(setup.run, steps=1000)))
    for optim in (cfg.optim, cfg.disc_optim):
        rates = [float(optim.rate(jnp.asarray(step))) for step in (0, 499, 750, 1000)]
        np.testing.assert_allclose(rates, [2e-4, 2e-4, 1e-4, 0], atol=1e-6)


@pytest.mark.parametrize(
    "permutation, symmetric",
    [((0, 1, 2, 3), True), ((2, 3, 0, 1), True), ((3, 2, 1, 0), True), ((0, 2, 1, 3), False)],
)
def test_symmetries_of_a_ring_are_turns_and_mirrors(permutation, symmetric):
    assert cycle_toys.is_symmetry(permutation) is symmetric


def test_two_folders_for_cyclegan_are_checked_before_training(tmp_path):
    for name, size, count in (("a", 8, 104), ("b", 16, 110), ("empty", 8, 0)):
        (tmp_path / name).mkdir()
        for i in range(count):
            image = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    a, b, empty = (f"images:{tmp_path / name}" for name in ("a", "b", "empty"))
    training, held_out = cycle_emoji.TwoSets(a, other=b, size=8).parts()
    assert training.info.shape == training.info.other == (8, 8, 3)
    assert held_out.info.examples >= 1
    training, _ = cycle_emoji.TwoSets(a, other=b).parts()  # each of the size of its own pictures
    with pytest.raises(ValueError, match=r"first has \(8, 8, 3\), the other \(16, 16, 3\)"):
        replace(cycle_emoji.MODEL, shape=(8, 8, 3)).check(training.info)
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        cycle_emoji.TwoSets(a, other=empty).parts()


@pytest.mark.parametrize(
    "script, change, words",
    [
        (loss_zoo, {"zoo": ("other",)}, "zoo must hold some of .*got ..other"),
        (loss_zoo, {"networks": 0}, "networks must be at least 1, got 0"),
        (stacked_digits, {"seeds": 0}, "seeds must be at least 1, got 0"),
        (
            dcgan_arithmetic,
            {"data": Source("emoji")},
            "must be one of digits, fashion_mnist, mnist",
        ),
        (dcgan_arithmetic, {"pool": 9}, "pool must be at least 100, got 9"),
        (stylegan, {"samples": 9}, "samples must be at least 80, got 9"),
        (
            stylegan,
            {"data": Source("images:/tmp")},
            "mnist; for own pictures: python -m experiments.own_pictures",
        ),
        (
            loss_zoo,
            {"run": replace(loss_zoo.Setup().run, eval_every=0)},
            "eval_every must lie in 1..400",
        ),
    ],
)
def test_what_the_scripts_refuse(script, change, words):
    with pytest.raises(ValueError, match=words):
        replace(script.SCALES["cpu"].setup, **change)


def test_a_diverged_run_does_not_end_the_zoo(monkeypatch):
    def fit(*args, **options):
        raise train.NonFinite("the loss is nan")

    monkeypatch.setattr(train, "fit", fit)
    setup = loss_zoo.SCALES["smoke"].setup
    scores = {"score": 5.0, "fid": 10.0}
    found = loss_zoo.on_digits(setup, "WGAN-GP", (DIGITS, None), lambda x: scores, Path("nowhere"))
    assert loss_zoo.ends_of(found) == [None]
    rows = loss_zoo.rows_of(setup, "WGAN-GP", found, 0, scores, scores)
    values = {row.quantity: row.ours for row in rows}
    assert values[loss_zoo.ENDED.format("WGAN-GP", 1)] == 1
    assert loss_zoo.on_gaussians(setup, "WGAN-GP", Path("nowhere")) == [(0, 0.0)]


def test_the_clock_leaves_out_what_is_measured(tmp_path, monkeypatch):
    """60 s of training, 300 s of measuring, 60 s of training: 1 and 2 minutes."""
    (tmp_path / "metrics.jsonl").touch()
    now = iter([0.0, 60.0, 360.0, 420.0, 720.0])
    monkeypatch.setattr(_runs.time, "monotonic", lambda: next(now))
    watch = _cli.clock(tmp_path, lambda family, state, step: {"fid": 1.0})
    assert [watch(None, None, i)["minutes"] for i in (1, 2)] == [1, 2]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(loss_zoo, marks=pytest.mark.soak),
        pytest.param(stacked_digits, marks=pytest.mark.slow),
        pytest.param(dcgan_arithmetic, marks=pytest.mark.soak),
        pytest.param(stylegan, marks=pytest.mark.soak),
    ],
)
def test_the_scripts_run_at_scale_smoke(script, tmp_path):
    setup = script.SCALES["smoke"].setup
    rows = script.run(replace(setup, run=replace(setup.run, folder=str(tmp_path))), tmp_path)
    assert all(row.ours is None or np.isfinite(row.ours) for row in rows)
    assert list(tmp_path.glob("*.png"))


# ---------------------------------------------------------------------------- seeds at once


@pytest.mark.slow
def test_seeds_at_once_are_those_that_train_alone():
    """Each seed has its own first weights, its own part of the batch and its own noise."""
    net = gan.NetConfig(widths=(8,), norm="batch")
    cfg = gan.Config(shape=(2,), latent_dim=2, packing=2, gen=net, disc=gan.NetConfig(widths=(8,)))
    alone, both = gan.make(cfg), mode_collapse.make_seeds(mode_collapse.Seeds(cfg, 2))
    batch, key = data.load("ring").batch(0, 0, 16), jax.random.key
    state = jax.jit(both.init)(key(1))
    ends, values = jax.jit(both.step)(state, batch, key(3))
    scores = jax.jit(both.evaluate)(ends, batch, key(5))
    losses, each = [], []
    for i in range(2):
        first = jax.jit(alone.init)(jax.random.split(key(1))[i])
        part = {"points": batch["points"][8 * i : 8 * i + 8]}
        end, metric = jax.jit(alone.step)(first, part, jax.random.split(key(3))[i])
        one = jax.tree.map(lambda x, i=i: x[i], ends._replace(step=jnp.stack([ends.step] * 2)))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(end), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        losses.append(metric["disc_loss"])
        each.append(jax.jit(alone.evaluate)(end, batch, key(5)))
    assert losses[0] != losses[1]
    np.testing.assert_allclose(values["disc_loss"], np.mean(losses), rtol=1e-5)
    for name, value in scores.items():
        np.testing.assert_allclose(value, (each[0][name] + each[1][name]) / 2, atol=1e-5)
