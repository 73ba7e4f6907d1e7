"""CycleGAN: its losses by hand, its pool against a plain loop, its nets, and the data of two sets."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, gan, nn, train
from aigc_jax.core import Optim
from aigc_jax.gan import cycle
from aigc_jax.train import Run

POINTS = gan.CycleConfig(
    shape=(2,), gen_widths=(8,), disc_widths=(8,), pool=3, optim=Optim("sgd", lr=0.1)
)
IMAGES = gan.CycleConfig(
    shape=(8, 8, 1), levels=17, gen_widths=(4, 8), blocks=1, disc_widths=(4, 8), pool=2
)


def key(i):
    return jax.random.key(i)


def two_sets(n=(12, 9), shape=(2,)):
    rng = np.random.default_rng(0)
    return [data.from_arrays({"points": rng.normal(size=(k, *shape))}) for k in n]


DIGITS = data.pair(data.load("digits", "train[:40]"), data.load("digits", "train[40:72]"))


# ------------------------------------------------------------------------------------- two sets side by side


def test_unpaired_sets_have_orders_and_epochs_of_their_own():
    a, b = two_sets((12, 9))
    both = data.pair(a, b)
    assert both.info.examples == 9 and both.info.other == (2,) and both.info.shape == (2,)
    rows = [both.resident[1](0, i, 3) for i in range(12)]
    first, second = np.concatenate(rows).T
    assert sorted(first[:12]) == list(range(12)) and sorted(second[:9]) == list(range(9))
    assert sorted(second[9:18]) == list(range(9)) and (first[:9] != second[:9]).any()
    batch = both.batch(0, 2, 3)
    np.testing.assert_array_equal(batch["points"], a.resident[0]["points"][first[6:9]])
    np.testing.assert_array_equal(batch["other"], b.resident[0]["points"][second[6:9]])


def test_sets_of_equal_size_are_not_aligned_by_chance():
    a, b = two_sets((50, 50))
    rows = data.pair(a, b).resident[1](0, 0, 50)
    assert (rows[:, 0] == rows[:, 1]).sum() < 10
    aligned = data.pair(a, b, aligned=True)
    rows = aligned.resident[1](0, 0, 50)
    assert (rows[:, 0] == rows[:, 1]).all()
    assert aligned.info.fingerprint != data.pair(a, b).info.fingerprint


@pytest.mark.parametrize("sizes", [(4, 10), (10, 4)])
def test_scores_of_unpaired_sets_count_each_example_at_most_once(sizes):
    both = data.pair(*two_sets(sizes))
    seen = np.concatenate([both.resident[1](0, i, 3) for i in range(2)])[: both.info.examples]
    assert len(seen) == 4 and all(len(set(column)) == 4 for column in seen.T)


@pytest.mark.parametrize(
    ("sets", "options", "words"),
    [
        (lambda: (two_sets()[0], data.load("digits")), {}, "one kind, but arrays is points and"),
        (lambda: (data.load("ring"), two_sets()[0]), {}, "ring is endless: pass examples=N"),
        (
            lambda: (data.load("emoji_google"), data.load("digits")),
            {},
            r"levels, got 256 \(emoji_google\) and 17 \(digits\)",
        ),
        (two_sets, {"aligned": True}, "equally many examples, got 12 and 9"),
        (lambda: (data.load("python_source", length=8),) * 2, {}, "but python_source is text"),
        (lambda: (data.pair(*two_sets()), two_sets()[0]), {}, "but arrays is a pair"),
        (
            lambda: (two_sets()[0]._replace(resident=None), two_sets()[1]),
            {},
            "arrays is read while training: pass stream=False",
        ),
    ],
)
def test_sets_that_do_not_go_together_are_refused(sets, options, words):
    with pytest.raises(ValueError, match=words):
        data.pair(*sets(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "pair needs first, a dictionary of a set's name"),
        ({"first": {}, "second": {}}, "pair needs first"),
        ({"first": "images:A", "second": {"name": "digits"}}, "got 'images:A'"),
        ({"first": {"name": 3}, "second": {"name": "digits"}}, "got {'name': 3}"),
        ({"first": {"name": "digits"}, "second": {"name": "digits", "split": "test"}}, "second"),
        (
            {"first": {"name": "digits"}, "second": {"name": "digits"}, "aligned": "no"},
            "aligned must be True or False, got 'no'",
        ),
    ],
)
def test_a_pair_that_is_not_described_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        data.load("pair", **options)


def test_emoji_of_two_vendors():
    """Unpaired training sets share no emoji; the validation pairs are in one order."""
    train_pair, valid = data.load("emoji_pair"), data.load("emoji_pair", "validation")
    assert train_pair.info.examples == 645 and train_pair.info.other == (32, 32, 3)
    google, twitter = (valid.resident[0][name].astype(float) for name in ("image", "other"))
    assert len(google) == len(twitter) == 150
    assert np.abs(google - twitter).mean() == pytest.approx(43.43, abs=0.005)
    distance = np.square(google.reshape(150, 1, -1) - twitter.reshape(1, 150, -1)).sum(-1)
    assert 100 * np.mean(distance.argmin(1) == np.arange(150)) == pytest.approx(34.67, abs=0.01)
    aligned = data.load("emoji_pair", "train", aligned=True)
    close = np.abs(aligned.resident[0]["image"].astype(float) - aligned.resident[0]["other"])
    assert aligned.info.examples == 645 and close.mean() == pytest.approx(43.6, abs=0.1)
    # Google draws two emoji of its own training set as it draws one of Twitter's.
    known = {x.tobytes() for x in train_pair.resident[0]["image"]}
    assert sum(x.tobytes() in known for x in aligned.resident[0]["image"]) == 2
    again = data.load(**{**aligned.info.source, "split": "train[:10]"})
    assert again.info.examples == 10
    with pytest.raises(ValueError, match="validation set of emoji_pair is aligned"):
        data.load("emoji_pair", "validation", aligned=False)
    with pytest.raises(ValueError, match="aligned must be True, False or None, got 'yes'"):
        data.load("emoji_pair", aligned="yes")
    with pytest.raises(ValueError, match="has train and validation, and slices; got 'test'"):
        data.load("emoji_pair", "test")
    with pytest.raises(ValueError, match="test"):
        data.load("emoji_twitter", "test")


def test_a_pair_of_named_sets_is_found_again_by_its_source():
    first, second = {"name": "emoji_google"}, {"name": "emoji_twitter"}
    both = data.load("pair", "train", first=first, second=second)
    again = data.load(**{**both.info.source, "split": "validation[:20]"})
    assert both.info.examples == 645 and again.info.examples == 20


# ---------------------------------------------------------------------------------------------------- losses


def affine(scale, shift):
    """The parameters of an MLP without hidden layers, x -> scale x + shift."""
    return {"Dense_0": {"kernel": scale * jnp.eye(2), "bias": shift * jnp.ones(2)}}


class Linear:
    """Nets without hidden layers, so that all losses are known."""

    def __init__(self, monkeypatch):
        net = partial(nn.MLP, ())
        monkeypatch.setattr(cycle, "_generator", lambda cfg: net(out=2))
        monkeypatch.setattr(cycle, "_critic", lambda cfg: net(out=1))
        one, two = (
            {"Dense_0": {"kernel": jnp.array([[x], [y]]), "bias": jnp.zeros(1)}}
            for x, y in ((1.0, 0.0), (0.0, 1.0))
        )
        self.params = {
            "gen": {"b": affine(2.0, 1.0), "a": affine(0.5, 0.0)},  # G(a) = 2a + 1, F(b) = b / 2
            "disc": {"a": one, "b": two},  # D_A(x) = x_1, D_B(x) = x_2
        }


def test_losses_are_their_definitions(monkeypatch):
    linear = Linear(monkeypatch)
    a, b = (np.random.default_rng(i).normal(size=(5, 2)).astype(np.float32) for i in (0, 1))
    cfg = replace(POINTS, cycle_weight=3.0, identity_weight=0.25, paired_weight=7.0)
    state = cycle.init_state(cfg, key(0))._replace(params=linear.params)
    batch = {"points": a, "other": b}
    loss, (_, metrics) = cycle.generator_loss(cfg, linear.params["gen"], state, batch, key(1))
    adversarial = np.square(2 * a[:, 1] + 1 - 1).mean() + np.square(b[:, 0] / 2 - 1).mean()
    back_a, back_b = (2 * a + 1) / 2, 2 * (b / 2) + 1
    cycled = np.abs(back_a - a).mean() + np.abs(back_b - b).mean()
    same = np.abs(a / 2 - a).mean() + np.abs(2 * b + 1 - b).mean()
    paired = np.abs(2 * a + 1 - b).mean() + np.abs(b / 2 - a).mean()
    np.testing.assert_allclose(metrics["adversarial"], adversarial, rtol=1e-5)
    np.testing.assert_allclose(metrics["cycle"], cycled, rtol=1e-5)
    np.testing.assert_allclose(loss, adversarial + 3 * cycled + 0.75 * same + 7 * paired, rtol=1e-5)
    examples = {"a": (a, b), "b": (b, a)}
    loss, _ = cycle.critic_loss(cfg, linear.params["disc"], state, examples, key(1))
    of_a = ((a[:, 0] - 1) ** 2 + b[:, 0] ** 2).mean() / 2
    of_b = ((b[:, 1] - 1) ** 2 + a[:, 1] ** 2).mean() / 2
    np.testing.assert_allclose(loss, of_a + of_b, rtol=1e-5)
    scores = cycle.evaluate(cfg, state, batch, key(1))
    wanted = {
        "cycle_a": np.abs(back_a - a).mean(-1),
        "cycle_b": np.abs(back_b - b).mean(-1),
        "fake_a": b[:, 0] / 2,
        "fake_b": 2 * a[:, 1] + 1,
    }
    assert set(scores) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("off", ["cycle_weight", "identity_weight"])
def test_terms_of_weight_0_are_left_out(off, monkeypatch):
    linear, batch = Linear(monkeypatch), dict(zip(("points", "other"), _both(), strict=True))
    cfg = replace(POINTS, cycle_weight=3.0, identity_weight=0.5)
    state = cycle.init_state(cfg, key(0))._replace(params=linear.params)

    def loss(cfg):
        value, (_, metrics) = cycle.generator_loss(cfg, linear.params["gen"], state, batch, key(1))
        return float(value), metrics

    whole, metrics = loss(cfg)
    less, rest = loss(replace(cfg, **{off: 0.0}))
    lost = 1.5 * metrics["identity"] + (3 * metrics["cycle"] if off == "cycle_weight" else 0)
    assert whole - less == pytest.approx(float(lost), rel=1e-5)
    assert "identity" not in rest and ("cycle" in rest) == (off != "cycle_weight")


@pytest.mark.slow
def test_scores_are_in_units_of_pixels():
    """Cycle distances of images are halved: pixels lie in [0, 1], the nets' values in [-1, 1]."""
    state = jax.jit(gan.make_cycle(IMAGES).init)(key(0))
    batch = DIGITS.batch(0, 0, 4)
    scores = gan.make_cycle(IMAGES).evaluate(state, batch, key(1))
    a, _ = cycle.preprocess(IMAGES, batch)
    assert float(a.min()) == -1 and float(a.max()) == 1
    gen = state.params["gen"]
    back = cycle.translate(IMAGES, gen, cycle.translate(IMAGES, gen, a, "b"), "a")
    wanted = np.abs((back + 1) / 2 - (a + 1) / 2).mean((1, 2, 3))
    np.testing.assert_allclose(scores["cycle_a"], wanted, rtol=1e-5)
    assert set(scores) == {"cycle_a", "cycle_b", "fake_a", "fake_b"}


@pytest.mark.slow
def test_generators_and_critics_are_updated_from_their_own_losses():
    """The critics see fakes of the generators before the update; each loss moves its own nets."""
    cfg = replace(POINTS, pool=0, disc_optim=Optim("sgd", lr=0.2))
    family = gan.make_cycle(cfg)
    state = jax.jit(family.init)(key(0))
    batch = {name: x for name, x in zip(("points", "other"), _both(), strict=True)}
    new, metrics = jax.jit(family.step)(state, batch, key(1))
    grad = jax.grad(lambda p: cycle.generator_loss(cfg, p, state, batch, key(1))[0])
    moved = jax.tree.map(lambda w, g: w - 0.1 * g, state.params["gen"], grad(state.params["gen"]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), new.params["gen"], moved)
    a, b = batch["points"], batch["other"]
    gen = state.params["gen"]
    examples = {
        "a": (a, cycle.translate(cfg, gen, b, "a")),
        "b": (b, cycle.translate(cfg, gen, a, "b")),
    }
    grad = jax.grad(lambda p: cycle.critic_loss(cfg, p, state, examples, key(1))[0])
    moved = jax.tree.map(lambda w, g: w - 0.2 * g, state.params["disc"], grad(state.params["disc"]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), new.params["disc"], moved)
    assert {"gen_loss", "disc_loss", "cycle", "identity", "adversarial"} <= set(metrics)


def _both():
    return [np.random.default_rng(i).normal(size=(6, 2)).astype(np.float32) for i in (0, 1)]


# ------------------------------------------------------------------------------------------------------ pool


def test_only_sets_a_and_b_are_known():
    cfg = gan.CycleConfig(shape=(2,))
    with pytest.raises(ValueError, match="to must be 'a' or 'b', got 'B'"):
        cycle.translate(cfg, {}, jnp.zeros((1, 2)), "B")
    with pytest.raises(ValueError, match="of must be 'a' or 'b', got 'A'"):
        cycle.judge(cfg, {}, jnp.zeros((1, 2)), "A")


def test_pool_is_that_of_a_plain_loop():
    """The same draws, one fake after another, as the authors' code does."""
    size, rows = 3, 5
    pool, held = jnp.zeros((size, 2)), jnp.zeros((), jnp.int32)
    kept, seen_swaps = [], 0
    for i in range(6):
        fakes = jax.random.normal(key(100 + i), (rows, 2))
        seen, pool, held = cycle.exchange(pool, held, fakes, key(i))
        k_swap, k_slot = jax.random.split(key(i))
        swap = jax.random.bernoulli(k_swap, 0.5, (rows,))
        slot = jax.random.randint(k_slot, (rows,), 0, size)
        for fake, s, j, got in zip(np.asarray(fakes), swap, slot, np.asarray(seen), strict=True):
            if len(kept) < size:
                kept.append(fake)
                wanted = fake
            elif s:
                wanted, kept[int(j)] = kept[int(j)], fake
                seen_swaps += 1
            else:
                wanted = fake
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(pool[: len(kept)], np.stack(kept))
    assert int(held) == size and seen_swaps > 5


def test_on_several_devices_the_pool_takes_all_fakes_in_their_order():
    """All devices have one pool, and each sees its own rows of what a plain loop gives."""
    fakes = jax.random.normal(key(0), (24, 2))
    pool, held, keys = jnp.zeros((3, 2)), jnp.zeros((), jnp.int32), jax.random.split(key(1), 4)
    one = partial(cycle.exchange, pool, held, axis_name="data")
    seen, pools, counts = jax.vmap(one, axis_name="data")(fakes.reshape(4, 6, 2), keys)
    assert (pools == pools[:1]).all() and (counts == 3).all()
    draws = [jax.random.split(k) for k in keys]
    swap = np.concatenate([jax.random.bernoulli(k, 0.5, (6,)) for k, _ in draws])
    slot = np.concatenate([jax.random.randint(k, (6,), 0, 3) for _, k in draws])
    kept, wanted = [], []
    for fake, s, j in zip(np.asarray(fakes), swap, slot, strict=True):
        wanted.append(kept[j] if len(kept) == 3 and s else fake)
        if len(kept) < 3:
            kept.append(fake)
        elif s:
            kept[j] = fake
    np.testing.assert_array_equal(seen.reshape(24, 2), np.stack(wanted))
    np.testing.assert_array_equal(pools[0], np.stack(kept))


# ------------------------------------------------------------------------------------------------------ nets


def test_instance_norm_is_per_image_and_channel():
    x = 3 + 2 * jax.random.normal(key(0), (2, 5, 4, 3))
    y = np.asarray(nn.instance_norm(x))
    np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(nn.instance_norm(x[:1])[0], y[0], atol=1e-6)
    low = nn.instance_norm(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("remat", [False, True])
def test_nets_keep_the_shape_and_return_float32(dtype, remat):
    net = nn.ImageTranslator(2, (4, 8), 1, dtype=dtype, remat=remat)
    x = jax.random.normal(key(0), (3, 8, 12, 1))
    y, variables = net.init_with_output(key(1), x)
    assert y.shape == (3, 8, 12, 2) and y.dtype == jnp.float32 and float(jnp.abs(y).max()) <= 1
    plain = nn.ImageTranslator(2, (4, 8), 1, dtype=dtype)
    np.testing.assert_allclose(y, plain.apply(variables, x), atol=1e-6)
    critic = nn.PatchDiscriminator((4, 8, 8), dtype=dtype)
    logits, _ = critic.init_with_output(key(1), jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 6, 6) and logits.dtype == jnp.float32


def test_the_paper_s_critic_judges_patches_of_70_pixels(monkeypatch):
    """One logit depends on 70 x 70 pixels, and on no other; without the norm, which sees all."""
    monkeypatch.setattr("aigc_jax.nn.translation.instance_norm", lambda h: h)
    net = nn.PatchDiscriminator((1, 1, 1, 1), kernel_init=jax.nn.initializers.ones)
    x = jnp.ones((1, 96, 96, 1))
    variables = net.init(key(0), x)
    gradient = jax.grad(lambda x: net.apply(variables, x)[0, 5, 5])(x)[0, ..., 0]
    for axis in (0, 1):
        touched = np.flatnonzero(np.asarray(gradient).sum(axis))
        assert len(touched) == 70 and np.ptp(touched) == 69


# ------------------------------------------------------------------------------------ what cannot work


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (8, 8)}, r"\(H, W, C\) or \(d,\)"),
        ({"gen_widths": ()}, "gen_widths must hold positive widths"),
        ({"gen_widths": (4, 4, 4, 4)}, "can be halved 3 times to at least 2, got shape"),
        ({"disc_widths": (4, 4, 4)}, "judge patches of images of 12 x 12 pixels or more"),
        ({"pool": -1}, "pool must be at least 0"),
        ({"cycle_weight": -1.0}, "cycle_weight must be at least 0"),
        ({"levels": 1}, "levels must lie in 2..256"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(IMAGES, **change)


def test_a_paired_term_needs_aligned_pairs():
    with pytest.raises(ValueError, match="paired_weight 1.0 needs aligned pairs"):
        replace(IMAGES, paired_weight=1.0).check(DIGITS.info)


@pytest.mark.slow
def test_the_smallest_images_that_are_allowed_work():
    cfg = replace(IMAGES, shape=(6, 6, 1), gen_widths=(4, 4), disc_widths=(4, 4))
    family = gan.make_cycle(cfg)
    state = jax.jit(family.init)(key(0))
    x = np.random.default_rng(0).integers(0, 17, (2, 6, 6, 1), np.uint8)
    new, metrics = jax.jit(family.step)(state, {"image": x, "other": x[::-1]}, key(1))
    assert np.isfinite(metrics["gen_loss"]) and np.isfinite(metrics["disc_loss"])


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (lambda: data.load("digits"), "two sets side by side: make them with data.pair"),
        (lambda: data.pair(*two_sets()), r"model.shape \(8, 8, 1\) is for images"),
        (
            lambda: data.pair(
                data.load("digits"),
                data.from_arrays({"image": np.zeros((4, 8, 6, 1), np.uint8)}, levels=17),
            ),
            r"same shape; the first has \(8, 8, 1\), the other \(8, 6, 1\)",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(sets, words):
    with pytest.raises(ValueError, match=words):
        train.fit(gan.make_cycle, IMAGES, Run("", steps=1, batch_size=4), sets())


@pytest.mark.parametrize(
    "pool", [pytest.param(0, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.slow)]
)
def test_resume_is_exact_with_the_pools(tmp_path, pool):
    cfg = replace(IMAGES, pool=pool)
    run = Run(str(tmp_path / "whole"), steps=6, batch_size=8, save_every=2)
    whole = train.fit(gan.make_cycle, cfg, run, DIGITS)
    part = replace(run, folder=str(tmp_path / "part"))
    train.fit(gan.make_cycle, cfg, replace(part, steps=4), DIGITS)
    continued = train.fit(gan.make_cycle, cfg, part, DIGITS)
    jax.tree.map(np.testing.assert_array_equal, whole.state, continued.state)
    assert int(whole.state.extra["held"]) == 2 if pool else whole.state.extra is None
    loaded = train.load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, loaded.state.params)


@pytest.mark.slow
def test_remat_gives_the_same_update_and_bfloat16_a_near_one():
    batch = DIGITS.batch(0, 0, 8)
    sgd = Optim("sgd", lr=0.1)
    plain = replace(IMAGES, pool=0, optim=sgd, disc_optim=sgd, cycle_weight=1.0)

    def after(**options):
        family = gan.make_cycle(replace(plain, **options))
        return jax.jit(family.step)(family.init(key(0)), batch, key(1))[0].params

    wanted = after()
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), after(remat=True), wanted)
    low = after(bfloat16=True)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low))
    jax.tree.map(partial(np.testing.assert_allclose, atol=0.03), low, wanted)


@pytest.mark.slow
def test_learns_a_shift_from_pairs():
    """What unpaired points teach is measured by cycle_toys."""
    a = np.random.default_rng(0).gamma(1.0, size=(4096, 2)).astype(np.float32)
    sets = (data.from_arrays({"points": x}) for x in (a, a + 2))
    adam = Optim(lr=2e-3, b1=0.5)
    cfg = replace(POINTS, gen_widths=(32,), disc_widths=(64, 64), identity_weight=0.0, optim=adam)
    cfg = replace(cfg, disc_optim=adam, pool=50, paired_weight=10.0, ema=0.99)
    run = Run("", steps=1500, batch_size=64)
    result = train.fit(gan.make_cycle, cfg, run, data.pair(*sets, aligned=True))
    moved = cycle.translate(cfg, cycle.generators_of(cfg, result.state), a, "b")
    assert np.abs(np.asarray(moved) - (a + 2)).mean() < 0.2
