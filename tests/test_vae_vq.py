"""The VQ-VAE against hand-made gradients, a NumPy codebook, and clusters whose codes are known."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from aigc_jax import data, vae
from aigc_jax.core import Optim
from aigc_jax.vae import autoencoder, vq

CFG = vae.VQConfig(
    shape=(4, 8, 3), codes=7, code_dim=3, widths=(4, 6), blocks=1, groups=2, scale=0.1
)
key = jax.random.key


def batch_of(n=4, cfg=CFG, seed=0):
    pixels = np.random.default_rng(seed).integers(0, cfg.levels, (n, *cfg.shape), np.uint8)
    return {"image": pixels}


def state_of(cfg=CFG):
    return jax.jit(vae.make_vq(cfg).init)(key(1))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# -------------------------------------------------------------------------------- the nearest code


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_nearest_code_is_that_of_brute_force(dtype):
    codes, z = normal(0, 7, 3), normal(1, 2, 5, 4, 3).astype(dtype)
    exact = np.square(np.float64(z)[..., None, :] - np.float64(codes)).sum(-1)
    found = vq.nearest(codes, z)
    assert found.dtype == jnp.int32 and found.shape == (2, 5, 4)
    np.testing.assert_array_equal(found, exact.argmin(-1))
    assert len(np.unique(found)) > 3


def test_distances_far_from_0_do_not_cancel():
    """Codes 1/32 apart around 3000: |z|^2 + |e|^2 - 2 z e has no digit of their distances left."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(3000 + rng.permutation(64)[:, None] / 32 * np.ones(3), jnp.float32)
    chosen = rng.integers(0, 64, 200)
    z = codes[chosen] + jnp.asarray(rng.uniform(-0.01, 0.01, (200, 3)), jnp.float32)
    np.testing.assert_array_equal(vq.nearest(codes, z), chosen)
    products = (z**2).sum(-1)[:, None] + (codes**2).sum(-1)[None] - 2 * z @ codes.T
    assert (products.argmin(-1) != chosen).mean() > 0.3  # so the case is hard


def test_of_equal_codes_the_first_is_taken():
    codes = jnp.asarray([[1.0], [0.0], [0.0], [1.0]])
    np.testing.assert_array_equal(vq.nearest(codes, jnp.asarray([[0.1], [2.0]])), [1, 0])


# -------------------------------------------------------------------------------------- gradients


def test_straight_through_copies_the_gradient():
    z, e, g = normal(0, 2, 3), normal(1, 2, 3), normal(2, 2, 3)
    value, vjp = jax.vjp(vq.straight_through, z, e)
    np.testing.assert_allclose(value, e, atol=1e-6)
    np.testing.assert_array_equal(vjp(g)[0], g)
    assert (vjp(g)[1] == 0).all()


@pytest.mark.slow
def test_gradients_by_hand():
    """Decoder: as for fixed codes. Encoder: dL/dz_e = dL/dz_q + 2 commitment (z_e - e) / B."""
    cfg, batch = dataclasses.replace(CFG, commitment=0.7), batch_of()
    state = state_of(cfg)
    x, codes = vq.preprocess(cfg, batch), state.extra["codes"]
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(key(3), a.shape), state.params)
    z, vjp = jax.vjp(lambda p: vq.encode_vectors(cfg, p, x), params)
    e = codes[vq.nearest(codes, z)]

    def minus_log_p(params, z_q):
        return -vq.log_likelihood(cfg, x, vq.decode_vectors(cfg, params, z_q)).mean()

    d_params, d_z_q = jax.grad(minus_log_p, (0, 1))(params, e)
    d_encoder = vjp(d_z_q + 2 * 0.7 * (z - e) / len(x))[0]["encoder"]
    hidden = state._replace(params=None)
    got = jax.grad(lambda p: vq.loss(cfg, p, hidden, batch, key(0))[0])(params)
    close = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    jax.tree.map(close, got, {"encoder": d_encoder, "decoder": d_params["decoder"]})
    assert max(np.abs(a).max() for a in jax.tree.leaves(got["encoder"])) > 0.1

    def of_codes(codes):
        extra = {**state.extra, "codes": codes}
        return vq.loss(cfg, params, hidden._replace(extra=extra), batch, key(0))[0]

    slope = jax.grad(of_codes)(codes)
    assert (slope == 0).all()  # the codebook moves by its average alone


@pytest.mark.slow
def test_the_loss_is_its_terms():
    batch, state = batch_of(), state_of()
    x, codes = vq.preprocess(CFG, batch), state.extra["codes"]
    value, (book, found) = vq.loss(CFG, state.params, state, batch, key(0))
    z = np.float64(vq.encode_vectors(CFG, state.params, x))
    indices = vq.nearest(codes, jnp.asarray(z, jnp.float32))
    e = np.asarray(codes)[indices]
    distance = np.square(z - e).sum((1, 2, 3)).mean()
    log_p = vq.log_likelihood(CFG, x, vq.decode_vectors(CFG, state.params, jnp.asarray(e))).mean()
    np.testing.assert_allclose(value, 0.25 * distance - log_p, rtol=1e-5)
    np.testing.assert_allclose(found["commitment"], distance, rtol=1e-5)
    np.testing.assert_allclose(found["reconstruction_nats"], log_p, rtol=1e-5)
    n = np.bincount(np.ravel(indices), minlength=7)
    share = n[n > 0] / n.sum()
    entropy = -(share * np.log(share)).sum()
    np.testing.assert_allclose(found["perplexity"], np.exp(entropy), rtol=1e-5)
    assert book.keys() == state.extra.keys()


# ------------------------------------------------------------------------------------- the codebook


@pytest.mark.slow
def test_the_moving_average_is_numpys():
    """Ten updates with offsets, and one code far away that nothing ever chooses."""
    cfg = dataclasses.replace(CFG, decay=0.8)
    book = vq.start_codebook(cfg, key(0))
    book["codes"] = book["codes"].at[2].set(1e4)
    book["sum"] = book["codes"]
    codes, count = np.float64(book["codes"]), np.ones(7)
    total = codes.copy()
    for i in range(10):
        z = 5 + normal(i, 3, 2, 4, 3)
        indices = vq.nearest(book["codes"], z)
        book, n = vq.update_codebook(cfg, book, z, indices, key(i))
        vectors = np.float64(z).reshape(-1, 3)
        chosen = np.square(vectors[:, None] - codes).sum(-1).argmin(-1)
        np.testing.assert_array_equal(indices.reshape(-1), chosen)
        np.testing.assert_array_equal(n, np.bincount(chosen, minlength=7))
        count = 0.8 * count + 0.2 * np.bincount(chosen, minlength=7)
        sums = np.stack([vectors[chosen == k].sum(0) for k in range(7)])
        total = 0.8 * total + 0.2 * sums
        codes = total / count[:, None]
        np.testing.assert_allclose(book["count"], count, rtol=1e-5)
        np.testing.assert_allclose(book["codes"], codes, rtol=1e-4)
    assert count[2] < 0.2 and (book["codes"][2] > 9990).all()


def test_a_code_that_is_never_chosen_stays_for_ever():
    """Its count underflows; its place is kept, and it is no NaN."""
    cfg = dataclasses.replace(CFG, decay=0.5)
    book = vq.start_codebook(cfg, key(0))
    before, z = book["codes"], book["codes"][3][None, None, None]
    indices = jnp.full((1, 1, 1), 3, jnp.int32)
    update = jax.jit(partial(vq.update_codebook, cfg))
    for _ in range(200):
        book, _ = update(book, z, indices, key(0))
    assert book["count"][0] == 0
    np.testing.assert_allclose(book["codes"], before, rtol=1e-5)


def test_perplexity_of_known_shares():
    assert vq.perplexity(jnp.full(8, 3.0)) == pytest.approx(8, rel=1e-6)
    assert vq.perplexity(jnp.zeros(8).at[2].set(5.0)) == pytest.approx(1, rel=1e-6)
    half = vq.perplexity(jnp.zeros(8).at[:2].set(5.0))
    assert half == pytest.approx(2, rel=1e-6)
    share = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(share * np.log(share)).sum())
    assert vq.perplexity(jnp.asarray(4 * share)) == pytest.approx(expected, rel=1e-6)
    indices = jnp.asarray([[[0, 3], [3, 3]]])
    np.testing.assert_array_equal(vq.usage(indices, 5), [1, 0, 0, 3, 0])


def clusters(K, seed):
    """K cluster centres at least 5 apart, and 32 vectors of each with noise of 0.1."""
    side = int(np.ceil(np.sqrt(K)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 2), -1).reshape(-1, 2)[:K]
    noise = np.random.default_rng(seed).normal(size=(32, K, 2))
    return jnp.asarray((5 * grid + 0.1 * noise)[:, None], jnp.float32)  # [32, 1, K, 2]


@pytest.mark.parametrize("restart", [0.0, 0.6])
def test_each_cluster_gets_a_code_of_its_own(restart):
    """From a start at which one code is the nearest to all: without restarts it stays alone."""
    K = 6
    cfg = dataclasses.replace(CFG, codes=K, code_dim=2, decay=0.9, restart=restart)
    book = vq.start_codebook(cfg, key(0))
    book["codes"] = jnp.full((K, 2), 100.0) + jnp.arange(K)[:, None]
    book["sum"] = book["codes"]

    def update(book, i):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(key(1), i), (32, 1, K, 2))
        z = clusters(K, 0) + noise
        book, n = vq.update_codebook(
            cfg, book, z, vq.nearest(book["codes"], z), jax.random.fold_in(key(2), i)
        )
        return book, vq.perplexity(n)

    book, perplexities = jax.lax.scan(update, book, jnp.arange(600))
    used = vq.nearest(book["codes"], clusters(K, 5))[:, 0]  # [32, K]
    if not restart:
        assert perplexities[-1] == pytest.approx(1) and len(np.unique(used)) == 1
        return
    assert (used == used[:1]).all() and len(np.unique(used)) == K
    centres = np.asarray(clusters(K, 0).mean((0, 1)))
    found = np.asarray(book["codes"])[np.asarray(used[0])]
    np.testing.assert_allclose(found, centres, atol=0.15)
    assert perplexities[-1] == pytest.approx(K, rel=1e-5)


def restarted(k, cfg=None):
    """A batch, and the codebook after it, of which the codes 0 and 4 were dead."""
    cfg = cfg or dataclasses.replace(CFG, restart=0.5)
    book = vq.start_codebook(cfg, key(0))
    count = jnp.full(7, 8.0).at[jnp.asarray([0, 4])].set(0.01)
    codes = book["codes"].at[jnp.asarray([0, 4])].set(50.0)
    book = {"codes": codes, "count": count, "sum": codes * count[:, None]}
    z = normal(3, 4, 2, 4, 3)
    indices = vq.nearest(codes, z)
    return z, codes, vq.update_codebook(cfg, book, z, indices, k)[0]


def test_dead_codes_move_to_vectors_of_the_batch():
    z, codes, book = restarted(key(5))
    _, _, same = restarted(key(5))
    _, _, other = restarted(key(6))
    jax.tree.map(np.testing.assert_array_equal, book, same)
    dead = np.array([0, 4])
    vectors = np.asarray(z).reshape(-1, 3)
    for k in dead:
        assert (np.abs(vectors - np.asarray(book["codes"][k])).sum(1) == 0).any()
    assert (other["codes"][dead] != book["codes"][dead]).any()
    _, _, still = restarted(key(5), CFG)
    alive = np.delete(np.arange(7), dead)
    for name in book:
        np.testing.assert_array_equal(book[name][alive], still[name][alive])
    np.testing.assert_allclose(still["codes"][dead], codes[dead], rtol=1e-6)
    np.testing.assert_allclose(book["count"][dead], still["count"].mean(), rtol=1e-5)
    expected = book["codes"] * book["count"][:, None]
    np.testing.assert_allclose(book["sum"], expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- devices, parts, dtypes


@pytest.mark.slow
def test_eight_devices_keep_one_codebook():
    """Counts and sums are those of all devices; restarts draw from all of them."""
    z = normal(0, 16, 2, 4, 3)
    for restart in (0.0, 0.9):
        cfg = dataclasses.replace(CFG, restart=restart)
        book = vq.start_codebook(cfg, key(0))
        indices = vq.nearest(book["codes"], z)
        one, n = vq.update_codebook(cfg, book, z, indices, key(1))

        def device(z, indices, k, cfg=cfg, book=book):
            return vq.update_codebook(cfg, book, z, indices, k, axis_name="i")

        rows = (a.reshape(8, 2, *a.shape[1:]) for a in (z, indices))
        books, ns = jax.vmap(device, axis_name="i")(*rows, jax.random.split(key(2), 8))
        for name in one:
            assert (books[name] == books[name][:1]).all()
        np.testing.assert_allclose(ns[0], n)
        np.testing.assert_allclose(books["count"][0], one["count"], rtol=1e-6)
        if not restart:
            np.testing.assert_allclose(books["codes"][0], one["codes"], rtol=1e-5, atol=1e-6)
            continue
        moved = np.flatnonzero(np.asarray(0.99 + 0.01 * n) < 0.9 * np.mean(0.99 + 0.01 * n))
        assert len(moved)
        vectors = np.asarray(z).reshape(8, -1, 3)
        for k in moved:  # code k comes from device k
            found = np.abs(vectors[k % 8] - np.asarray(books["codes"][0, k])).sum(-1)
            assert found.min() < 1e-6


def test_a_mesh_of_eight_devices_restarts_the_same_codes():
    """jit over a mesh sees the whole batch: same draws, same codebook, and no device gets all rows."""
    cfg = dataclasses.replace(CFG, restart=0.9)
    z, book = normal(0, 512, 2, 4, 3), vq.start_codebook(cfg, key(0))
    indices = vq.nearest(book["codes"], z)
    update = jax.jit(partial(vq.update_codebook, cfg))
    one, n = update(book, z, indices, key(1))
    assert (one["codes"] != vq.update_codebook(CFG, book, z, indices, key(1))[0]["codes"]).any()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        args = book, jax.device_put(z, rows), jax.device_put(indices, rows), key(1)
        compiled = update.lower(*args).compile()
        many, m = compiled(*args)
    np.testing.assert_array_equal(n, m)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-5)
    gathered = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    assert not [s for s in gathered if s and np.prod([int(d) for d in s.split(",")]) >= 4096]


@pytest.mark.slow
def test_bfloat16_convolutions_leave_codes_and_losses_in_float32():
    batch, state = batch_of(), state_of()
    for cfg in (CFG, dataclasses.replace(CFG, bfloat16=True)):
        value, (book, found) = vq.loss(cfg, state.params, state, batch, key(0))
        assert value.dtype == jnp.float32 and jnp.isfinite(value)
        assert {a.dtype for a in (*book.values(), *found.values())} == {jnp.dtype("float32")}
    z = normal(0, 2, 2, 4, 3)
    book = vq.start_codebook(CFG, key(0))
    half = vq.update_codebook(CFG, book, z.astype(jnp.bfloat16), jnp.zeros((2, 2, 4), int), key(0))
    full = vq.update_codebook(CFG, book, z, jnp.zeros((2, 2, 4), int), key(0))
    assert half[0]["codes"].dtype == jnp.float32
    np.testing.assert_allclose(half[0]["codes"], full[0]["codes"], atol=0.01)


@pytest.mark.parametrize("make", ["kl", pytest.param("vq", marks=pytest.mark.slow)])
def test_x64_changes_no_dtype_of_a_state_or_a_sample(make):
    if make == "vq":
        family = vae.make_vq(dataclasses.replace(CFG, restart=0.5, ema=0.9, micro=2))
    else:
        cfg = vae.AutoencoderConfig(shape=CFG.shape, widths=(4,), groups=2, ema=0.9, micro=2)
        family = vae.make_autoencoder(cfg)
    batch, state = batch_of(), jax.eval_shape(family.init, key(0))
    with jax.enable_x64(True):
        assert jax.eval_shape(family.init, key(0)) == state
        assert jax.eval_shape(family.step, state, batch, key(0))[0] == state
        values = jax.eval_shape(family.evaluate, state, batch, key(0))
        drawn = jax.eval_shape(partial(family.sample, n=2), state, key(0))
    assert {a.dtype for a in (*values.values(), drawn)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_the_average_keeps_codes_and_encoder_together():
    """With a decay the average is of parameters and codes, and evaluation uses both."""
    cfg = dataclasses.replace(CFG, ema=0.9)
    family = vae.make_vq(cfg)
    state, step = family.init(key(0)), jax.jit(family.step)
    states = [state]
    for i in range(3):
        states.append(step(states[-1], batch_of(seed=i), key(i))[0])
    expected = states[0].extra["codes"]
    for t, state in enumerate(states[1:]):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * state.extra["codes"]
    w = vq.weights(cfg, states[-1])
    np.testing.assert_allclose(w["codes"], expected, rtol=1e-5, atol=1e-6)
    x = vq.preprocess(cfg, batch_of())
    found = family.evaluate(states[-1], batch_of(), key(0))
    x_hat = vq.decode(cfg, w, vq.encode(cfg, w, x))
    np.testing.assert_allclose(found["mse"], np.square(x - x_hat).mean((1, 2, 3)), rtol=1e-5)
    plain = vq.weights(CFG, states[-1])
    np.testing.assert_array_equal(plain["codes"], states[-1].extra["codes"])


# ----------------------------------------------------------------------------------- the entrances


@pytest.mark.slow
def test_indices_and_images():
    state, x = state_of(), autoencoder.preprocess(CFG, batch_of())
    w = vq.weights(CFG, state)
    indices = vq.encode(CFG, w, x)
    assert indices.dtype == jnp.int32 and indices.shape == (4, 2, 4) == (4, *CFG.latent_shape)
    assert indices.min() >= 0 and indices.max() < 7
    x_hat = vq.decode(CFG, w, indices)
    assert x_hat.shape == x.shape and x_hat.min() >= 0 and x_hat.max() <= 1
    z_q = w["codes"][indices]
    expected = jnp.clip(vq.decode_vectors(CFG, w, z_q), 0, 1)
    np.testing.assert_array_equal(x_hat, expected)
    found = vae.make_vq(CFG).evaluate(state, batch_of(), key(0))
    np.testing.assert_allclose(found["kl_nats"], 8 * np.log(7), rtol=1e-6)
    bound = found["kl_nats"] - found["reconstruction_nats"]
    np.testing.assert_allclose(found["nll_nats"], bound, rtol=1e-6)
    np.testing.assert_allclose(found["nll_nats_per_dim"], bound / 96, rtol=1e-6)
    np.testing.assert_allclose(found["psnr_db"], -10 * np.log10(found["mse"]), rtol=1e-5)


def test_wrong_indices():
    w = vq.weights(CFG, state_of())
    for wrong in (-1, 7):
        indices = jnp.zeros((2, 2, 4), int).at[1, 0, 0].set(wrong)
        x_hat = vq.decode(CFG, w, indices)
        assert jnp.isnan(x_hat[1]).any() and jnp.isfinite(x_hat[0]).all()
    with pytest.raises(ValueError, match=r"indices must be \[B, 2, 4\], got \(2, 4, 2\)"):
        vq.decode(CFG, w, jnp.zeros((2, 4, 2), int))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (5, 8, 3)}, "divisible by 2, .* got 5 x 8 pixels"),
        ({"codes": 0}, "model.codes must be at least 1, got 0"),
        ({"code_dim": 0}, "model.code_dim must be at least 1, got 0"),
        ({"decay": 1.0}, r"model.decay must lie in \[0, 1\), got 1\.0"),
        ({"restart": -0.1}, r"model.restart must lie in \[0, 1\), got -0\.1"),
        ({"commitment": -1.0}, "model.commitment must be at least 0"),
        ({"scale": -1.0}, "model.scale must be positive"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as e:
        dataclasses.replace(CFG, **change)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"model.shape is \(4, 8, 3\), the images are \(8, 8, 1\)"):
        CFG.check(data.load("digits").info)


@pytest.mark.slow
def test_training_gives_each_of_six_pictures_codes_of_its_own():
    """Six plain colours, one latent per picture, six codes: each colour ends with its own code."""
    colours = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250] * 3, [250, 250, 0]])
    images = np.broadcast_to(colours[:, None, None], (6, 2, 2, 3)).astype(np.uint8)
    cfg = vae.VQConfig(
        shape=(2, 2, 3),
        codes=6,
        code_dim=2,
        decay=0.9,
        restart=0.6,
        widths=(8,),
        blocks=1,
        groups=2,
        patch=2,
        scale=0.1,
        optim=Optim(lr=3e-3, clip=1.0),
    )
    family = vae.make_vq(cfg)
    state, step = family.init(key(0)), jax.jit(family.step)
    for i in range(600):
        state, found = step(state, {"image": images.repeat(4, 0)}, key(i))
    w = vq.weights(cfg, state)
    x = jnp.asarray(images / 255, jnp.float32)
    indices = vq.encode(cfg, w, x)
    assert len(np.unique(indices)) == 6 and found["perplexity"] == pytest.approx(6, rel=1e-4)
    np.testing.assert_allclose(vq.decode(cfg, w, indices), x, atol=0.1)
