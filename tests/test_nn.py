"""The networks: shapes, attention against a plain softmax, caches, bfloat16 and remat."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from aigc_jax import core, ddpm, gan, nn, transformer

key = jax.random.key


def normal(seed, *shape):
    return jax.random.normal(key(seed), shape)


def shaken(variables, seed=9):
    """Variables with noise added to the parameters, because many last layers begin at 0."""
    leaves, tree = jax.tree.flatten(variables["params"])
    noise = [0.1 * normal(seed + i, *x.shape) for i, x in enumerate(leaves)]
    moved = jax.tree.unflatten(tree, [x + e for x, e in zip(leaves, noise, strict=True)])
    return {**variables, "params": moved}


# -------------------------------------------------------------------------------- all nets

TIME, LABEL = jnp.array([3.0, 700.0]), jnp.array([0, 2])
ONE_HOT = jnp.eye(3)[:2]
UNET = partial(nn.UNet, 2, 2, (4,), 1, (3,), heads=2, groups=2)
DIT = partial(nn.DiT, 2, 2, width=8, layers=1, heads=2)
DECODER = partial(nn.Decoder, layers=2, heads=2, width=8, hidden=12)
CAUSAL = nn.causal(2, 5)


def points_net(module, **mlp):
    """G or D over points, whose dtype and remat are those of its MLP."""

    def make(dtype=jnp.float32, remat=False):
        return module(mlp=partial(nn.MLP, (6, 5), **mlp, dtype=dtype, remat=remat))

    return make


# {name: (makes the module from dtype and remat, its arguments, the shape of its output)}
NETS = {
    "mlp": (partial(nn.MLP, (6, 5), "swiglu", 3, dropout=0.1), (normal(1, 2, 4),), (2, 3)),
    "unet": (partial(UNET, dropout=0.1), (normal(1, 2, 3, 5, 3), TIME, LABEL), (2, 3, 5, 2)),
    "dit": (partial(DIT, dropout=0.1), (normal(1, 2, 6, 4, 3), TIME, LABEL), (2, 6, 4, 2)),
    "time mlp": (partial(nn.TimeMLP, 3, 2, (6, 5), 0.1), (normal(1, 2, 4), TIME, LABEL), (2, 3)),
    "decoder": (partial(DECODER, context=7, dropout=0.1), (normal(1, 2, 5, 8), *CAUSAL), (2, 5, 8)),
    "rotary decoder": (
        partial(DECODER, rotary=True, norm="rms", activation="swiglu", bias=False),
        (normal(1, 2, 5, 8), *CAUSAL),
        (2, 5, 8),
    ),
    "mlp generator": (
        points_net(partial(nn.MLPGenerator, (3, 5, 1)), norm="batch", input_dropout=0.1),
        (normal(1, 2, 4), ONE_HOT, True),
        (2, 3, 5, 1),
    ),
    "mlp discriminator": (
        points_net(partial(nn.MLPDiscriminator, projection=True), activation="maxout", pieces=2),
        (normal(1, 2, 3, 5, 1), ONE_HOT, True),
        (2,),
    ),
    "dcgan generator": (
        partial(nn.ConvGenerator, (12, 20, 3), (4, 6)),
        (normal(1, 2, 4), ONE_HOT, True),
        (2, 12, 20, 3),
    ),
    "dcgan discriminator": (
        partial(nn.ConvDiscriminator, (4, 6), norm="spectral"),
        (normal(1, 2, 9, 7, 3), ONE_HOT, True),
        (2,),
    ),
    "resnet generator": (
        partial(nn.ConvGenerator, (6, 10, 3), (4,), residual=True),
        (normal(1, 2, 4), ONE_HOT, True),
        (2, 6, 10, 3),
    ),
    "resnet discriminator": (
        partial(nn.ConvDiscriminator, (4,), residual=True, projection=True, norm="batch"),
        (normal(1, 2, 6, 10, 3), ONE_HOT, True),
        (2,),
    ),
    "image encoder": (
        partial(nn.ImageEncoder, 5, (4, 6), 1, 2, 2),
        (normal(1, 2, 8, 12, 3),),
        (2, 2, 3, 5),
    ),
    "image decoder": (
        partial(nn.ImageDecoder, 1, (4, 6), 1, 2, 2),
        (normal(1, 2, 1, 2, 5),),
        (2, 4, 8, 1),
    ),
}


REMAT = (False, True, "dots")


def forward(module, variables, train):
    """Returns a function: parameters, arrays -> (output, statistics), with dropout on.

    `train` are the module's arguments after the arrays.
    """

    def run(params, *arrays):
        given = {**variables, "params": params}
        rngs = {"dropout": key(5)}
        out, new = module.apply(given, *arrays, *train, rngs=rngs, mutable=["batch_stats"])
        return (out[0] if isinstance(out, tuple) else out), new

    return run


def trained(module, variables, train):
    """Returns a function: parameters, arrays -> ((scalar, (output, statistics)), gradient)."""

    def scalar(params, *arrays):
        out, new = forward(module, variables, train)(params, *arrays)
        return (out**2).sum(), (out, new)

    return jax.value_and_grad(scalar, has_aux=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_every_net_has_bfloat16_and_remat(name):
    make, args, shape = NETS[name]
    arrays = [x for x in args if x is not True]
    variables = jax.jit(lambda k: make().init(k, *args))(key(0))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    variables = shaken(variables)
    rest = args[len(arrays) :]
    steps = {remat: trained(make(remat=remat), variables, rest) for remat in REMAT}
    for remat, step in steps.items():
        text = str(jax.make_jaxpr(step)(variables["params"], *arrays))
        assert ("checkpoint" in text or "remat" in text) == bool(remat)
        assert "bf16" not in text
    found = [jax.jit(step)(variables["params"], *arrays) for step in steps.values()]
    (_, (out, stats)), slope = found[0]
    assert out.shape == shape and out.dtype == jnp.float32 and np.abs(out).max() > 1e-3
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for (_, (again, new_stats)), new_slope in found[1:]:
        assert jax.tree.structure(stats) == jax.tree.structure(new_stats)
        jax.tree.map(close, (out, stats, slope), (again, new_stats, new_slope))

    rough = jax.jit(forward(make(dtype=jnp.bfloat16), variables, rest))
    assert "bf16" in str(jax.make_jaxpr(rough)(variables["params"], *arrays))
    value, stats = rough(variables["params"], *arrays)
    part = name in ("mlp", "decoder", "rotary decoder")  # whose output feeds other layers
    assert value.dtype == (jnp.bfloat16 if part else jnp.float32)
    assert np.abs(value.astype(np.float32) - out).max() < 0.1 * np.abs(out).max()
    assert {x.dtype for x in jax.tree.leaves(stats)} <= {jnp.dtype("float32")}


def test_nets_take_images_of_odd_sizes():
    def shape_of(module, *args):
        run = module.init_with_output
        return jax.eval_shape(lambda k: run(k, *args), key(0))[0].shape

    x = normal(1, 2, 5, 7, 1)
    assert shape_of(nn.UNet(1, 0, (4,), 1, (5,), groups=2), x, TIME) == x.shape
    assert shape_of(nn.DiT(3, 0, 8, 1, 2, patch=1), x, TIME) == (2, 5, 7, 3)
    assert shape_of(nn.ConvDiscriminator((4, 6)), x) == (2,)
    assert shape_of(nn.ConvGenerator((6, 10, 1), (4,)), normal(0, 2, 3)) == (2, 6, 10, 1)
    assert shape_of(nn.MLPGenerator((5,), partial(nn.MLP, ())), normal(0, 2, 3)) == (2, 5)
    assert shape_of(nn.MLPDiscriminator(partial(nn.MLP, (4,))), x) == (2,)
    assert nn.sinusoids(TIME, 7).shape == (2, 7) and not nn.sinusoids(TIME, 7)[:, -1].any()


def test_resolution_changes_are_inverse():
    x = normal(0, 2, 3, 5, 8)
    assert nn.pixel_shuffle(x).shape == (2, 6, 10, 2)
    np.testing.assert_array_equal(nn.pixel_shuffle(x)[0, 0, :2], x[0, 0, 0, :4].reshape(2, 2))
    np.testing.assert_array_equal(nn.pixel_unshuffle(nn.pixel_shuffle(x)), x)
    np.testing.assert_allclose(nn.blocks.downsample(nn.blocks.upsample(x)), x, rtol=1e-6)
    x = normal(0, 2, 6, 9, 2)
    patches = nn.pixel_unshuffle(x, 3)
    assert patches.shape == (2, 2, 3, 18)
    np.testing.assert_array_equal(patches[1, 1, 2], x[1, 3:6, 6:9].reshape(18))
    np.testing.assert_array_equal(nn.pixel_shuffle(patches, 3), x)


# ------------------------------------------------------------------------------- attention


def softmax_attention(params, x, mask, heads, source=None, past=None, slot=0):
    """Attention in numpy, float64: one row, head and query at a time."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = np.asarray(x, np.float64)
    source = x if source is None else np.asarray(source, np.float64)
    if "qkv" in p:
        q, k, v = np.split(x @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
    else:
        inputs = {"q": x, "k": source, "v": source}
        q, k, v = (h @ p[name]["kernel"] + p[name]["bias"] for name, h in inputs.items())
    q, k, v = (h.reshape(*h.shape[:2], heads, -1).transpose(0, 2, 1, 3) for h in (q, k, v))
    if past is not None:
        whole = [np.array(old, np.float64) for old in past]
        for old, new in zip(whole, (k, v), strict=True):
            old[:, :, slot : slot + new.shape[2]] = new
        k, v = whole
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(q.shape[:3]):
        weights = np.exp(k[b, h] @ q[b, h, t] / np.sqrt(q.shape[-1]))
        weights = weights * (1 if mask is None else np.asarray(mask)[b % len(mask), t])
        out[b, h, t] = weights @ v[b, h] / weights.sum()
    out = out.transpose(0, 2, 1, 3).reshape(x.shape)
    return out @ p["out"]["kernel"] + p["out"]["bias"]


ROWS, QUERIES, CHANNELS, HEADS = 2, 4, 6, 3
X = normal(0, ROWS, QUERIES, CHANNELS)
CONTEXT = normal(1, ROWS, 5, 4)
PAST = (normal(2, ROWS, HEADS, 7, 2), normal(3, ROWS, HEADS, 7, 2))
TRIL, _ = nn.causal(ROWS, QUERIES)
HALF = jax.random.bernoulli(key(4), 0.5, (ROWS, QUERIES, 7)).at[:, :, 2].set(True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mask_BTS": TRIL},
        {"past": PAST, "slot": 2},
        {"past": PAST, "slot": 2, "mask_BTS": HALF},
        {"context_BSE": CONTEXT},
        {"context_BSE": CONTEXT, "mask_BTS": HALF[:, :, :5]},
    ],
    ids=["all", "causal", "cache", "masked cache", "context", "masked context"],
)
def test_attention_is_a_softmax(given, fused):
    attention = nn.Attention(HEADS, fused=fused)
    if fused and "context_BSE" in given:
        with pytest.raises(ValueError, match="needs fused=False"):
            attention.init(key(0), X, **given)
        return
    variables = shaken(attention.init(key(0), X, **given))
    (out, (k, v)), sown = attention.apply(variables, X, **given, mutable="intermediates")
    mask, source = given.get("mask_BTS"), given.get("context_BSE")
    past, slot = given.get("past"), given.get("slot", 0)
    exact = softmax_attention(variables["params"], X, mask, HEADS, source, past, slot)
    np.testing.assert_allclose(out, exact, atol=1e-5)
    [weights] = sown["intermediates"]["attention"]
    S = {"past": 7, "context_BSE": 5}.get(next(iter(given), ""), QUERIES)
    assert k.shape == v.shape == (ROWS, HEADS, S, 2)
    assert weights.shape == (ROWS, HEADS, QUERIES, S)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    if mask is not None:
        assert not np.where(mask[:, None], 0, weights).any()


@pytest.mark.slow
def test_a_mask_of_ones_is_no_mask():
    attention = nn.Attention(HEADS, fused=False)
    variables = shaken(attention.init(key(0), X))
    everyone = jnp.ones((1, QUERIES, QUERIES), bool)

    def slope(*mask):
        return jax.grad(lambda x: (attention.apply(variables, x, *mask)[0] ** 2).sum())(X)

    np.testing.assert_allclose(slope(), slope(everyone), rtol=1e-4, atol=1e-5)


def test_attention_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="6 channels do not divide into 4 heads"):
        nn.Attention(4).init(key(0), X)
    with pytest.raises(ValueError, match="needs fused=False and rotary=False"):
        nn.Attention(3, fused=False, rotary=True).init(key(0), X, context_BSE=CONTEXT)
    past = (jnp.zeros((len(X), 3, 9, 2)),) * 2
    with pytest.raises(ValueError, match="with past keys needs positions_BT"):
        nn.Attention(3, rotary=True).init(key(0), X, past=past)


def test_rotary_scores_depend_on_distances():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def score(i, j):
        turned = (nn.rotate(q, jnp.array([[i]])), nn.rotate(k, jnp.array([[j]])))
        return (turned[0] * turned[1]).sum()

    np.testing.assert_allclose(score(3, 1), score(13, 11), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [False, True])
def test_a_decoder_is_causal_and_its_cache_gives_the_same(rotary):
    net = DECODER(rotary=rotary, context=0 if rotary else 7)
    x, (mask, positions) = normal(0, 2, 5, 8), CAUSAL
    variables = shaken(net.init(key(0), x, mask, positions))
    run = jax.jit(net.apply)
    full, _ = run(variables, x, mask, positions)
    other, _ = run(variables, -x.at[:, :3].multiply(-1.0), mask, positions)
    np.testing.assert_allclose(full[:, :3], other[:, :3], atol=1e-6)
    assert np.abs(full[:, 3:] - other[:, 3:]).max() > 1e-2
    slots = jnp.zeros((2, 2, 9, 4))
    cache = ((slots, slots), (slots, slots))
    for t in range(5):
        seen = jnp.broadcast_to(jnp.arange(9) <= t, (2, 1, 9))
        out, cache = run(variables, x[:, t : t + 1], seen, positions[:, t : t + 1], cache, t)
        np.testing.assert_allclose(out[:, 0], full[:, t], atol=1e-5)


@pytest.mark.slow
def test_a_condition_leaves_a_block_the_identity_at_first():
    block, x, (mask, positions) = nn.Block(2, 12), normal(0, 2, 5, 8), CAUSAL
    condition = normal(1, 2, 8)
    variables = block.init(key(0), x, mask, positions, condition_BD=condition)
    out, _ = block.apply(variables, x, mask, positions, condition_BD=condition)
    np.testing.assert_array_equal(out, x)
    out, _ = block.apply(shaken(variables), x, mask, positions, condition_BD=condition)
    assert np.abs(out - x).max() > 1e-2
    shifted = nn.modulate(x, jnp.full_like(x, 2.0), jnp.full_like(x, 0.5))
    np.testing.assert_allclose(shifted, 1.5 * x + 2)


# ---------------------------------------------------------------------------- against Flax's


@pytest.mark.slow
def test_group_norm_is_that_of_flax():
    x = 3 * normal(0, 4, 6, 6, 16) + 1
    ours, theirs = nn.GroupNorm(4), linen.GroupNorm(4)
    variables = shaken(ours.init(key(0), x))
    values = [f.apply(variables, x) for f in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)

    def slope(f):
        return jax.grad(lambda x: (f.apply(variables, x) ** 3).sum())(x)

    slopes = [slope(f) for f in (ours, theirs)]
    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_pixel_attention_is_that_of_flax():
    x = 3 * normal(0, 4, 6, 6, 16) + 1
    ours = nn.PixelAttention(2, 4)
    variables = shaken(ours.init(key(0), x))

    def flax(variables, x):
        p = variables["params"]
        h = linen.GroupNorm(4).apply({"params": p["GroupNorm_0"]}, x).reshape(4, 36, 16)
        bias = {name: p[name]["bias"][None, None] for name in "qkv"}
        q, k, v = ((h @ p[n]["kernel"] + bias[n]).reshape(4, 36, 2, 8) for n in "qkv")
        h = linen.dot_product_attention(q, k, v).reshape(x.shape)
        return x + h @ p["out"]["kernel"] + p["out"]["bias"][None, None, None]

    np.testing.assert_allclose(ours.apply(variables, x), flax(variables, x), rtol=1e-4, atol=1e-4)
    slopes = [jax.grad(lambda x, f=f: (f(variables, x) ** 2).sum())(x) for f in (ours.apply, flax)]
    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-4 * float(np.abs(slopes[0]).max()))


# ------------------------------------------------------------------------------- the families


def test_old_records_fit_the_new_fields():
    """A run recorded before a field was added continues where that field is None by default."""
    for config in (gan.nets.NetConfig(), ddpm.nets.NetConfig()):
        assert (config.dtype, config.remat) == (None, None)
    assert gan.NetConfig is gan.nets.NetConfig and ddpm.NetConfig is ddpm.nets.NetConfig


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cfg", "batch"),
    [
        (
            gan,
            gan.Config(
                shape=(2,),
                latent_dim=2,
                gen=gan.NetConfig(widths=(4,), norm="batch", dtype="bfloat16", remat=True),
                disc=gan.NetConfig(widths=(4,), norm="spectral", dtype="bfloat16", remat=True),
            ),
            {"points": np.ones((4, 2), np.float32)},
        ),
        (
            ddpm,
            ddpm.Config(
                shape=(2,), T=25, net=ddpm.NetConfig("mlp", (4,), dtype="bfloat16", remat=True)
            ),
            {"points": np.ones((4, 2), np.float32)},
        ),
        (
            transformer,
            transformer.Config(5, 4, 1, 2, 4, dtype="bfloat16", remat=True),
            {"tokens": np.ones((4, 5), np.int32)},
        ),
    ],
    ids=["gan", "ddpm", "transformer"],
)
def test_families_train_in_bfloat16(family, cfg, batch):
    made = family.make(cfg)
    state = jax.jit(made.init)(key(0))
    new, metrics = jax.jit(made.step)(state, batch, core.step_key(key(1), 0))
    dtypes = [jax.tree.map(lambda x: x.dtype, part) for part in (state, new)]
    assert dtypes[0] == dtypes[1]
    assert all(np.isfinite(value) for value in metrics.values())
