"""Labels and pixels at the doors of every family that takes them, and of `train.sample`."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import core, data, ddpm, gan, train, vae

IMAGES = {"shape": (4, 4, 1), "levels": 17}
ROWS = {
    "vae": (vae.make, partial(vae.Config, **IMAGES, latent_dim=2, hidden=(4,))),
    "vae of two layers": (
        vae.make,
        partial(
            vae.Config,
            **IMAGES,
            latent_dim=2,
            hidden=(4,),
            upper_dim=2,
            upper_hidden=(3,),
            objective="dreg",
            k=2,
        ),
    ),
    "gan": (
        gan.make,
        partial(
            gan.Config,
            **IMAGES,
            latent_dim=2,
            gen=gan.NetConfig(widths=(4,)),
            disc=gan.NetConfig(widths=(4,)),
            n_critic=2,
        ),
    ),
    "ddpm": (
        ddpm.make,
        partial(
            ddpm.Config,
            **IMAGES,
            T=3,
            schedule="cosine",
            ema=0.0,
            net=ddpm.NetConfig("mlp", (4,), dropout=0.0),
        ),
    ),
}


def key(i):
    return jax.random.key(i)


@pytest.fixture(
    params=["vae", pytest.param("vae of two layers", marks=pytest.mark.slow), "gan", "ddpm"],
    scope="module",
)
def families(request):
    """With three classes and without any, and a state of each."""
    make, cfg = ROWS[request.param]
    made = [make(cfg(classes=classes)) for classes in (3, 0)]
    states = [jax.jit(family.init)(key(0)) for family in made]
    rng = np.random.default_rng(0)  # last layers of zeros would hide the label
    shaken = [
        jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(x.dtype), s.params)
        for s in states
    ]
    return [(f, s._replace(params=p)) for f, s, p in zip(made, states, shaken, strict=True)]


def batch(**changes):
    image = np.random.default_rng(0).integers(0, 17, (6, 4, 4, 1)).astype(np.uint8)
    found = {"image": image, "label": np.arange(6) % 3, **changes}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    "label, words",
    [
        (7, r"label must lie in 0\.\.2, got 7"),
        (
            3,
            r"label must lie in 0\.\.2, got 3",
        ),  # of diffusion the label for none, which is not for callers
        (np.array([0, 1, 2, -1]), r"label must lie in 0\.\.2, got -1\.\.2"),
        (1.5, "label must be whole numbers"),
        (np.zeros(4), "label must be whole numbers"),
        (np.zeros(4, bool), "label must be whole numbers"),
        (np.zeros(3, int), "one entry for each of 4 samples"),
    ],
)
def test_samples_of_no_class_are_refused(families, label, words):
    (family, state), (without, _) = families
    with pytest.raises(ValueError, match=words):
        family.sample(state, key(1), n=4, label=label)
    with pytest.raises(ValueError, match="takes no labels"):
        without.sample(state, key(1), n=4, label=label)


@pytest.mark.slow
def test_one_class_is_that_of_all_samples(families):
    family, state = families[0]
    one, each, turn, default = (
        np.asarray(jax.jit(partial(family.sample, n=4, **label))(state, key(1)))
        for label in ({"label": 2}, {"label": np.full(4, 2)}, {"label": np.array([0, 1, 2, 0])}, {})
    )
    np.testing.assert_array_equal(one, each)
    np.testing.assert_array_equal(turn, default)
    assert (one[:2] != turn[:2]).any() and np.isfinite(one).all()


@pytest.mark.slow
def test_batches_of_bad_labels_or_pixels_are_refused(families):
    """By type and shape where they are traced, by value where they are not."""
    image = batch()["image"]
    for (family, state), labelled in zip(families, (True, False), strict=True):
        for act in (family.step, family.evaluate):
            traced = partial(jax.eval_shape, act, state)
            if labelled:
                for label, words in (
                    (None, "needs label="),
                    (np.zeros(6), "whole numbers"),
                    (np.arange(4), "each of"),
                ):
                    with pytest.raises(ValueError, match=words):
                        traced(batch(label=label), key(1))
                for label in (np.arange(6), np.arange(6) % 3 - 1):
                    with pytest.raises(ValueError, match=r"label must lie in 0\.\.2"):
                        act(state, batch(label=label), key(1))
            else:
                traced(batch(label=np.zeros(6)), key(1))  # what it is not given it does not look at
            for wrong in (image / 16, image.astype(np.float16), jnp.asarray(image, jnp.bfloat16)):
                with pytest.raises(
                    ValueError, match=r"image must be whole numbers in 0\.\.16.*encode or elbo"
                ):
                    traced(batch(image=wrong), key(1))
            for wrong in (image.astype(np.int32) + 1, image + 200):
                with pytest.raises(ValueError, match=r"image must lie in 0\.\.16"):
                    act(state, batch(image=wrong), key(1))
            traced(batch(image=image.astype(np.int64)), key(1))


def test_functions_of_images_take_floats():
    """One line for whole-number pixels, wherever images or their noisy versions go in."""
    image, t = np.full((2, 4, 4, 1), 12, np.uint8), jnp.zeros(2, int)
    schedule, how = ddpm.cosine_schedule(3), {"levels": 17}

    def no_net(x_t, t):
        raise AssertionError("the image went on to the net")

    def params(name):
        family, cfg = ROWS[name][0], ROWS[name][1]()
        return cfg, jax.eval_shape(family(cfg).init, key(0)).params

    cfg, of_vae = params("vae")
    of_gan, of_ddpm = params("gan"), params("ddpm")
    variables = {"params": of_gan[1]["disc"]}
    calls = {
        "elbo": lambda x: vae.elbo(cfg, of_vae, x, key(1)),
        "iwae_bound": lambda x: vae.iwae_bound(cfg, of_vae, x, key(1), k=2),
        "dreg_bound": lambda x: vae.dreg_bound(cfg, of_vae, x, key(1), k=2),
        "reconstruct": lambda x: vae.reconstruct(cfg, of_vae, x),
        "discriminate": lambda x: gan.discriminate(of_gan[0], variables, x),
        "predict": lambda x: ddpm.predict(*of_ddpm, x, t),
        "vlb": lambda x: ddpm.vlb(schedule, no_net, x, key(1), **how),
        "vlb_terms": lambda x: ddpm.vlb_terms(schedule, no_net, x, key(1), **how),
        "prior_kl": lambda x: ddpm.prior_kl(schedule, x),
        "ode": lambda x: ddpm.ode_log_likelihood(schedule, no_net, x, key(1), steps=2),
        "continuous_vlb": lambda x: ddpm.continuous_vlb(lambda u: u, no_net, x, key(1), **how),
    }
    for name, call in calls.items():
        for wrong in (image, jnp.asarray(image, jnp.int32)):
            with pytest.raises(
                ValueError, match=r"must be floats.* here, got (uint8|int32): `preprocess` takes"
            ):
                call(wrong)
                pytest.fail(name)


def test_a_traced_label_that_is_no_class_is_not_a_number(families):
    """It has no value to refuse. It must not train as another class, or as none."""
    (family, state), _ = families
    bad = batch(label=np.array([0, 1, 2, -1, 3, 0], np.int8))
    for name, values in jax.jit(family.evaluate)(state, bad, key(1)).items():
        if name not in ("kl_nats", "real_accuracy", "fake_accuracy"):
            np.testing.assert_array_equal(np.isfinite(values), [1, 1, 1, 0, 0, 1], err_msg=name)


def test_one_hot_of_a_traced_label():
    traced = jax.jit(lambda label: core.one_hot(label, 300, label.shape))
    np.testing.assert_array_equal(traced(jnp.array([5, 299])), np.eye(300)[[5, 299]])
    np.testing.assert_array_equal(traced(jnp.array([127], jnp.int8)), np.eye(300)[[127]])
    assert (
        np.isnan(traced(jnp.array([-1, 300]))).all()
        and np.isnan(traced(jnp.array([2**32 - 1], jnp.uint32))).all()
    )


# -------------------------------------------------------------------------------------------------------- train.sample


def echo(state, key, *, n, label=None, extra=None):
    """The labels that a family is given, and one draw of each chunk."""
    return jnp.stack(
        [jnp.broadcast_to(jnp.asarray(label), (n,)), jax.random.randint(key, (n,), 0, 10**6)], -1
    )


def result(sample, classes=3):
    return train.Result(
        core.Family(None, None, None, sample), None, SimpleNamespace(classes=classes), None, None
    )


@pytest.mark.parametrize("n, chunk", [(1, 1), (7, 1), (7, 3), (8, 4), (7, 7), (5, 256)])
def test_the_classes_in_turn_are_counted_over_all_samples(n, chunk):
    drawn = train.sample(result(echo), key(0), n=n, chunk=chunk)
    assert drawn[:, 0].tolist() == (np.arange(n) % 3).tolist()
    given = train.sample(result(echo), key(0), n=n, chunk=chunk, label=np.arange(n) % 3)
    np.testing.assert_array_equal(drawn, given)
    size = min(n, chunk)  # chunk i has fold_in(key, i), as ever
    for i in range(-(-n // size)):
        expected = jax.random.randint(jax.random.fold_in(key(0), i), (size,), 0, 10**6)
        np.testing.assert_array_equal(drawn[i * size : (i + 1) * size, 1], expected[: n - i * size])
    assert set(train.sample(result(echo), key(0), n=n, chunk=chunk, label=1)[:, 0].tolist()) == {1}


def test_models_without_classes_are_given_no_label():
    def sample(state, key, *, n, label=None):
        assert label is None
        return jnp.zeros(n)

    assert train.sample(result(sample, classes=0), key(0), n=5, chunk=2).shape == (5,)


@pytest.mark.parametrize("prompt", [[5, 6, 7, 8], [[5, 6, 7, 8]]])
def test_one_prompt_is_that_of_all_samples(prompt):
    def sample(state, key, *, n, prompt):
        return jnp.asarray(prompt)

    drawn = train.sample(result(sample, classes=0), key(0), n=4, chunk=2, prompt=prompt)
    assert drawn.tolist() == [[5, 6, 7, 8]] * 4


def test_a_family_of_ones_own_may_count_its_labels_another_way():
    def sample(state, key, *, n, label=None):
        return jnp.full(n, -1 if label is None else label)

    own = result(sample, classes=0)._replace(config=SimpleNamespace(kinds=3))
    assert train.sample(own, key(0), n=2).tolist() == [-1, -1]
    assert train.sample(own, key(0), n=2, label=7).tolist() == [7, 7]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"label": 7}, r"label must lie in 0\.\.2, got 7"),
        ({"label": np.arange(5)}, r"label must lie in 0\.\.2, got 0\.\.4"),
        ({"label": 0.5}, "label must be whole numbers"),
        ({"label": [0, 1]}, "label must have one entry for each of 5 samples, got 2"),
        ({"extra": np.zeros(4)}, "extra must have one entry for each of 5 samples, got 4"),
        ({"lable": 1}, "takes label, extra, not lable"),
        ({"n": 0}, "at least 1, got n=0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, words):
    with pytest.raises(train.Refused, match=words):
        train.sample(result(echo), key(0), **{"n": 5, **options})


def test_evaluation_looks_at_the_labels():
    make, cfg = ROWS["vae"]
    cfg = cfg(classes=3)
    family = make(cfg)
    source = data.from_arrays(batch(), levels=17)
    trained = train.Result(family, jax.jit(family.init)(key(0)), cfg, source.info, None)
    assert np.isfinite(train.evaluate(trained, source)["nll_nats"])
    arrays, rows, take = source.resident
    wrong = source._replace(resident=({**arrays, "label": arrays["label"] + 1}, rows, take))
    with pytest.raises(train.Refused, match=r"label must lie in 0\.\.2, got 1\.\.3"):
        train.evaluate(trained, wrong)
    with pytest.raises(
        train.Refused, match="batch_size must be a whole number and at least 1, got 0"
    ):
        train.evaluate(trained, source, batch_size=0)


@pytest.mark.slow
def test_predictions_of_diffusion_refuse_labels_that_are_no_class():
    cfg = ROWS["ddpm"][1](classes=3)
    params = jax.jit(ddpm.make(cfg).init)(key(0)).params
    x, t = jnp.zeros((2, 4, 4, 1)), jnp.zeros(2, int)
    nobody = ddpm.predict(cfg, params, x, t)[0]
    np.testing.assert_array_equal(
        ddpm.predict(cfg, params, x, t, jnp.full(2, 3))[0], nobody
    )  # 3 stands for none
    for label, words in (
        (7, r"label must lie in 0\.\.3, got 7\.\.7"),
        (-1, r"label must lie in 0\.\.3, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            ddpm.eps_fn_of(cfg, params, jnp.full(2, label))(x, t)
    for make in (ddpm.eps_fn_of, ddpm.predict_fn_of):
        fn = jax.tree.leaves(make(cfg, params, 1, 2.0), is_leaf=callable)[0]
        each = jax.tree.leaves(make(cfg, params, jnp.full(2, 1), 2.0), is_leaf=callable)[0]
        np.testing.assert_array_equal(fn(x, t), each(x, t))
        with pytest.raises(ValueError, match=r"label must lie in 0\.\.3, got 7\.\.7"):
            jax.tree.leaves(make(cfg, params, jnp.full(2, 7), 2.0), is_leaf=callable)[0](x, t)
    plain = ROWS["ddpm"][1]()
    with pytest.raises(ValueError, match="takes no labels"):
        ddpm.predict(plain, jax.jit(ddpm.make(plain).init)(key(0)).params, x, t, jnp.zeros(2, int))
