"""The contrastive family: losses against loops and closed forms, nets, negatives over devices."""

import dataclasses
import functools
from functools import partial
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aigc_jax import contrastive, core, data, metrics, train
from aigc_jax.contrastive import Config, ImageConfig, TextConfig, info_nce, nce, sigmoid_loss

TINY = Config(
    shape=(8, 8, 3),
    levels=17,
    dim=6,
    text=TextConfig(vocab=12, context=5, width=8, layers=1, heads=2),
    image=ImageConfig(widths=(4, 8), groups=2),
)


def key(i):
    return jax.random.key(i)


@functools.cache
def begun(cfg):
    """The State before step 0; the tests share what was compiled for it."""
    return jax.jit(contrastive.make(cfg).init)(key(0))


@functools.cache
def scorer(cfg):
    """The compiled `evaluate`."""
    return jax.jit(contrastive.make(cfg).evaluate)


@functools.cache
def stepper(cfg):
    """The compiled step."""
    return jax.jit(contrastive.make(cfg).step)


def features(seed, *shape, dtype=np.float64):
    """Rows of length 1."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)


def captioned(n=40, seed=0, length=5):
    """Pictures whose mean colour is told by the first token of their caption."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(1, 6, n)
    tokens = np.zeros((n, length), np.int32)
    tokens[:, 0], tokens[:, 1] = colour, rng.integers(0, 12, n)
    image = rng.integers(0, 5, (n, 8, 8, 3)) + 2 * colour[:, None, None, None]
    return {"image": image.astype(np.uint8), "tokens": tokens}


def as_data(arrays):
    """A finite set of these arrays."""
    return data.from_arrays(arrays, levels=17)


# ------------------------------------------------------------------------------------- the losses


def loop_nce(critic, negatives):
    """-log of the share of the true pair, one number after the other."""
    losses = []
    for i, row in enumerate(critic):
        total = sum(exp(v) for j, v in enumerate(row) if j == i or negatives[i, j])
        losses.append(-log(exp(row[i]) / total))
    return losses


def loop_sigmoid(a, b, scale, bias, negatives):
    losses = []
    for i in range(len(a)):
        nats = 0.0
        for j in range(len(b)):
            if i == j or negatives[i, j]:
                z = 1 if i == j else -1
                nats += log(1 + exp(-z * (scale * float(a[i] @ b[j]) + bias)))
        losses.append(nats)
    return losses


def masks(B):
    """All pairs, and a symmetric choice of them that leaves out true pairs, too."""
    some = np.random.default_rng(5).random((B, B)) < 0.5
    return {"all": np.ones((B, B), bool), "some": some & some.T}


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("chosen", ["all", "some"])
def test_losses_are_those_of_a_loop(B, chosen):
    negatives = masks(B)[chosen]
    given = None if chosen == "all" else negatives
    a, b = features(0, B, 3), features(1, B, 3)
    with jax.enable_x64(True):
        critic = np.random.default_rng(2).standard_normal((B, B)) * 3
        np.testing.assert_allclose(
            nce(critic, negatives=given), loop_nce(critic, negatives), rtol=1e-12, atol=1e-12
        )
        expected = np.mean(
            [loop_nce(5 * a @ b.T, negatives), loop_nce(5 * b @ a.T, negatives)], axis=0
        )
        np.testing.assert_allclose(
            info_nce(a, b, 5.0, negatives=given), expected, rtol=1e-12, atol=1e-12
        )
        np.testing.assert_allclose(
            sigmoid_loss(a, b, 5.0, -2.0, negatives=given),
            loop_sigmoid(a, b, 5.0, -2.0, negatives),
            rtol=1e-12,
        )
    if B == 1:
        assert float(info_nce(a, b, 5.0)[0]) == 0.0


@pytest.mark.slow
def test_gradients_agree_with_finite_differences():
    """By both features, the scale and the bias, of losses with weights of their own per pair."""
    weight = np.random.default_rng(3).random(5)
    negatives = masks(5)["some"]

    def values(x):
        clip = (weight * info_nce(x["a"], x["b"], x["scale"], negatives=negatives)).sum()
        return clip + (weight * sigmoid_loss(x["a"], x["b"], x["scale"], x["bias"])).sum()

    with jax.enable_x64(True):
        x = {"a": features(0, 5, 3), "b": features(1, 5, 3), "scale": 7.0, "bias": -1.5}
        x = jax.tree.map(jnp.asarray, x)
        towards = jax.tree.map(
            lambda v: np.random.default_rng(v.size).standard_normal(v.shape) + 0.5, x
        )
        slope = sum(
            jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), jax.grad(values)(x), towards))
        )
        step = 1e-6
        above, below = (
            jax.tree.map(lambda v, d, step=step: v + step * d, x, towards) for step in (step, -step)
        )
        difference = (values(above) - values(below)) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-7)


@pytest.mark.parametrize("K", [1, 3, 64])
def test_equal_features_give_log_k(K):
    a = jnp.ones((K, 4)) / 2
    np.testing.assert_allclose(info_nce(a, a, 100.0), log(K), atol=1e-5)


def test_losses_hold_at_extreme_scales():
    """Right pairs cost nothing, wrong ones as much as their logit; nothing overflows."""
    a = jnp.eye(4)
    big = jnp.float32(1e4)
    np.testing.assert_allclose(info_nce(a, a, big), 0, atol=1e-6)
    np.testing.assert_allclose(info_nce(a, -a, big), 1e4 + log(3), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_loss(a, a, big, -big / 2), 0, atol=1e-6)
    np.testing.assert_allclose(sigmoid_loss(a, a, 0.0, 50.0), 150, rtol=1e-6)
    gradient = jax.grad(lambda a: info_nce(a, -a, big).sum() + sigmoid_loss(a, a, big, big).sum())(
        a
    )
    assert np.isfinite(gradient).all()


def test_siglips_gradient_at_zero_logits_is_a_half():
    """Where a formula with |x| would be wrong."""
    gradient = jax.grad(lambda b: sigmoid_loss(jnp.eye(3), jnp.eye(3), 0.0, b).sum())(0.0)
    assert float(gradient) == pytest.approx((9 - 3) / 2 - 3 / 2)


def test_order_of_the_pairs_does_not_matter():
    a, b, order = features(0, 9, 4), features(1, 9, 4), np.random.default_rng(2).permutation(9)
    for loss in (partial(info_nce, scale=8.0), partial(sigmoid_loss, scale=8.0, bias=-3.0)):
        np.testing.assert_allclose(loss(a[order], b[order]), loss(a, b)[order], rtol=1e-5)


def test_equal_captions_as_negatives_cost_log_2_and_leave_no_pull():
    """Why they are left out: as negatives they only add a constant once both pictures fit."""
    a = b = jnp.asarray(features(0, 3, 4, dtype=np.float32))
    twice = jnp.concatenate([a, a]), jnp.concatenate([b, b])
    different = np.tile(~np.eye(3, dtype=bool), (2, 2))
    plain, apart = info_nce(*twice, 50.0), info_nce(*twice, 50.0, negatives=different)
    np.testing.assert_allclose(apart[:3], info_nce(a, b, 50.0), atol=1e-5)
    assert (plain - apart > log(2) * 0.99).all()


# ----------------------------------------------------------- the bound of the mutual information


def gaussian_critic(rng, K, information, d=20):
    """log p(y|x) / p(y) of all pairs of K examples with this mutual information in nats."""
    rho = np.sqrt(1 - np.exp(-2 * information / d))
    x = rng.standard_normal((K, d))
    y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((K, d))
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None]
    return (rho * x @ y.T - rho**2 * squares / 2) / (1 - rho**2) + information


@pytest.mark.parametrize(
    "information, K, bound",
    [
        (4, 16, 2.308),
        (4, 64, 3.057),
        (4, 256, 3.534),
        (8, 16, 2.740),
        (8, 64, 4.022),
        (8, 256, 5.188),
    ],
)
def test_bound_of_the_optimal_critic_between_correlated_gaussians(information, K, bound):
    rng = np.random.default_rng(0)
    n = 12_000 // K
    critics = jnp.asarray(
        np.stack([gaussian_critic(rng, K, information) for _ in range(n)]), jnp.float32
    )
    bounds = log(K) - np.asarray(jax.jit(jax.vmap(nce))(critics)).mean(1)
    error = bounds.std() / np.sqrt(n)
    assert abs(bounds.mean() - bound) < 0.02 + 2 * error and error < 0.02
    assert bounds.mean() < min(information, log(K)) and (bounds <= log(K)).all()
    # A critic that is off by a function of x is as good; one that is off by a function of y is not.
    shifted = critics + rng.standard_normal((n, K, 1)).astype(np.float32)
    np.testing.assert_allclose(log(K) - jax.vmap(nce)(shifted).mean(1), bounds, atol=1e-4)
    worse = critics + 5 * rng.standard_normal((n, 1, K)).astype(np.float32)
    assert log(K) - jax.vmap(nce)(worse).mean() < bounds.mean() - 0.1


# --------------------------------------------------------------------------------------- the nets


@pytest.fixture(scope="module")
def params():
    drawn = begun(TINY).params
    rng = np.random.default_rng(0)  # the blocks are the identity at first: nothing to see
    return jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) if x.ndim else x, drawn
    )


TOKENS = np.array([[3, 1, 4, 0, 0], [5, 0, 0, 0, 0], [2, 7, 1, 8, 2], [0, 0, 0, 0, 0]], np.int32)


@pytest.mark.slow
def test_features_have_length_one(params):
    image = np.random.default_rng(0).random((3, 8, 8, 3)).astype(np.float32)
    a = contrastive.encode_image(TINY, params, image)
    b = contrastive.encode_text(TINY, params, TOKENS)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((3, 6), (4, 6), jnp.float32, jnp.float32)
    for x in (a, b):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6)
        assert np.abs(np.asarray(x[0] - x[1])).max() > 1e-3  # they depend on what they read


def test_unit_of_zero_is_zero_also_its_gradient():
    assert (contrastive.unit(jnp.zeros(3)) == 0).all()
    assert np.isfinite(jax.jacobian(contrastive.unit)(jnp.zeros(3))).all()


def test_unit_of_short_floats_is_computed_in_float32():
    """In float16 the square of 300 overflows, and 1e-12 is 0."""
    for dtype in (jnp.float16, jnp.bfloat16):
        found = contrastive.unit(jnp.asarray([[300, 400], [0, 0]], dtype))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.jacobian(contrastive.unit)(jnp.zeros(3, jnp.bfloat16))).all()
    with jax.enable_x64(True):
        assert contrastive.unit(jnp.ones(3, jnp.float64)).dtype == jnp.float64


@pytest.mark.slow
def test_padding_changes_nothing(params):
    """Fewer columns of padding give the same features, of each token too."""
    short, long = TOKENS[:2, :3], TOKENS[:2]
    np.testing.assert_allclose(
        contrastive.encode_text(TINY, params, short),
        contrastive.encode_text(TINY, params, long),
        atol=1e-6,
    )
    (f, mask), (f_long, mask_long) = (
        contrastive.encode_text_sequence(TINY, params, x) for x in (short, long)
    )
    np.testing.assert_allclose(f, f_long[:, :4], atol=1e-6)
    assert (mask == mask_long[:, :4]).all() and not mask_long[:, 4:].any()
    assert (np.asarray(f_long)[~np.asarray(mask_long)] == 0).all()


@pytest.mark.slow
def test_sequence_begins_with_a_token_that_every_caption_has(params):
    f, mask = contrastive.encode_text_sequence(TINY, params, TOKENS)
    assert f.shape == (4, 6, 8) and mask.shape == (4, 6)
    assert mask.sum(1).tolist() == [4, 2, 6, 1]
    pooled = f.sum(1) / mask.sum(1, keepdims=True)
    projected = pooled @ params["text"]["params"]["out"]["kernel"]
    np.testing.assert_allclose(
        contrastive.unit(projected), contrastive.encode_text(TINY, params, TOKENS), atol=1e-6
    )
    none = contrastive.encode_text(TINY, params, np.zeros((1, 0), np.int32))  # no column at all
    np.testing.assert_allclose(none[0], contrastive.encode_text(TINY, params, TOKENS)[3], atol=1e-6)


def test_order_of_words_matters_and_every_token_sees_the_others(params):
    a, b = contrastive.encode_text(TINY, params, np.array([[3, 1, 4, 0, 0], [4, 1, 3, 0, 0]]))
    assert np.abs(a - b).max() > 1e-3
    f, _ = contrastive.encode_text_sequence(
        TINY, params, np.array([[3, 1, 4, 0, 0], [3, 1, 5, 0, 0]])
    )
    assert np.abs(f[0, 1] - f[1, 1]).max() > 1e-4  # an earlier token sees a later one


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_bfloat16_and_remat_stay_close(params, remat):
    cfg = dataclasses.replace(TINY, bfloat16=not remat, remat=remat)
    batch = captioned(8)

    def loss(cfg, params):
        return contrastive.loss(cfg, params, core.State(0, None, None), batch, key(0))[0]

    (value, gradient), (other, g) = (
        jax.jit(jax.value_and_grad(partial(loss, c)))(params) for c in (TINY, cfg)
    )
    assert other.dtype == jnp.float32
    np.testing.assert_allclose(other, value, atol=1e-5 if remat else 0.15)
    close = 1e-4 if remat else 0.3
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(g), strict=True):
        assert np.abs(x - y).max() <= close * max(1, np.abs(x).max())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 5, 1), (3, 3, 3)])
def test_odd_sizes(shape):
    cfg = dataclasses.replace(TINY, shape=shape, levels=2, dim=3)
    family = contrastive.make(cfg)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 2, (5, *shape)).astype(np.uint8),
        "tokens": rng.integers(1, 12, (5, 1)).astype(np.int32),
    }
    state, values = jax.jit(family.step)(begun(cfg), batch, key(1))
    assert np.isfinite(values["loss"]) and int(state.step) == 1


def test_zero_shot_takes_the_most_similar_text():
    images, texts = features(0, 50, 4), features(1, 7, 4)
    expected = [max(range(7), key=lambda k, x=x: float(x @ texts[k])) for x in images]
    assert contrastive.zero_shot(images, texts).tolist() == expected


# ----------------------------------------------------------------------------------- the training


def stepped(cfg, state, batch, steps=1, seed=0):
    for i in range(steps):
        state, values = stepper(cfg)(state, batch, jax.random.fold_in(key(seed), i))
    return state, values


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_training_finds_the_pairs(loss):
    cfg = dataclasses.replace(TINY, loss=loss, optim=core.Optim(lr=3e-3))
    batch = captioned(16)
    state, values = stepped(cfg, begun(cfg), batch, 150)
    assert values["image_to_text"] > 0.9 and values["text_to_image"] > 0.9
    scores = scorer(cfg)(state, batch, key(1))
    assert all(x.shape == (16,) for x in scores.values())
    np.testing.assert_allclose(scores["loss_nats"].mean(), values["loss"], rtol=0.5)
    texts = contrastive.encode_text(cfg, state.params, batch["tokens"])
    images = contrastive.encode_image(cfg, state.params, contrastive.preprocess(cfg, batch))
    assert metrics.recall_at_k(images @ texts.T, None, 2) >= metrics.recall_at_k(images @ texts.T)


@pytest.mark.slow
def test_scale_starts_as_in_the_papers():
    for loss, first in (("info_nce", 1 / 0.07), ("sigmoid", 10.0)):
        params = begun(dataclasses.replace(TINY, loss=loss)).params
        assert float(contrastive.logit_scale(params)) == pytest.approx(first, rel=1e-6)
        assert float(params.get("bias", -10.0)) == -10.0 and ("bias" in params) == (
            loss == "sigmoid"
        )


@pytest.mark.slow
def test_scale_never_exceeds_100_and_comes_down_again():
    """A gradient that asks for more is cut off after the update, one that asks for less is not."""
    cfg = dataclasses.replace(TINY, scale=100.0, optim=core.Optim("sgd", lr=0.1))
    state = begun(cfg)
    batch = captioned(8)

    def slope(state):
        rest = {n: x for n, x in state.params.items() if n != "log_scale"}

        def value(log_scale):
            params = {**rest, "log_scale": log_scale}
            return contrastive.loss(cfg, params, state, batch, key(0))[0]

        return float(jax.jit(jax.grad(value))(state.params["log_scale"]))

    assert slope(state) > 1  # untrained pairs are wrong: the loss wants a smaller scale
    down, _ = stepped(cfg, state, batch)
    expected = log(100) - 0.1 * slope(state)
    assert float(down.params["log_scale"]) == pytest.approx(expected, rel=1e-4)

    def one_up(grads, params):
        return {**jax.tree.map(jnp.zeros_like, grads), "log_scale": jnp.float32(1.0)}

    up = dataclasses.replace(cfg, scale=20.0, optim=optax.stateless(one_up))
    state, scales = begun(up), []
    for i in range(3):
        state, values = stepped(up, state, batch, seed=i)
        scales.append(float(values["scale"]))
    np.testing.assert_allclose(scales, [20, 20 * exp(1), 100], rtol=1e-6)
    assert float(contrastive.logit_scale(state.params)) == pytest.approx(100, rel=1e-6)


def test_shift_moves_pictures_whole_and_only_in_training():
    cfg = dataclasses.replace(TINY, image=dataclasses.replace(TINY.image, shift=2))
    batch = captioned(30)
    still = contrastive.preprocess(cfg, batch)
    moved = np.asarray(contrastive.preprocess(cfg, batch, key(0)))
    seen = set()
    for x, y in zip(
        np.pad(still, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge"), moved, strict=True
    ):
        places = [
            (i, j) for i in range(5) for j in range(5) if (x[i : i + 8, j : j + 8] == y).all()
        ]
        assert len(places) == 1
        seen |= {*places}
    assert len(seen) > 12 and {i for i, _ in seen} == {j for _, j in seen} == {*range(5)}
    one, other = (scorer(cfg)(begun(cfg), batch, key(i))["loss_nats"] for i in (0, 1))
    assert (one == other).all()


# ------------------------------------------------------------- equal captions and filled-up batches


@pytest.mark.slow
def test_examples_with_equal_captions_are_no_negatives():
    """A batch that holds everything twice has the losses of a batch that holds it once."""
    for loss in ("info_nce", "sigmoid"):
        cfg = dataclasses.replace(TINY, loss=loss)
        once = {"image": captioned(5)["image"], "tokens": np.arange(1, 6, dtype=np.int32)[:, None]}
        twice = jax.tree.map(lambda x: np.concatenate([x, x]), once)
        a, b = (scorer(cfg)(begun(cfg), batch, key(0)) for batch in (once, twice))
        for name in ("image_to_text", "text_to_image"):
            np.testing.assert_allclose(b[name][:5], a[name])
        if loss == "info_nce":  # its negatives count double
            assert (b["loss_nats"] < a["loss_nats"][np.arange(10) % 5] + log(2)).all()


@pytest.mark.slow
def test_the_last_batch_counts_no_padding():
    """A set of 10 in batches of 8: the rows that fill the second batch up are not scored."""
    source = as_data(captioned(10))
    family = contrastive.make(TINY)
    result = train.Result(family, begun(TINY), TINY, source.info, None)
    scores = train.evaluate(result, source, batch_size=8)
    expected = {}
    for i, size in ((0, 8), (1, 2)):
        rows = data.order(10, 0, i, 8)
        batch = {n: x[rows] for n, x in source.resident[0].items()}
        values = scorer(TINY)(result.state, batch, key(0))
        for name, x in values.items():
            expected[name] = expected.get(name, 0) + float(x[:size].sum()) / 10
    for name, x in expected.items():
        assert scores[name] == pytest.approx(x, rel=1e-5)


# ------------------------------------------------------------------------------ over all devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, mapped", [("info_nce", jax.vmap), ("sigmoid", jax.vmap), ("info_nce", jax.pmap)]
)
def test_eight_devices_have_the_gradient_of_one(loss, mapped):
    """The per-device view gathers features, so each device sees all negatives, equal captions too."""
    cfg = dataclasses.replace(TINY, loss=loss, optim=core.Optim("sgd", lr=1.0))
    batch = captioned(24)
    assert len(np.unique(batch["tokens"], axis=0)) < 24
    state = begun(cfg)
    alone, values = stepped(cfg, state, batch)
    family = contrastive.make(cfg, axis_name="i")
    rows = jax.tree.map(lambda x: x.reshape(8, 3, *x.shape[1:]), batch)
    step = mapped(lambda b: family.step(state, b, key(0)), axis_name="i")
    states, shared = (jax.jit(step) if mapped is jax.vmap else step)(rows)
    for x, y, first in zip(
        jax.tree.leaves(states.params),
        jax.tree.leaves(alone.params),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        for device in range(8):
            np.testing.assert_allclose(x[device], y, atol=1e-6 * max(1, np.abs(y - first).max()))
    for name in values:
        np.testing.assert_allclose(shared[name][0], values[name], rtol=1e-5, err_msg=name)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (alone.params, state.params)), strict=True)
    ]
    assert max(moved) > 0.01


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": 0}, "model.dim must be at least 1, got 0"),
        ({"loss": "triplet"}, "model.loss must be one of info_nce, sigmoid, not 'triplet'"),
        ({"scale": 101.0}, r"model.scale must lie in \(0, 100\], got 101"),
        ({"scale": 0.0}, r"model.scale must lie in \(0, 100\], got 0"),
        ({"shape": (8, 8)}, r"model.shape must be a tuple of 3, .* not \(8, 8\)"),
        ({"shape": (8, 0, 3)}, "model.shape must be three positive numbers"),
        ({"levels": 1}, "model.levels must lie in 2..256, got 1"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"image": ImageConfig((4,), groups=2, shift=8)}, "model.image.shift must be smaller"),
    ],
)
def test_configs_that_cannot_work(change, words):
    cfg = dataclasses.replace(TINY)
    for field, value in change.items():  # in pytest, jaxtyping would refuse some before us
        object.__setattr__(cfg, field, value)
    with pytest.raises(ValueError, match=words):
        cfg.__post_init__()


def test_nets_that_cannot_work():
    with pytest.raises(ValueError, match="model.text.vocab must be at least 2, got 1"):
        TextConfig(vocab=1)
    with pytest.raises(ValueError, match="model.text.width must divide into model.text.heads"):
        TextConfig(width=10, heads=4)
    for widths in ((), (4, 6), (0,)):
        with pytest.raises(ValueError, match="model.image.widths must be multiples"):
            ImageConfig(widths, groups=4)
    with pytest.raises(ValueError, match="model.image.shift must be at least 0, got -1"):
        ImageConfig(shift=-1)


def test_inputs_that_do_not_fit(params):
    def refused(words):
        return pytest.raises(ValueError, match=words)

    with refused("tokens must lie in 0..11, got 1..12"):
        contrastive.encode_text(TINY, params, np.array([[1, 12]]))
    with refused(r"tokens must be whole numbers \[B, L\], got float32 \[2, 2\]"):
        contrastive.make(TINY).evaluate(
            begun(TINY),
            {"image": captioned(2)["image"], "tokens": np.zeros((2, 2), np.float32)},
            key(0),
        )
    with refused("model.text.context is 5, the captions have 6 tokens"):
        contrastive.encode_text(TINY, params, np.ones((2, 6), np.int32))
    with refused("image must be floats in"):
        contrastive.encode_image(TINY, params, np.zeros((1, 8, 8, 3), np.uint8))
    with refused(r"image must lie in \[0, 1\]"):
        contrastive.encode_image(TINY, params, np.full((1, 8, 8, 3), -1.0, np.float32))
    batch = {"image": captioned(2)["image"]}
    with refused("a contrastive model needs tokens in a batch, got image"):
        contrastive.make(TINY).evaluate(begun(TINY), batch, key(0))


def test_data_that_do_not_fit():
    good = as_data(captioned()).info
    TINY.check(good)
    for change, words in (
        ({"kind": "points"}, "takes pictures with captions, this data set holds points"),
        ({"caption_length": None}, "this data set holds image without captions"),
        ({"shape": (8, 8, 1)}, r"model.shape is \(8, 8, 3\), the images are \(8, 8, 1\)"),
        ({"levels": 256}, "model.levels is 17, the images have 256 levels"),
        ({"caption_length": 6}, "model.text.context is 5, the captions have 6 tokens"),
        ({"caption_vocab": 13}, "model.text.vocab is 12, the captions have a vocabulary of 13"),
    ):
        with pytest.raises(ValueError, match=words):
            TINY.check(dataclasses.replace(good, **change))


def test_a_model_without_samples_is_refused_in_one_line():
    family = contrastive.make(TINY)
    assert family.sample is None
    result = train.Result(family, None, TINY, as_data(captioned(2)).info, None)
    with pytest.raises(train.Refused, match="a contrastive model draws no samples"):
        train.sample(result, key(0), n=3)
