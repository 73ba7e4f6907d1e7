"""Parts of GANs: norms of critics, class-conditional BatchNorm, self-attention, augmentation."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, gan, nn
from aigc_jax.core import Optim
from aigc_jax.gan import augment

DIGITS = data.load("digits")
CONV = gan.NetConfig("dcgan", (4, 8), "leaky_relu")
CFG = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=4,
    gen=gan.NetConfig("dcgan", (4, 8), norm="batch"),
    disc=CONV,
)


def key(i):
    return jax.random.key(i)


# ------------------------------------------------------------------------------------------------ norms


def test_layer_norm_of_a_critic_is_over_a_whole_example():
    h = 3 + 2 * jax.random.normal(key(0), (2, 4, 5, 3))
    act = nn.NormAct("layer", "leaky_relu")
    y, variables = act.init_with_output(key(1), h, True)
    x = np.asarray(h)
    axes = (1, 2, 3)
    wanted = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, np.where(wanted > 0, wanted, 0.2 * wanted), atol=1e-5)
    assert variables["params"]["LayerNorm_0"]["scale"].shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "instance"])
@pytest.mark.parametrize("kind", ["dcgan", "resnet"])
def test_a_logit_depends_on_its_own_example_only(norm, kind):
    """So these norms go with the gradient penalty, which BatchNorm does not."""
    disc = replace(CONV, kind=kind, norm=norm)
    cfg = replace(CFG, disc=disc, loss="wasserstein", penalty="gp")
    state = jax.jit(gan.make(cfg).init)(key(0))
    disc_state = {"params": state.params["disc"], "batch_stats": state.extra["disc"]}
    x = jax.random.normal(key(1), (4, 8, 8, 1))
    discriminate = jax.jit(partial(gan.discriminate, cfg))
    together = discriminate(disc_state, x)
    alone = jnp.concatenate([discriminate(disc_state, x[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    new, metrics = jax.jit(gan.make(cfg).step)(state, DIGITS.batch(0, 0, 8), key(2))
    assert np.isfinite(metrics["penalty"]) and int(new.step) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dcgan", "resnet"])
def test_batch_norm_by_class(kind):
    """At first all classes have scale 1 and bias 0. Later each has its own; moments are shared."""
    h, y = jax.random.normal(key(0), (6, 3, 3, 2)), jax.nn.one_hot(jnp.arange(6) % 2, 2)
    act = nn.NormAct("class_batch", "relu")
    variables = act.init(key(1), h, True, y)
    plain = nn.NormAct("batch", "relu")
    same = plain.apply(plain.init(key(1), h, True), h, True, mutable=["batch_stats"])[0]
    first, _ = act.apply(variables, h, True, y, mutable=["batch_stats"])
    np.testing.assert_allclose(first, same, atol=1e-6)
    table = jnp.array([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, -1.0]])  # [class, scale and bias]
    params = {"classes": {"kernel": table}}
    out, _ = act.apply({**variables, "params": params}, h, True, y, mutable=["batch_stats"])
    x = np.asarray(h)
    z = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    wanted = z.copy()
    wanted[::2, ..., 0] = 2 * z[::2, ..., 0] + 0.5
    wanted[1::2, ..., 1] -= 1
    np.testing.assert_allclose(out, np.maximum(wanted, 0), atol=1e-4)
    cfg = replace(CFG, classes=10, gen=replace(CFG.gen, kind=kind, norm="class_batch"))
    state = jax.jit(gan.make(cfg).init)(key(0))
    new, _ = jax.jit(gan.make(cfg).step)(state, DIGITS.batch(0, 0, 8), key(1))
    tables = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(new.params["gen"])
        if "classes" in jax.tree_util.keystr(path)
    ]
    assert tables and all(float(jnp.abs(x).max()) > 0 for x in tables)


# -------------------------------------------------------------------------------------------- attention


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dcgan", "resnet"])
def test_attention_is_the_identity_at_first_and_learns(kind):
    gen, disc = replace(CFG.gen, kind=kind, attention=4), replace(CONV, kind=kind, attention=4)
    cfg = replace(CFG, gen=gen, disc=disc)
    state = jax.jit(gan.make(cfg).init)(key(0))
    bare = replace(cfg, gen=replace(gen, attention=None), disc=replace(disc, attention=None))

    def without(tree):
        return {name: x for name, x in tree.items() if name != "attention"}

    z = gan.noise(cfg, key(1), 3)
    params = state.params
    for net in ("gen", "disc"):
        assert "attention" in params[net]
    stats = state.extra["gen"]
    generate, discriminate = (
        jax.jit(f, static_argnums=0) for f in (gan.generate, gan.discriminate)
    )
    x = generate(cfg, {"params": params["gen"], "batch_stats": stats}, z)
    plain = {"params": without(params["gen"]), "batch_stats": stats}
    np.testing.assert_allclose(x, generate(bare, plain, z), atol=1e-6)
    logits = discriminate(cfg, {"params": params["disc"]}, x)
    plain = {"params": without(params["disc"])}
    np.testing.assert_allclose(logits, discriminate(bare, plain, x), atol=1e-6)
    new, _ = jax.jit(gan.make(cfg).step)(state, DIGITS.batch(0, 0, 8), key(2))
    for net in ("gen", "disc"):
        changed = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()),
            new.params[net]["attention"],
            params[net]["attention"],
        )
        assert max(jax.tree.leaves(changed)) > 0


# ----------------------------------------------------------------------------------------- augmentation


def test_colours_change_as_the_paper_says():
    x = jax.random.uniform(key(0), (5, 4, 4, 3), minval=-1, maxval=1)
    y = np.asarray(augment.change_colour(x, key(1)))
    b, s, c = (np.asarray(u) for u in jax.random.uniform(key(1), (3, 5, 1, 1, 1)))
    wanted = np.asarray(x) + b - 0.5
    grey = wanted.mean(-1, keepdims=True)
    wanted = (wanted - grey) * 2 * s + grey
    mean = wanted.mean((1, 2, 3), keepdims=True)
    wanted = (wanted - mean) * (c + 0.5) + mean
    np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 16, 3)])
def test_images_are_moved_by_at_most_an_eighth(shape):
    x = 1 + jax.random.uniform(key(0), (64, *shape))
    y = np.asarray(augment.move(x, key(1)))
    most = [int(side / 8 + 0.5) for side in shape[:2]]
    shifts = np.asarray(
        jax.random.randint(key(1), (64, 2), -jnp.array([most]), jnp.array([most]) + 1)
    )
    assert {tuple(s) for s in shifts} >= {(most[0], most[1]), (-most[0], -most[1])}
    for image, moved, (i, j) in zip(np.asarray(x), y, shifts, strict=True):
        padded = np.pad(image, [(most[0],) * 2, (most[1],) * 2, (0, 0)])
        top, left = most[0] + i, most[1] + j
        np.testing.assert_array_equal(moved, padded[top : top + shape[0], left : left + shape[1]])


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 10, 2)])
def test_half_of_each_side_is_cut_out(shape):
    x = jnp.ones((256, *shape))
    y = np.asarray(augment.cut_out(x, key(1)))
    size = [int(side / 2 + 0.5) for side in shape[:2]]
    holes = 1 - y[..., 0]
    assert holes.sum((1, 2)).max() == size[0] * size[1]
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns)  # a rectangle
        assert 0 < len(rows) <= size[0] and 0 < len(columns) <= size[1]
    assert holes.any(0).all()  # every pixel may be cut


def test_augmentation_is_differentiable_and_each_image_has_its_own():
    x = jax.random.uniform(key(0), (3, 8, 8, 3), minval=-1, maxval=1)
    gradient = jax.grad(lambda x: gan.diff_augment(x, key(1)).sum())(x)
    assert np.isfinite(gradient).all() and (np.abs(gradient) > 0).any((1, 2, 3)).all()
    same = jnp.broadcast_to(x[:1], x.shape)
    y = gan.diff_augment(same, key(1))
    assert not np.allclose(y[0], y[1]) and not np.allclose(y[1], y[2])


@pytest.mark.slow
def test_both_nets_train_on_augmented_images():
    """With D at rest and linear, G's loss is D's logit of the augmented fakes."""
    still = Optim("sgd", lr=0.0)
    options = {"loss": "wasserstein", "penalty": "clip", "penalty_weight": 10.0}
    cfg = replace(CFG, augment="diff", optim=still, disc_optim=still, **options)
    state = jax.jit(gan.make(cfg).init)(key(0))
    batch = DIGITS.batch(0, 0, 8)
    _, metrics = jax.jit(gan.make(cfg).step)(state, batch, key(1))
    k_disc, k_gen = jax.random.split(key(1))
    k_fake, _, _, k_augment = jax.random.split(k_gen, 4)
    fake, _ = gan._fake_examples(
        cfg, state.params["gen"], state.extra["gen"], jnp.zeros((8, 0)), k_fake, None
    )
    seen = gan.diff_augment(fake, jax.random.split(k_augment)[1])
    disc = {"params": state.params["disc"]}
    logits = gan.discriminate(cfg, disc, seen)
    np.testing.assert_allclose(metrics["gen_loss"], -logits.mean(), rtol=1e-4)
    k_augment = jax.random.split(jax.random.fold_in(k_disc, 0), 3)[2]
    real = gan.diff_augment(gan.preprocess(cfg, batch), jax.random.split(k_augment)[0])
    real_logit = gan.discriminate(cfg, disc, real).mean()
    np.testing.assert_allclose(metrics["real_logit"], real_logit, rtol=1e-4)


# --------------------------------------------------------------------------------------------- penalties

LINEAR = gan.Config(
    shape=(2,),
    latent_dim=2,
    gen=gan.NetConfig(widths=()),
    disc=gan.NetConfig(widths=()),
    loss="relativistic",
    penalty="r1_r2",
    penalty_weight=3.0,
)


def test_r1_and_r2_of_a_linear_critic_are_known():
    """D(x) = <w, x> has the slope |w|^2 at real examples and at fakes."""
    state = gan.make(LINEAR).init(key(0))
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    _, metrics = jax.jit(gan.make(LINEAR).step)(state, {"points": x}, key(1))
    [w] = [w for w in jax.tree.leaves(state.params["disc"]) if w.shape == (2, 1)]
    np.testing.assert_allclose(metrics["penalty"], 2 * float((w**2).sum()), rtol=1e-5)
    r1 = replace(LINEAR, penalty="r1")
    _, metrics = jax.jit(gan.make(r1).step)(state, {"points": x}, key(1))
    np.testing.assert_allclose(metrics["penalty"], float((w**2).sum()), rtol=1e-5)


def test_lazy_penalties_come_at_every_few_steps_with_more_weight():
    """In the last of four updates: the weight times 4. In the others: the loss alone."""
    lazy, plain = replace(LINEAR, lazy=4), replace(LINEAR, penalty="none")
    state = gan.make(LINEAR).init(key(0))
    batch = {"points": np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)}
    steps = [jax.jit(gan.make(c).step) for c in (lazy, replace(LINEAR, penalty_weight=12.0), plain)]
    for i in (0, 2, 3, 7):
        at = state._replace(step=jnp.asarray(i, jnp.int32))
        found, heavy, bare = (step(at, batch, key(1)) for step in steps)
        wanted = heavy if i % 4 == 3 else bare
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            found[0].params,
            wanted[0].params,
        )
        assert (float(found[1]["penalty"]) > 0) == (i % 4 == 3)


def test_a_relativistic_gan_learns_where_the_data_are():
    """Points around (3, 0): a bias of G moves there."""
    optim = Optim("sgd", lr=0.1)
    cfg = replace(LINEAR, optim=optim, disc_optim=optim, penalty_weight=1.0)
    family = gan.make(cfg)
    state, step = family.init(key(0)), jax.jit(family.step)
    x = np.random.default_rng(0).normal(size=(256, 2)).astype(np.float32) + np.float32([3, 0])
    for i in range(400):
        state, _ = step(state, {"points": x}, jax.random.fold_in(key(1), i))
    mean = gan.sample(cfg, state, key(2), n=2000).mean(0)
    np.testing.assert_allclose(mean, x.mean(0), atol=0.3)


# --------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gen": replace(CFG.gen, norm="layer")}, "gen.norm 'layer' is for the discriminator"),
        (
            {"disc": replace(CONV, norm="class_batch")},
            "disc.norm 'class_batch' is for the generator",
        ),
        ({"gen": replace(CFG.gen, norm="class_batch")}, "gen.norm 'class_batch' needs classes"),
        ({"disc": gan.NetConfig(norm="instance")}, "are for kinds dcgan and resnet, not mlp"),
        ({"disc": gan.NetConfig(attention=4)}, "are for kinds dcgan and resnet, not mlp"),
        ({"gen": replace(CFG.gen, attention=16)}, r"must be a height of its maps \(4\); got 16"),
        ({"disc": replace(CONV, attention=8)}, r"must be a height of its maps \(4, 2\); got 8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(CFG, **change)


@pytest.mark.parametrize(
    ("change", "got"),
    [({"lazy": 0}, "0 and r1_r2"), ({"lazy": 4, "penalty": "none"}, "4 and none")],
)
def test_lazy_needs_a_penalty(change, got):
    with pytest.raises(ValueError, match=f"lazy must be at least 1.*got {got}"):
        replace(LINEAR, **change)


def test_augmentation_is_for_images():
    with pytest.raises(ValueError, match="augment is for images"):
        gan.Config(shape=(2,), augment="diff")
