"""The scripts at their smallest: what they train, what they compare, what they leave, what they refuse."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, train, vae
from aigc_jax.core import Optim
from experiments import (
    _cli,
    _iwae,
    cgan_mnist,
    gan_digits,
    gan_mnist,
    iwae_table,
    mode_collapse,
    parzen_table,
    vae_digits,
    vae_elbo_curves,
    vae_samples,
    wgan_gp_toys,
)

DIGITS = data.load("digits")


# ---------------------------------------------------------------------------------------------------------- wake-sleep

CFG = vae.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=3,
    hidden=(6,),
    binarisation="static",
    optim=Optim("sgd", lr=1.0),
)


def moved(batch, key):
    """The update of wake-sleep, by net."""
    family = vae_elbo_curves.make_wake_sleep(CFG)
    state = family.init(jax.random.key(0))
    after, _ = jax.jit(family.step)(state, batch, key)
    return state.params, {
        net: jax.tree.map(lambda a, b: np.asarray(a - b), after.params[net], state.params[net])
        for net in state.params
    }


@pytest.mark.slow
def test_sleep_trains_the_encoder_on_dreams_alone():
    """Other images, same key: the encoder's update is the same, the decoder's is not."""
    _, a = moved(DIGITS.batch(0, 0, 16), jax.random.key(1))
    _, b = moved(DIGITS.batch(0, 1, 16), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, a["encoder"], b["encoder"])
    assert any(
        (x != y).any()
        for x, y in zip(*map(jax.tree.leaves, (a["decoder"], b["decoder"])), strict=True)
    )
    assert max(np.abs(x).max() for x in jax.tree.leaves(a["encoder"])) > 1e-3


@pytest.mark.slow
def test_wake_trains_the_decoder_on_the_encoders_codes_alone():
    batch = DIGITS.batch(0, 0, 16)
    params, update = moved(batch, jax.random.key(1))
    k_x, k_wake, _, _ = jax.random.split(jax.random.key(1), 4)
    x = vae.preprocess(CFG, batch, k_x)
    [z] = vae.sample_posterior(CFG, params, x, k_wake, k=1)

    def wake(decoder):
        return vae.log_likelihood(CFG, x, vae.decode(CFG, {"decoder": decoder}, z[0])).mean()

    expected = jax.grad(wake)(params["decoder"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), update["decoder"], expected
    )


@pytest.mark.slow
def test_wake_sleep_brings_the_encoder_to_the_posterior_of_the_dreams():
    """The decoder held: sleep's optimum is the model's own posterior, so the bound on dreams rises."""
    family = vae_elbo_curves.make_wake_sleep(replace(CFG, optim=Optim(lr=1e-2)))
    state, step = family.init(jax.random.key(0)), jax.jit(family.step)
    decoder = jax.tree.map(lambda x: 3 * x, state.params["decoder"])
    z = jax.random.normal(jax.random.key(5), (500, 3))
    p = vae.mean_image(CFG, vae.decode(CFG, {"decoder": decoder}, z))
    x = jax.random.bernoulli(jax.random.key(6), p).astype(jnp.float32)

    def bound(state):
        return float(
            vae.elbo(CFG, {**state.params, "decoder": decoder}, x, jax.random.key(7))["elbo"].mean()
        )

    before = bound(state)
    for i in range(300):
        state = state._replace(params={**state.params, "decoder": decoder})
        state, _ = step(state, DIGITS.batch(0, i, 64), jax.random.key(100 + i))
    assert bound(state) > before + 3


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.slow
def test_the_staged_protocol_trains_each_stage_from_the_last(tmp_path, monkeypatch):
    """IWAE's paper in small: two stages an arm, table 2 from their ends."""
    monkeypatch.setattr(_iwae, "Run", partial(train.Run, devices=1))  # compiles in half the time
    monkeypatch.setattr(_iwae, "ONE", replace(_iwae.ONE, hidden=(8,), latent_dim=4))
    setup = replace(
        iwae_table.SCALES["smoke"].setup,
        folder=str(tmp_path),
        epochs=1,
        stages=2,
        further=1,
        ks=(1, 2),
        vae_ks=(1,),
        two_layers=(),
        batch_size=480,
        lr=1e-3,
        test=20,
        draws=20,
    )
    found = iwae_table.run(setup, tmp_path)
    runs = {
        str(p.parent.relative_to(tmp_path)): json.loads(p.read_text())
        for p in tmp_path.rglob("run.json")
    }
    first, second = (runs[f"1-IWAE-k2-1epochs/seed0/stage{i}"] for i in (0, 1))
    assert first["run"]["steps"] * 3 == second["run"]["steps"] == 9
    assert second["run"]["init"].endswith("stage0") and first["run"]["init"] == ""
    np.testing.assert_allclose(second["config"]["optim"]["lr"], 1e-3 * 10 ** (-1 / 7))
    assert {r["config"]["optim"]["warmup"] for r in runs.values()} == {0}
    turned = runs["1-VAE-IWAE-k2-1epochs/seed0"]
    assert turned["run"]["init"].endswith("1-VAE-k1-1epochs/seed0/stage1")
    assert (turned["config"]["objective"], turned["config"]["k"]) == ("iwae", 2)
    named = {row.quantity: row.ours for row in found}
    assert (
        "1 layer, IWAE k=2, 4 epochs: NLL (nats)" in named
        and "1 layer, VAE -> IWAE k=2, +1 epochs: NLL (nats)" in named
    )
    assert (tmp_path / "iwae_table.png").exists()

    result = train.load(tmp_path / "1-VAE-k1-1epochs/seed0/stage1")
    x = np.asarray(
        vae.preprocess(
            result.config, data.load("digits", "test[:20]").batch(0, 0, 20), jax.random.key(9)
        )
    )
    ours = _iwae.nll(result, x, draws=20).mean()
    np.testing.assert_allclose(named["1 layer, VAE k=1, 4 epochs: NLL (nats)"], ours, rtol=1e-6)
    kept = np.arange(4) % 2 == 0
    mu, logvar = vae.encode(result.config, _iwae.pruned(result.state.params, kept), jnp.asarray(x))
    before = vae.encode(result.config, result.state.params, jnp.asarray(x))[0]
    assert (mu[:, ~kept] == 0).all() and (logvar[:, ~kept] == 0).all()
    np.testing.assert_allclose(mu[:, kept], before[:, kept])


def test_the_papers_protocol_is_the_papers():
    setup = iwae_table.SCALES["paper"].setup
    assert sum(setup.epochs * 3**i for i in range(setup.stages)) == 3280 and setup.batch_size == 20
    arms = {arm[:3] for arm in _iwae.arms(setup) if not arm.after}
    assert arms == set(_iwae.PAPER)
    assert "2 layers, IWAE k=50, 3280 epochs: NLL (nats)" in iwae_table.CRITERIA


@pytest.mark.slow
@pytest.mark.parametrize("script", [vae_elbo_curves, vae_samples])
def test_curves_and_samples_are_drawn(tmp_path, script):
    small = script.SCALES["smoke"].setup
    every = {"eval_every": 30} if script is vae_elbo_curves else {}
    run = replace(small.run, folder=str(tmp_path), steps=60, steps_per_call=30, devices=1, **every)
    setup = replace(small, run=run, latents=(2, 3), **({"seeds": 2} if every else {}))
    found = script.run(setup, tmp_path)
    assert all(np.isfinite(row.ours) for row in found)
    if script is vae_elbo_curves:
        assert all(row.error is not None for row in found[:4])
        assert {p.name for p in (tmp_path / "AEVB-2").iterdir()} == {"seed0", "seed1"}
    assert (
        tmp_path / f"{script.__name__.removeprefix('experiments.')}.png"
    ).stat().st_size > 20_000


@pytest.mark.slow
def test_slopes_of_a_critic_are_those_of_its_gradients():
    cfg = replace(wgan_gp_toys.CLIP, disc=replace(wgan_gp_toys.CRITIC, widths=(5, 4, 3)))
    params = jax.jit(wgan_gp_toys.make_critic(cfg).init)(jax.random.key(0)).params["disc"]
    real, fake = (
        jnp.asarray(np.random.default_rng(i).normal(size=(6, 2)), jnp.float32) for i in (0, 1)
    )
    layers = wgan_gp_toys.layers(params)

    def loss(moves):
        """The critic's loss, with a move added to each hidden layer's activations of either batch."""
        means = []
        for x, own in zip((real, fake), moves, strict=True):
            for (w, b), move in zip(layers[:-1], own, strict=True):
                x = jax.nn.relu(x @ w + b[None]) + move
            means.append((x @ layers[-1][0] + layers[-1][1][None]).mean())
        return means[1] - means[0]

    still = [[jnp.zeros((6, width)) for width in (5, 4, 3)] for _ in range(2)]
    grads = jax.grad(loss)(still)
    expected = [np.sqrt(sum(float((own[i] ** 2).sum()) for own in grads)) for i in range(3)]
    np.testing.assert_allclose(wgan_gp_toys.slopes(params, real, fake), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"loss": "wasserstein", "penalty": "gp", "condition": "concat"}]
)
def test_a_gan_is_trained_and_measured(tmp_path, flags):
    run = replace(
        gan_digits.RUN, folder=str(tmp_path), steps=20, eval_every=10, steps_per_call=10, devices=1
    )
    setup = replace(
        gan_digits.SCALES["smoke"].setup, run=run, model=replace(gan_digits.MODEL, **flags)
    )
    found = gan_digits.run(setup, tmp_path)
    assert all(np.isfinite(row.ours) for row in found) and (tmp_path / "gan_digits.png").exists()
    assert not any("kernel distance" in row.quantity for row in found)  # of 360 digits it is noise


def test_gan_scripts_refuse_what_they_could_not_measure():
    for script, change, words in (
        (
            gan_mnist,
            {"model": replace(gan_mnist.MODEL, classes=10)},
            "an unconditional model: model.classes cannot be 10",
        ),
        (
            cgan_mnist,
            {"data": _cli.Source("grid")},
            "data.name must be one of digits, fashion_mnist, mnist",
        ),
        (
            gan_digits,
            {"model": replace(gan_digits.MODEL, classes=0, condition="concat")},
            "trains a conditional model",
        ),
        (gan_mnist, {"samples": 39}, "samples must be at least 40, which the figure shows, got 39"),
        (cgan_mnist, {"samples": 5}, "samples must be at least 6, which coverage needs, got 5"),
        (mode_collapse, {"samples": 1}, "samples must be at least 2, got 1"),
        (wgan_gp_toys, {"depth": 2}, "depth must be at least 3, got 2"),
        (wgan_gp_toys, {"width": 0}, "width must be at least 1, got 0"),
        (wgan_gp_toys, {"deep_steps": 0}, "deep_steps must be at least 1, got 0 .--deep-steps"),
        (parzen_table, {"marks": (200_000,)}, "no mark of .* lies within run.steps"),
        (
            parzen_table,
            {"run": replace(parzen_table.RUN, eval_every=0)},
            "run.eval_every must be at least 1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            replace(script.SCALES["cpu"].setup, **change)


@pytest.mark.parametrize(
    "script, kept",
    [
        (vae_digits, [vae_digits.BOUND]),
        (vae_samples, ["2 latents: negative bound", "2 latents: its KL"]),
    ],
)
def test_what_is_measured_outlasts_what_fails_later(script, kept, tmp_path, monkeypatch):
    """The per-pixel marginal of vae_digits fails, and the second size of vae_samples."""
    begun = []

    def fit(make, cfg, run, *args, **options):
        if begun and script is vae_samples:
            raise train.NonFinite("step 7: loss = nan")
        begun.append(run.folder)

    def marginal(*args):
        raise MemoryError

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "load", lambda folder: None)
    monkeypatch.setattr(train, "evaluate", lambda *args: {"nll_nats": 20.0, "kl_nats": 5.0})
    monkeypatch.setattr(vae_digits, "marginal_nats", marginal)
    found, failed = _cli.measured(script, script.SCALES["smoke"].setup, tmp_path)
    assert isinstance(failed, MemoryError | train.NonFinite) and len(found) == len(kept)
    assert all(row.quantity.startswith(name) for row, name in zip(found, kept, strict=True))


def test_rows_outlast_data_that_cannot_be_used(tmp_path):
    """Without a training the rows that were measured stay; without rows it is one line, code 2."""

    def run(measure):
        def script(setup, folder):
            rows = _cli.kept()
            if measure:
                rows.append(_cli.Row("a", 1.0))
            raise _cli.DataError("no such set")

        return _cli.measured(SimpleNamespace(run=script), None, tmp_path)

    found, failed = run(measure=True)
    assert [row.quantity for row in found] == ["a"] and isinstance(failed, _cli.DataError)
    with pytest.raises(SystemExit) as ended:
        run(measure=False)
    assert ended.value.code == 2


def test_seeds_follow_the_first_in_folders_of_their_own():
    run = train.Run(folder="a/b", seed=3)
    assert _cli.seeded(run, 1) == [run]
    assert [(r.seed, r.folder) for r in _cli.seeded(run, 2)] == [(3, "a/b/seed3"), (4, "a/b/seed4")]
    for seeds in (0, 10**9):
        with pytest.raises(ValueError, match=f"seeds must lie in 1..1000, got {seeds}"):
            _cli.seeded(run, seeds)
