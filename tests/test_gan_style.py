"""StyleGAN2: demodulation, path lengths, mixing, truncation and noise against what is known exactly."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, gan, nn, train
from aigc_jax.gan import style
from aigc_jax.nn.style import EqualConv, EqualDense, convolve, enlarge, leaky, modulated, shrink
from aigc_jax.train import Run

DIGITS = data.load("digits")
CFG = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=6,
    gen=gan.NetConfig("style", (4, 8)),
    disc=gan.NetConfig("style", (4, 8)),
    penalty="r1",
    penalty_weight=1.0,
    lazy=16,
    mixing=0.9,
    path_length=2.0,
    ema=0.9,
)


def key(i):
    return jax.random.key(i)


def state_of(cfg=CFG):
    return jax.jit(gan.make(cfg).init)(key(0))


# ------------------------------------------------------------------------------------------- the nets


@pytest.mark.parametrize("demodulate", [False, True])
def test_modulation_is_a_kernel_per_image(demodulate):
    """By hand: each image is convolved with its own scaled, and normalised, kernel."""
    h = jax.random.normal(key(0), (3, 6, 5, 4))
    kernel, s = jax.random.normal(key(1), (3, 3, 4, 7)), jax.random.normal(key(2), (3, 4))
    out = modulated(h, kernel, s, demodulate=demodulate)
    for i in range(3):
        own = np.asarray(kernel) * np.asarray(s)[i][None, None, :, None]
        if demodulate:
            own = own / np.sqrt((own**2).sum((0, 1, 2)) + 1e-8)
        wanted = convolve(h[i : i + 1], jnp.asarray(own))[0]
        np.testing.assert_allclose(out[i], wanted, atol=1e-4)


def test_demodulated_outputs_of_unit_variance_have_unit_variance():
    """Whatever the styles: independent inputs of variance 1 give outputs of variance 1."""
    h = jax.random.normal(key(0), (16, 32, 32, 8))
    kernel = jax.random.normal(key(1), (3, 3, 8, 8))
    s = jnp.exp(2 * jax.random.normal(key(2), (16, 8)))
    inside = modulated(h, kernel, s)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inside.var((1, 2)).mean(), 1, atol=0.02)
    plain = modulated(h, kernel, s, demodulate=False)
    assert float(plain.var()) > 100


def test_equalised_layers_begin_with_unit_variance_and_keep_it():
    h = jax.random.normal(key(0), (4000, 50))
    for speed in (1.0, 0.01):
        out, variables = EqualDense(60, speed=speed).init_with_output(key(1), h)
        np.testing.assert_allclose(out.var(), 1, atol=0.05)
        np.testing.assert_allclose(variables["params"]["kernel"].std(), 1 / speed, rtol=0.05)
    np.testing.assert_allclose(jnp.square(leaky(h)).mean(), 1.04, atol=0.02)  # (1 + 0.04) / 2 * 2
    images = jax.random.normal(key(0), (4, 16, 16, 12))
    out = EqualConv(20).init_with_output(key(1), images)[0]
    np.testing.assert_allclose(out[:, 1:-1, 1:-1].var(), 1, atol=0.05)


def test_enlarged_images_are_linear_between_pixels():
    x = jnp.arange(4.0).reshape(1, 1, 4, 1) * jnp.ones((1, 4, 1, 1))
    y = np.asarray(enlarge(x))[0, 3, :, 0]
    np.testing.assert_allclose(y[1:-1], [0.25, 0.75, 1.25, 1.75, 2.25, 2.75], atol=1e-6)


def test_shrunk_images_are_filtered_before_every_second_pixel_is_taken():
    """By hand inside: each axis has the weights 1, 3, 3, 1 over 8. Constant images stay."""
    x = jax.random.normal(key(0), (2, 8, 6, 3))
    y = np.asarray(shrink(x))
    assert y.shape == (2, 4, 3, 3)
    taps = np.array([1, 3, 3, 1]) / 8
    window = np.asarray(x)[:, 1:5, 1:5]  # of the pixel (1, 1)
    np.testing.assert_allclose(y[:, 1, 1], np.einsum("bhwc,h,w->bc", window, taps, taps), atol=1e-6)
    np.testing.assert_allclose(shrink(jnp.ones((1, 4, 6, 2))), 1, rtol=1e-6)


def test_all_layers_of_the_critic_learn_at_the_same_relative_speed():
    """Its kernels begin as N(0, 1). The logits of images of variance 1 do not explode."""
    net = nn.StyleDiscriminator((8, 16))
    x, y = jax.random.normal(key(0), (64, 8, 8, 3)), jax.nn.one_hot(jnp.arange(64) % 5, 5)
    logits, variables = net.init_with_output(key(1), x, y)
    assert logits.shape == (64,) and logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if "kernel" in jax.tree_util.keystr(path):
            np.testing.assert_allclose(leaf.std(), 1, atol=5 / np.sqrt(2 * leaf.size))
    assert 0.05 < float(logits.std()) < 5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 8, 3)])
def test_noise_inputs_and_layers_are_counted(shape):
    net = nn.StyleGenerator(shape, 6, (4, 8, 8))
    H, W, _ = shape
    sizes = [(H // 4, W // 4)] + [(H // 2, W // 2)] * 2 + [(H, W)] * 2
    assert net.sizes == sizes and net.layers == 6
    assert net.noise_size == sum(h * w for h, w in sizes)
    z = jax.random.normal(key(0), (2, 6 + net.noise_size))
    x, variables = net.init_with_output(key(1), z)
    assert x.shape == (2, *shape) and x.dtype == jnp.float32
    moved = jax.tree.map(lambda p: p, variables)
    strengths = [p for p in moved["params"] if "convolutions" in p]
    assert len(strengths) == 5
    same = net.apply(variables, z.at[:, 6:].add(1.0))
    np.testing.assert_array_equal(x, same)  # noise has strength 0 at first
    for name in strengths:
        moved["params"][name]["noise"] = jnp.ones(())
    assert not np.allclose(net.apply(moved, z), net.apply(moved, z.at[:, 6:].add(1.0)))


# --------------------------------------------------------------------------------------- the training


def test_mixed_styles_are_one_z_up_to_a_layer_and_another_after_it():
    net = nn.StyleGenerator((8, 8, 1), 6, (4, 8))
    w, other = jnp.zeros((2000, 6)), jnp.ones((2000, 6))
    ws = np.asarray(style.mixed(net, w, other, 0.9, key(0)))[..., 0]
    assert ws.shape == (2000, net.layers) and (ws[:, 0] == 0).all()
    assert (np.diff(ws, axis=1) >= 0).all()
    np.testing.assert_allclose((ws[:, -1] == 1).mean(), 0.9, atol=0.02)
    first = ws[ws[:, -1] == 1].argmax(1)
    counts = np.bincount(first, minlength=net.layers)[1:]
    np.testing.assert_allclose(counts / counts.sum(), 1 / (net.layers - 1), atol=0.04)
    assert (style.mixed(net, w, other, 0.0, key(0)) == 0).all()


def test_path_length_of_a_linear_generator_is_its_frobenius_norm():
    """Images A w, one layer: the mean of the squared length is |A|_F^2 / (H W)."""
    A = jax.random.normal(key(0), (12, 5))

    def images(ws):
        return (ws[:, 0] @ A.T).reshape(-1, 4, 3, 1)

    y = jax.random.normal(key(1), (20_000, 4, 3, 1))
    lengths = style.path_lengths(images, jnp.ones((20_000, 1, 5)), y)
    wanted = float(jnp.square(A).sum()) / 12
    each = jnp.eye(12).reshape(12, 4, 3, 1)  # every direction once: exact, not on average
    exact = style.path_lengths(images, jnp.ones((12, 1, 5)), each)
    np.testing.assert_allclose(jnp.square(exact).sum(), wanted, rtol=1e-5)
    np.testing.assert_allclose(float(jnp.square(lengths).mean()), wanted, rtol=0.02)

    def two(ws):  # the same in two layers: the squares are averaged
        return images(ws[:, :1]) + images(ws[:, 1:])

    lengths = style.path_lengths(two, jnp.ones((20_000, 2, 5)), y)
    np.testing.assert_allclose(float(jnp.square(lengths).mean()), wanted, rtol=0.02)


def test_path_penalty_is_the_spread_around_a_running_mean():
    value, mean = style.path_penalty(jnp.array([1.0, 3.0]), jnp.zeros(()))
    np.testing.assert_allclose(mean, 0.02, rtol=1e-6)
    np.testing.assert_allclose(value, ((1 - 0.02) ** 2 + (3 - 0.02) ** 2) / 2, rtol=1e-6)


@pytest.mark.slow
def test_truncation_goes_to_the_mean_style():
    state = state_of()
    z = gan.noise(CFG, key(1), 4)
    variables = gan.generator_of(CFG, state)
    mean = jax.random.normal(key(2), (6,))
    variables = {**variables, "batch_stats": {"mean_style": mean}}
    x = gan.generate(CFG, variables, z, truncation=0.0)
    inputs = z[:, 6:]
    net = gan.Generator(CFG.gen, CFG.shape, latents=6)
    ws = jnp.broadcast_to(mean, (4, net.layers, 6))
    np.testing.assert_allclose(x, net.apply(variables, ws, inputs, method="images"), atol=1e-5)
    w = net.apply(variables, z, method="styles")
    half = jnp.broadcast_to((mean[None] + 0.5 * (w - mean[None]))[:, None], (4, net.layers, 6))
    half = net.apply(variables, half, inputs, method="images")
    np.testing.assert_allclose(gan.generate(CFG, variables, z, truncation=0.5), half, atol=1e-5)


@pytest.mark.slow
def test_a_step_moves_the_mean_style_and_the_mean_path():
    state, family = state_of(), gan.make(CFG)
    step = jax.jit(family.step)
    state = state._replace(step=jnp.asarray(15, jnp.int32))  # update 16: both penalties are due
    new, metrics = step(state, DIGITS.batch(0, 0, 8), key(1))
    assert float(metrics["penalty"]) > 0 and float(metrics["path"]) > 0
    assert float(new.extra["path"]) > 0
    assert np.abs(new.extra["gen"]["mean_style"]).max() > 0
    again, metrics = step(new, DIGITS.batch(0, 1, 8), key(1))
    assert float(metrics["penalty"]) == 0 and float(metrics["path"]) == 0
    assert float(again.extra["path"]) == float(new.extra["path"])


@pytest.mark.parametrize(
    "simultaneous",
    [pytest.param(None, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.soak)],
)
def test_resume_is_exact(tmp_path, simultaneous):
    """R1 is due in updates 3, 6 and 9, the path length in 4 and 8. The cut is after the sixth."""
    cfg = replace(CFG, simultaneous=simultaneous, lazy=3)
    run = Run(str(tmp_path / "whole"), steps=9, batch_size=8, save_every=3)
    whole = train.fit(gan.make, cfg, run, DIGITS)
    part = replace(run, folder=str(tmp_path / "part"))
    before = train.fit(gan.make, cfg, replace(part, steps=6), DIGITS)
    assert float(before.state.extra["path"]) > 0
    continued = train.fit(gan.make, cfg, part, DIGITS)
    jax.tree.map(np.testing.assert_array_equal, whole.state, continued.state)
    assert float(whole.state.extra["path"]) > 0
    x = train.sample(whole, key(0), n=3)
    assert x.shape == (3, 8, 8, 1) and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gen": gan.NetConfig("style", (4, 8), norm="batch")}, "gen.norm is not for kind style"),
        ({"gen": gan.NetConfig("dcgan", (4,))}, "mixing needs gen.kind style, got dcgan"),
        (
            {"gen": gan.NetConfig("dcgan", (4,)), "mixing": None},
            "path_length needs gen.kind style, got dcgan",
        ),
        ({"disc": gan.NetConfig("style", (4, 8), mapping=3)}, "disc.mapping is for the generator"),
        ({"classes": 10}, "disc of kind style takes labels by projection, not by 'concat'"),
        ({"gen": gan.NetConfig("style", (4,) * 5)}, "halve H and W 4 times"),
        ({"mixing": 1.5}, "mixing must be a share or a weight, at least 0, got 1.5"),
        ({"packing": 2}, "go with neither packing nor unrolled"),
        ({"disc": gan.NetConfig("dcgan", (4,), mapping=2)}, "disc.mapping is for kind style"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(CFG, **change)


def test_truncation_needs_a_style_generator():
    cfg = gan.Config(shape=(8, 8, 1), levels=17, latent_dim=4)
    state = jax.jit(gan.make(cfg).init)(key(0))
    with pytest.raises(ValueError, match="truncation needs a generator of kind style, got mlp"):
        gan.sample(cfg, state, key(1), n=2, truncation=0.7)
