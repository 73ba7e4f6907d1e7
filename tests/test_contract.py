"""What every family owes to whoever trains it. A new family is one more row of ROWS."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from aigc_jax import core, data, ddpm, gan, train, transformer, vae
from aigc_jax.core import EMA, Optim
from aigc_jax.data import text
from aigc_jax.train import engine

DIGITS = data.load("digits")
POINTS = data.load("ring")
CROPS = text.from_tokens(np.random.default_rng(0).integers(0, 12, 500), length=8)
ROWS = {
    "vae": (
        vae.make,
        vae.Config(shape=(8, 8, 1), levels=17, latent_dim=4, hidden=(16,), binarisation="dynamic"),
        DIGITS,
    ),
    "vae with all of it": (
        vae.make,
        vae.Config(
            shape=(8, 8, 1),
            levels=17,
            classes=10,
            latent_dim=4,
            channels=(3,),
            hidden=(16,),
            upper_dim=2,
            upper_hidden=(5,),
            likelihood="logistic",
            objective="dreg",
            k=3,
            kl_warmup=4,
        ),
        DIGITS,
    ),
    "gan": (
        gan.make,
        gan.Config(
            shape=(2,),
            latent_dim=4,
            gen=gan.Net(widths=(16,), norm="batch"),
            disc=gan.Net(widths=(16,), activation="tanh"),
            loss="wasserstein",
            penalty="gp",
            n_critic=2,
        ),
        POINTS,
    ),
    "gan with all of it": (
        gan.make,
        gan.Config(
            shape=(8, 8, 1),
            levels=17,
            classes=10,
            condition="projection",
            latent_dim=4,
            gen=gan.Net("dcgan", (4,), norm="batch"),
            disc=gan.Net("dcgan", (4,), "leaky_relu", norm="spectral"),
            loss="hinge",
            packing=2,
        ),
        DIGITS,
    ),
    "ddpm": (
        ddpm.make,
        ddpm.Config(
            shape=(2,),
            T=25,
            times="importance",
            ema=0.0,
            net=ddpm.Net("mlp", (16,), dropout=0.0),
            optim=Optim(lr=1e-3, clip=1.0, warmup=10),
        ),
        POINTS,
    ),
    "ddpm with all of it": (
        ddpm.make,
        ddpm.Config(
            shape=(8, 8, 1),
            levels=17,
            classes=10,
            T=6,
            schedule="cosine",
            prediction="v",
            variance="learned",
            objective="hybrid",
            times="low_discrepancy",
            terms=2,
            ema=0.0,
            net=ddpm.Net(widths=(4, 8), blocks=1, attention=(), groups=2),
        ),
        DIGITS,
    ),
    "ddpm of patches": (
        ddpm.make,
        ddpm.Config(
            shape=(8, 8, 1),
            levels=17,
            T=6,
            schedule="learned",
            variance="beta_tilde",
            objective="vlb",
            terms=2,
            times="low_discrepancy",
            ema=0.0,
            net=ddpm.Net("dit", (8,), heads=2, patch=4),
        ),
        DIGITS,
    ),
    "transformer": (
        transformer.make,
        transformer.Config(
            vocab=12, context=8, layers=1, heads=2, width=16, micro=2, optim=Optim(lr=1e-2, weight_decay=0.1, decay=100)
        ),
        CROPS,
    ),
    "transformer with all of it": (
        transformer.make,
        transformer.Config(
            vocab=12,
            context=8,
            layers=1,
            heads=2,
            width=16,
            positions="rotary",
            norm="rms",
            activation="swiglu",
            bias=False,
            tied=False,
            dropout=0.1,
            remat=True,
        ),
        CROPS,
    ),
}
NOISELESS = ("transformer",)  # its step draws no noise, so that the per-device view must agree with the global one
B = 32


def key(i):
    return jax.random.key(i)


def leaves(tree):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b, atol=0.0):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


def sgd(cfg):
    """The config with plain SGD throughout: Adam turns the rounding noise of a zero gradient into a full step."""
    plain = Optim("sgd", lr=1e-2)
    return dataclasses.replace(cfg, **{f.name: plain for f in dataclasses.fields(cfg) if isinstance(f.default, Optim)})


@pytest.fixture(params=ROWS)
def row(request):
    make, cfg, source = ROWS[request.param]
    return request.param, make, cfg, partial(source.batch, 0)


def run(step, state, batch, steps, first=0):
    for i in range(first, first + steps):
        state, metrics = step(state, batch(i, B), core.step_key(key(7), i))
    return state, metrics


def test_init_is_arrays_of_strong_types(row):
    _, make, cfg, _ = row
    family = make(dataclasses.replace(cfg, ema=0.9))
    abstract = jax.eval_shape(family.init, key(0))
    state = family.init(key(0))
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert isinstance(leaf, jax.Array) and not leaf.weak_type
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_equal_state_and_key_give_equal_bits(row):
    name, make, cfg, batch = row
    family = make(cfg)
    step = jax.jit(family.step)
    state = family.init(key(0))._replace(step=jnp.array(5, jnp.int32))  # a warm-up's first rate is 0
    one, metrics = step(state, batch(0, B), key(1))
    assert_same(step(state, batch(0, B), key(1)), (one, metrics))
    other = leaves(step(state, batch(0, B), key(2))[0].params)
    differs = any((other[n] != x).any() for n, x in leaves(one.params).items())
    assert differs != (name in NOISELESS)


def test_metrics_are_scalars_with_loss_gradient_norm_and_rate(row):
    _, make, cfg, batch = row
    family = make(cfg)
    _, metrics = jax.jit(family.step)(family.init(key(0)), batch(0, B), key(1))
    for ending in ("loss", "grad_norm", "lr"):
        assert any(n.endswith(ending) for n in metrics)
    assert all(m.shape == () and jnp.isfinite(m) for m in metrics.values())


def test_second_step_does_not_compile_again(row):
    _, make, cfg, batch = row
    family = make(dataclasses.replace(cfg, ema=0.9))
    traces = []

    def counted(*args):
        traces.append(1)
        return family.step(*args)

    state, _ = run(jax.jit(counted), jax.jit(family.init)(key(0)), batch, 4)
    assert len(traces) == 1 and int(state.step) == 4


def test_state_can_be_donated_with_its_average(row):
    _, make, cfg, batch = row
    family = make(dataclasses.replace(cfg, ema=0.9))
    kept, _ = run(jax.jit(family.step), family.init(key(0)), batch, 3)
    donated = jax.jit(family.step, donate_argnums=0)
    first = family.init(key(0))
    state, _ = run(donated, first, batch, 3)
    assert all(x.is_deleted() for x in jax.tree.leaves(first.ema))
    assert_same(state, kept)


def test_average_follows_what_it_names(row):
    name, make, cfg, batch = row
    family = make(dataclasses.replace(cfg, ema=0.9))
    states = [family.init(key(0))]
    for i in range(3):
        states.append(run(jax.jit(family.step), states[-1], batch, 1, first=i)[0])
    of = (
        (lambda s: {"params": s.params["gen"], "batch_stats": s.extra["gen"]})
        if name.startswith("gan")
        else (lambda s: s.params)
    )
    expected = leaves(of(states[0]))
    for t, state in enumerate(states[1:]):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = {n: decay * x + (1 - decay) * leaves(of(state))[n] for n, x in expected.items()}
    assert leaves(states[-1].ema).keys() == expected.keys()
    for n, x in leaves(states[-1].ema).items():
        np.testing.assert_allclose(x, expected[n], rtol=5e-7, atol=1e-6, err_msg=n)
    moved = {n for n, x in leaves(states[-1].ema).items() if (x != leaves(of(states[-1]))[n]).any()}
    assert moved == {n for n, x in leaves(of(states[0])).items() if (x != leaves(of(states[-1]))[n]).any()} != set()
    # It is what sampling uses: other parameters under training give the same samples.
    params = states[-1].params
    lost = states[-1]._replace(params=jax.tree.map(jnp.zeros_like, params))
    sample = jax.jit(partial(family.sample, n=4))
    assert_same(sample(states[-1], key(3)), sample(lost, key(3)))


def test_evaluate_is_per_example_and_sample_gives_n(row):
    name, make, cfg, batch = row
    family = make(cfg)
    state = family.init(key(0))
    values = jax.jit(family.evaluate)(state, batch(0, B), key(1))
    assert values and all(v.shape == (B,) for v in values.values())
    for n in (1, 5):
        samples = jax.jit(partial(family.sample, n=n))(state, key(2))
        assert samples.shape[0] == n
        assert samples.dtype == (jnp.int32 if name.startswith("transformer") else jnp.float32)
        if name == "vae":
            assert samples.min() >= 0 and samples.max() <= 1


def on_mesh(family, batch, steps, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    state = jax.device_put(family.init(key(0)), NamedSharding(mesh, P()))

    def placed(i, size):
        return jax.device_put(batch(i, size), NamedSharding(mesh, P("data")))

    with jax.set_mesh(mesh):
        return run(jax.jit(family.step), state, placed, steps)


def test_eight_devices_agree_with_one_noise_included(row):
    _, make, cfg, batch = row
    family = make(sgd(cfg))
    one, metrics_one = on_mesh(family, batch, 5, 1)
    eight, metrics_eight = on_mesh(family, batch, 5, 8)
    assert len(eight.step.sharding.device_set) == 8
    moved = [
        np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(family.init(key(0))), strict=True)
    ]
    assert max(moved) > 1e-3
    assert_same(eight, one, atol=1e-6 * max(1.0, 10 * max(moved)))


@pytest.mark.parametrize("micro", [1, 4])
def test_eight_devices_share_the_work(row, micro):
    _, make, cfg, batch = row
    family = make(dataclasses.replace(cfg, micro=micro))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = jax.device_put(family.init(key(0)), NamedSharding(mesh, P()))
    big = jax.device_put(batch(0, 4096), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        spread = jax.jit(family.step).lower(state, big, key(1)).compile()
    alone = jax.jit(family.step).lower(family.init(key(0)), batch(0, 4096), key(1)).compile()
    assert spread.cost_analysis()["flops"] < 0.25 * alone.cost_analysis()["flops"]
    # No device sees the whole batch: gradients travel, rows do not.
    gathered = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", spread.as_text())
    assert not [s for s in gathered if s and np.prod([int(d) for d in s.split(",")]) >= 4096]


def per_device(family, batch, steps, spread):
    """The per-device view: 8 copies of the state, each with its rows; `spread` is vmap or pmap."""

    def step(state, rows, k):
        return family.step(state, rows, core.step_key(k, state.step, "i"))

    mapped = spread(step, axis_name="i", in_axes=(0, 0, None))
    states = jax.tree.map(lambda x: jnp.stack([x] * 8), family.init(key(0)))
    for i in range(steps):
        rows = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch(i, B))
        states, metrics = mapped(states, rows, key(7))
    return states, metrics


def check_replicas(name, make, cfg, batch, spread):
    cfg = dataclasses.replace(sgd(cfg), micro=1)
    states, metrics = per_device(make(cfg, axis_name="i"), batch, 3, spread)
    first = jax.tree.map(lambda x: x[0], states)
    for i in range(1, 8):
        assert_same(*(jax.tree.map(lambda x, j=j: x[j], (states, metrics)) for j in (i, 0)))
    if name in NOISELESS:
        alone, _ = run(jax.jit(make(cfg).step), make(cfg).init(key(0)), batch, 3)
        assert_same(first, alone, atol=1e-6)
    return first


def test_per_device_view_keeps_replicas_equal(row):
    name, make, cfg, batch = row
    first = check_replicas(name, make, cfg, batch, lambda f, **kw: jax.jit(jax.vmap(f, **kw)))
    if name == "ddpm":
        assert int(first.extra["count"].sum()) == 3 * B  # gathered from all devices


def test_per_device_view_under_pmap():
    make, cfg, source = ROWS["transformer"]
    check_replicas("transformer", make, cfg, partial(source.batch, 0), jax.pmap)


def test_devices_draw_their_own_noise():
    keys = jax.vmap(lambda _: core.step_key(key(0), 3, "i"), axis_name="i")(jnp.arange(8))
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys))}) == 8


def test_several_steps_a_call_equal_single_steps(row):
    _, make, cfg, batch = row
    family = make(sgd(cfg))
    alone, _ = run(jax.jit(family.step), family.init(key(0)), batch, 4)
    several = jax.tree.map(lambda *x: np.stack(x), *[batch(i, B) for i in range(4)])

    def body(state, rows):
        return family.step(state, rows, core.step_key(key(7), state.step))

    together, metrics = jax.jit(partial(jax.lax.scan, body))(family.init(key(0)), several)
    assert all(m.shape == (4,) for m in metrics.values())
    assert_same(together, alone, atol=1e-6)


def test_fit_gives_the_same_bits_however_it_is_cut_into_calls(row):
    _, make, cfg, _ = row
    source = ROWS[row[0]][2]
    states = [
        train.fit(make, cfg, train.Run(steps=9, batch_size=B, steps_per_call=4, eval_every=every), source,
                  on_eval=lambda *_: {}).state
        for every in (0, 1, 3)
    ]  # fmt: skip
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


def test_micro_batches_take_the_mean_over_parts(row):
    """Each part has the key fold_in(key, i) and the extra that the part before left; gradients are averaged."""
    name, make, cfg, batch = row
    if name.startswith("gan"):
        pytest.skip("a GAN's step is several updates; descend's own tests hold what one of them does")
    cfg = dataclasses.replace(sgd(cfg), micro=4)
    family, single = make(cfg), make(dataclasses.replace(cfg, micro=1))
    state = family.init(key(0))
    got, metrics = jax.jit(family.step)(state, batch(0, B), key(5))
    step, extra, moves, losses = jax.jit(single.step), state.extra, [], []
    for i, part in enumerate(core.parts(batch(0, B), 4)):
        new, m = step(state._replace(extra=extra), part, jax.random.fold_in(key(5), i))
        extra = new.extra
        moves.append(new.params)
        losses.append(m["loss"])
    assert_same(got.params, jax.tree.map(lambda *x: sum(x) / 4, *moves), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    if extra is not None:
        assert_same(got.extra, extra, atol=1e-6)


def test_unequal_masks_weigh_what_counts_not_rows():
    """Cut into parts or over devices, the update is that of the mean over all tokens that count, no mean of means."""
    make, cfg, _ = ROWS["transformer"]
    rng = np.random.default_rng(0)
    # From rows that count fully to rows that do not count at all; the first device's are all of these.
    mask = (rng.random((B, 8)) < np.linspace(-0.3, 1.2, B)[:, None]).astype(np.float32)
    assert not mask[: B // 8].any() and mask.sum() > B
    rows = {"tokens": rng.integers(0, 12, (B, 9)).astype(np.int32), "mask": mask}
    whole = make(dataclasses.replace(sgd(cfg), micro=1))
    state = whole.init(key(0))
    expected, metrics = jax.jit(whole.step)(state, rows, key(1))
    each = jax.jit(partial(transformer.nll, cfg))(state.params, rows["tokens"])
    np.testing.assert_allclose(metrics["loss"], (each * mask).sum() / mask.sum(), rtol=1e-5)
    assert "weight" not in metrics
    for micro in (2, 8):
        got, cut = jax.jit(make(dataclasses.replace(sgd(cfg), micro=micro)).step)(state, rows, key(1))
        assert_same(got.params, expected.params, atol=1e-6)
        assert_same(cut, metrics, atol=1e-5)
    view = make(dataclasses.replace(sgd(cfg), micro=2), axis_name="i")
    states, cut = per_device(view, lambda *_: rows, 1, lambda f, **kw: jax.jit(jax.vmap(f, **kw)))
    assert_same(jax.tree.map(lambda x: x[3], states.params), expected.params, atol=1e-6)
    assert_same(jax.tree.map(lambda x: x[3], cut), metrics, atol=1e-5)
    nothing = {**rows, "mask": np.zeros_like(mask)}
    for micro in (1, 2):
        got, _ = jax.jit(make(dataclasses.replace(sgd(cfg), micro=micro)).step)(state, nothing, key(1))
        assert_same(got.params, state.params)


def test_rules_place_moments_and_average_like_the_parameters():
    make, cfg, _ = ROWS["ddpm"]
    family = make(dataclasses.replace(cfg, ema=0.9))._replace(rules=((r"net'\]\['Dense_0.*kernel", P(None, "data")),))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    template = jax.eval_shape(family.init, key(0))
    spec = {n: s.spec for n, s in leaves_of_shardings(engine.shardings_of(family, template, mesh))}
    cut = [n for n, s in spec.items() if s == P(None, "data")]
    assert len(cut) == 4  # the parameter, both moments of Adam, the average
    assert {n.split("[")[0].split("(")[0] for n in cut} >= {".params", ".ema"} and sum(
        ".opt_state" in n for n in cut
    ) == 2
    assert all("Dense_0" in n and "kernel" in n for n in cut)


def leaves_of_shardings(tree):
    return [(jax.tree_util.keystr(p), s) for p, s in jax.tree_util.tree_leaves_with_path(tree)]


def test_large_leaves_without_a_rule_are_cut_along_their_largest_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = core.State(
        jax.ShapeDtypeStruct((), jnp.int32),
        {
            "big": jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
            "odd": jax.ShapeDtypeStruct((1021, 4093), jnp.float32),
            "small": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        },
        (),
    )
    placed = engine.shardings_of(core.Family(None, None, None, None), shapes, mesh)
    assert {n: s.spec for n, s in placed.params.items()} == {"big": P(None, "data"), "odd": P(), "small": P()}


def test_ema_of_zero_keeps_nothing():
    assert vae.make(ROWS["vae"][1]).init(key(0)).ema is None
    assert EMA(0.0).read(core.State(jnp.zeros((), jnp.int32), {"w": 1}, ())) == {"w": 1}
