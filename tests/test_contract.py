"""What every family owes to whoever trains it. A new family adds one row to ROWS."""

import dataclasses
import functools
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from aigc_jax import contrastive, core, data, ddpm, gan, language, train, transformer, vae
from aigc_jax.core import EMA, Optim
from aigc_jax.data import text
from aigc_jax.train import engine

DIGITS = data.load("digits")
POINTS = data.load("ring")
CROPS = text.from_tokens(np.random.default_rng(0).integers(0, 12, 500), length=8)


def with_captions(images):
    """The pictures of a set with captions of up to four tokens, 0 where there is none."""
    arrays = images.resident[0]
    tokens = np.random.default_rng(0).integers(1, 12, (len(arrays["image"]), 4)).astype(np.int32)
    tokens[:, 2:] *= tokens[:, 2:] > 6
    arrays = {"image": arrays["image"], "tokens": tokens}
    return data.from_arrays(arrays, levels=images.info.levels)


CAPTIONED = with_captions(DIGITS)


def latents_with_contexts(n=200):
    """Latents [n, 4, 4, 2] of two classes, each with a context of three vectors."""
    rng = np.random.default_rng(0)
    arrays = {"points": rng.normal(size=(n, 4, 4, 2)), "context": rng.normal(size=(n, 3, 5))}
    return data.from_arrays({**arrays, "label": np.arange(n) % 2})


LATENTS = latents_with_contexts()
BITS = data.from_arrays({"points": np.random.default_rng(0).integers(0, 2, (200, 4)) * 1.0})
B = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One configuration of one family, and in what it differs from the others.

    The nets are tiny: a test compiles for longer than it computes.
    """

    make: Callable
    cfg: Any
    source: data.Data
    noisy: bool = True  # its step draws noise
    one_update: bool = True  # its step updates one net once
    images: bool = False  # it samples images in [0, 1]
    dtype: Any = jnp.float32  # of its samples
    averaged: Callable = lambda state: state.params  # what its average is of
    counts_times: bool = False  # `extra["count"]` counts the examples of all devices
    shared: int = 0  # numbers per example that every device must see
    extended: bool = False  # `make test-all` runs it, and not `make test`

    def batch(self, i, size=B):
        return self.source.batch(0, i, size)


def gan_averages(state):
    """The generator and its BatchNorm statistics."""
    return {"params": state.params["gen"], "batch_stats": state.extra["gen"]}


ROWS = {
    "vae": Row(
        vae.make,
        vae.Config(shape=(8, 8, 1), levels=17, latent_dim=4, hidden=(16,), binarisation="dynamic"),
        DIGITS,
        images=True,
    ),
    "vae with all of it": Row(
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
        images=True,
        extended=True,
    ),
    "autoencoder": Row(
        vae.make_autoencoder,
        vae.AutoencoderConfig(
            shape=(8, 8, 1),
            levels=17,
            latent_channels=2,
            widths=(4, 4),
            blocks=1,
            groups=2,
            likelihood="gaussian",
        ),
        DIGITS,
        images=True,
        extended=True,
    ),
    "vq": Row(
        vae.make_vq,
        vae.VQConfig(
            shape=(8, 8, 1),
            levels=17,
            codes=6,
            code_dim=3,
            widths=(4,),
            blocks=1,
            groups=2,
            patch=4,
        ),
        DIGITS,
        noisy=False,
        images=True,
        averaged=lambda state: {**state.params, "codes": state.extra["codes"]},
        extended=True,
    ),
    "gan": Row(
        gan.make,
        gan.Config(
            shape=(2,),
            latent_dim=4,
            gen=gan.NetConfig(widths=(16,), norm="batch"),
            disc=gan.NetConfig(widths=(16,), activation="tanh"),
            loss="wasserstein",
            penalty="gp",
            n_critic=2,
        ),
        POINTS,
        one_update=False,
        averaged=gan_averages,
    ),
    "gan with all of it": Row(
        gan.make,
        gan.Config(
            shape=(8, 8, 1),
            levels=17,
            classes=10,
            condition="projection",
            latent_dim=4,
            gen=gan.NetConfig("dcgan", (4,), norm="batch"),
            disc=gan.NetConfig("dcgan", (4,), "leaky_relu", norm="spectral"),
            loss="hinge",
            packing=2,
            simultaneous=True,
        ),
        DIGITS,
        one_update=False,
        images=True,
        averaged=gan_averages,
        extended=True,
    ),
    "stylegan": Row(
        gan.make,
        gan.Config(
            shape=(8, 8, 1),
            levels=17,
            classes=10,
            condition="projection",
            latent_dim=4,
            gen=gan.NetConfig("style", (4, 4)),
            disc=gan.NetConfig("style", (4, 4)),
            loss="relativistic",
            penalty="r1_r2",
            penalty_weight=0.1,
            lazy=2,
            mixing=0.9,
            path_length=0.1,
            augment="diff",
        ),
        DIGITS,
        one_update=False,
        images=True,
        averaged=gan_averages,
        extended=True,
    ),
    "cyclegan": Row(
        gan.make_cycle,
        gan.CycleConfig(shape=(2,), gen_widths=(32,), disc_widths=(32,), pool=20),
        data.pair(data.load("ring", examples=300), data.load("grid", examples=200)),
        one_update=False,
        averaged=lambda state: state.params["gen"],
        shared=5,  # a fake and two draws, for the pool of each set
        extended=True,
    ),
    "cyclegan with all of it": Row(
        gan.make_cycle,
        gan.CycleConfig(
            shape=(8, 8, 1),
            levels=17,
            gen_widths=(4,),
            blocks=1,
            disc_widths=(4, 4),
            cycle_weight=0.5,
            paired_weight=0.1,
            pool=20,
            remat=True,
        ),
        data.pair(DIGITS, DIGITS, aligned=True),
        one_update=False,
        averaged=lambda state: state.params["gen"],
        shared=150,
        extended=True,
    ),
    "ddpm": Row(
        ddpm.make,
        ddpm.Config(
            shape=(2,),
            T=25,
            times="importance",
            ema=0.0,
            net=ddpm.NetConfig("mlp", (16,), dropout=0.0),
            optim=Optim(lr=1e-3, clip=1.0, warmup=10),
        ),
        POINTS,
        counts_times=True,
    ),
    "ddpm of latents under contexts": Row(
        ddpm.make,
        ddpm.Config(
            shape=(4, 4, 2),
            levels=None,
            classes=2,
            context=(3, 5),
            T=25,
            ema=0.0,
            net=ddpm.NetConfig("dit", (8,), heads=2, dropout=0.0),
            optim=Optim(lr=1e-3, clip=1.0, warmup=10),
        ),
        LATENTS,
        extended=True,
    ),
    "ddpm of straight paths": Row(
        ddpm.make,
        ddpm.Config(
            shape=(2,),
            T=25,
            schedule="straight",
            prediction="velocity",
            ema=0.0,
            net=ddpm.NetConfig("mlp", (16,), dropout=0.0),
            optim=Optim(lr=1e-3, clip=1.0, warmup=10),
        ),
        POINTS,
        extended=True,
    ),
    "ddpm of bits": Row(
        ddpm.make_discrete,
        ddpm.DiscreteConfig(4, T=3, net=ddpm.NetConfig("mlp", (8,), dropout=0.0)),
        BITS,
        extended=True,
    ),
    "ddpm with all of it": Row(
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
            net=ddpm.NetConfig(widths=(4,), blocks=1, attention=(), groups=2),
        ),
        DIGITS,
        images=True,
        extended=True,
    ),
    "ddpm of patches": Row(
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
            net=ddpm.NetConfig("dit", (8,), heads=2, patch=4),
        ),
        DIGITS,
        images=True,
        extended=True,
    ),
    "tokens": Row(
        ddpm.make_tokens,
        ddpm.TokenConfig(vocab=12, context=9, layers=1, heads=2, width=16, micro=2, dropout=0.1),
        CROPS,
        dtype=jnp.int32,
        extended=True,
    ),
    "tokens, flat weights": Row(
        ddpm.make_tokens,
        ddpm.TokenConfig(
            vocab=12, context=9, layers=1, heads=2, width=16, micro=2, weighting="flat", std=0.2
        ),
        CROPS,
        dtype=jnp.int32,
        extended=True,
    ),
    "tokens of a uniform process": Row(
        ddpm.make_tokens,
        ddpm.TokenConfig(
            vocab=12,
            context=9,
            process="uniform",
            schedule="cosine",
            steps=4,
            unlabelled=0.2,
            layers=1,
            heads=2,
            width=16,
            positions="learned",
            remat=True,
        ),
        CROPS,
        dtype=jnp.int32,
        extended=True,
    ),
    "transformer": Row(
        transformer.make,
        transformer.Config(
            vocab=12,
            context=8,
            layers=1,
            heads=2,
            width=16,
            micro=2,
            optim=Optim(lr=1e-2, weight_decay=0.1, decay=100),
        ),
        CROPS,
        noisy=False,
        dtype=jnp.int32,
    ),
    "transformer with all of it": Row(
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
        dtype=jnp.int32,
        extended=True,
    ),
    "lstm": Row(
        language.make,
        language.Config(vocab=12, embedding=6, width=8, layers=2, dropout=0.1),
        CROPS,
        dtype=jnp.int32,
        extended=True,
    ),
    "nplm": Row(
        language.make,
        language.Config("nplm", vocab=12, embedding=6, width=8, order=3, micro=2, ema=0.9),
        CROPS,
        noisy=False,
        dtype=jnp.int32,
        extended=True,
    ),
    "contrastive": Row(
        contrastive.make,
        contrastive.Config(
            shape=(8, 8, 1),
            levels=17,
            dim=6,
            text=contrastive.TextConfig(vocab=12, context=4, width=8, layers=1, heads=2),
            image=contrastive.ImageConfig((4,), groups=2),
        ),
        CAPTIONED,
        noisy=False,
        shared=6,  # features; its loss compares all examples
        extended=True,
    ),
    "contrastive with all of it": Row(
        contrastive.make,
        contrastive.Config(
            shape=(8, 8, 1),
            levels=17,
            dim=6,
            text=contrastive.TextConfig(vocab=12, context=4, width=8, layers=1, heads=2),
            image=contrastive.ImageConfig((4,), groups=2, shift=1),
            loss="sigmoid",
            remat=True,
        ),
        CAPTIONED,
        shared=6,
        extended=True,
    ),
}


def key(i):
    return jax.random.key(i)


def leaves(tree):
    return {
        jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(a, b, atol=0.0):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


def averaged(cfg):
    """The config with an average of what it trains."""
    return dataclasses.replace(cfg, ema=0.9)


def in_parts(cfg, n):
    """The config with n micro-batches; skips the test where a model has none."""
    if n > 1 and not hasattr(cfg, "micro"):
        pytest.skip("its loss compares all examples of a batch, so it has no micro-batches")
    return dataclasses.replace(cfg, micro=n) if hasattr(cfg, "micro") else cfg


def sgd(cfg):
    """The config with plain SGD: Adam turns the rounding noise of a zero gradient into a full step."""
    plain = Optim("sgd", lr=1e-2)
    return dataclasses.replace(
        cfg, **{f.name: plain for f in dataclasses.fields(cfg) if isinstance(f.default, Optim)}
    )


MARKED = [
    pytest.param(name, marks=[pytest.mark.slow] if row.extended else [])
    for name, row in ROWS.items()
]


@pytest.fixture(params=MARKED, scope="module")  # so that all tests of a row follow each other
def row(request):
    yield ROWS[request.param]
    history.cache_clear()


class History(NamedTuple):
    """A short run on one device: its compiled step, which donates its State, and what it gave."""

    step: Callable
    traces: int  # how often the step was traced in this run
    states: list  # before update 0, 1, ...
    metrics: list


@functools.cache
def history(row, cfg):
    """Returns the History of a config; the tests of a row share what was compiled for it."""
    family, traces = row.make(cfg), []

    def counted(*args):
        traces.append(1)
        return family.step(*args)

    step = jax.jit(counted, donate_argnums=0)
    states, metrics = [jax.jit(family.init)(key(0))], []
    for i in range(5):
        state, values = step(copy(states[-1]), row.batch(i), core.step_key(key(7), i))
        states.append(state)
        metrics.append(values)
    return History(step, len(traces), states, metrics)


def copy(tree):
    """The same values in other buffers, which a step may take."""
    return jax.tree.map(jnp.copy, tree)


def test_init_is_arrays_of_strong_types_that_can_be_donated(row):
    family = row.make(averaged(row.cfg))
    abstract = jax.eval_shape(family.init, key(0))
    # Op by op, as only then two leaves may share a buffer; that takes long to compile.
    state = (jax.jit(family.init) if row.extended else family.init)(key(0))
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert isinstance(leaf, jax.Array) and not leaf.weak_type
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    # The average shares no buffer with the parameters: a buffer cannot be donated twice.
    history(row, averaged(row.cfg)).step(state, row.batch(0), key(1))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.ema))


def test_equal_state_and_key_give_equal_bits(row):
    past = history(row, averaged(row.cfg))
    state = past.states[3]  # the first rate of a warm-up is 0
    one, metrics = past.step(copy(state), row.batch(0), key(1))
    assert_same(past.step(copy(state), row.batch(0), key(1)), (one, metrics))
    other = leaves(past.step(copy(state), row.batch(0), key(2))[0].params)
    differs = any((other[n] != x).any() for n, x in leaves(one.params).items())
    assert differs == row.noisy


def test_metrics_are_scalars_with_loss_gradient_norm_and_rate(row):
    metrics = history(row, averaged(row.cfg)).metrics[0]
    for ending in ("loss", "grad_norm", "lr"):
        assert any(n.endswith(ending) for n in metrics)
    assert all(m.shape == () and jnp.isfinite(m) for m in metrics.values())


def test_second_step_does_not_compile_again(row):
    past = history(row, averaged(row.cfg))
    assert past.traces == 1 and int(past.states[-1].step) == 5


def test_average_follows_what_it_names(row):
    states, of = history(row, averaged(row.cfg)).states[:4], row.averaged
    expected = leaves(of(states[0]))
    for t, state in enumerate(states[1:]):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = {n: decay * x + (1 - decay) * leaves(of(state))[n] for n, x in expected.items()}
    assert leaves(states[-1].ema).keys() == expected.keys()
    for n, x in leaves(states[-1].ema).items():
        np.testing.assert_allclose(x, expected[n], rtol=5e-7, atol=1e-6, err_msg=n)
    moved = {n for n, x in leaves(states[-1].ema).items() if (x != leaves(of(states[-1]))[n]).any()}
    assert (
        moved
        == {n for n, x in leaves(of(states[0])).items() if (x != leaves(of(states[-1]))[n]).any()}
        != set()
    )


def test_sample_gives_n_and_uses_the_average(row):
    family, state = row.make(averaged(row.cfg)), history(row, averaged(row.cfg)).states[3]
    if family.sample is None:
        pytest.skip("it draws nothing; train.sample says so in one line")
    sample = jax.jit(partial(family.sample, n=5))
    samples = sample(state, key(3))
    assert samples.shape[0] == 5 and samples.dtype == row.dtype
    assert not row.images or (samples.min() >= 0 and samples.max() <= 1)
    one = jax.eval_shape(partial(family.sample, n=1), state, key(3))
    assert (one.shape, one.dtype) == ((1, *samples.shape[1:]), row.dtype)
    # Other parameters under training give the same samples.
    lost = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    assert_same(samples, sample(lost, key(3)))


@pytest.mark.slow
def test_evaluate_is_per_example(row):
    values = jax.jit(row.make(row.cfg).evaluate)(
        history(row, sgd(row.cfg)).states[0], row.batch(0), key(1)
    )
    assert values and all(v.shape == (B,) for v in values.values())


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


@pytest.mark.slow
def test_eight_devices_agree_with_one_noise_included(row):
    past, mesh = history(row, sgd(row.cfg)), mesh_of(8)
    state = jax.device_put(past.states[0], NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        step = jax.jit(row.make(sgd(row.cfg)).step)
        for i in range(5):
            batch = jax.device_put(row.batch(i), NamedSharding(mesh, P("data")))
            state, _ = step(state, batch, core.step_key(key(7), i))
    assert len(state.step.sharding.device_set) == 8
    first, last = (jax.tree.leaves(past.states[i]) for i in (0, 5))
    moved = max(np.abs(a - b).max() for a, b in zip(first, last, strict=True))
    assert moved > 1e-3
    assert_same(state, past.states[5], atol=1e-6 * max(1.0, 10 * moved))


def abstract(tree, sharding=None):
    """Shapes and dtypes of a tree, laid over devices: enough to compile for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.slow
def test_eight_devices_share_the_work(row):
    check_eight_devices_share_the_work(row, micro=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "ddpm", "transformer", "tokens"])
def test_eight_devices_share_the_work_of_micro_batches(name):
    check_eight_devices_share_the_work(ROWS[name], micro=4)


def check_eight_devices_share_the_work(row, micro):
    family, mesh = row.make(in_parts(row.cfg, micro)), mesh_of(8)
    state, batch = jax.eval_shape(family.init, key(0)), row.batch(0, 4096)
    alone = jax.jit(family.step).lower(state, abstract(batch), key(1))  # counts without compiling
    with jax.set_mesh(mesh):
        state, batch = (
            abstract(state, NamedSharding(mesh, P())),
            abstract(batch, NamedSharding(mesh, P("data"))),
        )
        shared = jax.jit(family.step).lower(state, batch, key(1)).compile()
    assert shared.cost_analysis()["flops"] < 0.25 * alone.cost_analysis()["flops"]
    # No device sees the whole batch: gradients travel, rows do not. Of a contrastive model the
    # features travel, or the captions, but not the pictures.
    gathered = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", shared.as_text())
    assert not [
        s
        for s in gathered
        if s and np.prod([int(d) for d in s.split(",")]) >= 4096 * (1 + row.shared)
    ]


def per_device(family, state, batch, steps, mapped):
    """The per-device view: 8 copies of the state, each with its rows; `mapped` is vmap or pmap."""

    def step(state, rows, k):
        return family.step(state, rows, core.step_key(k, state.step, "i"))

    step = mapped(step, axis_name="i", in_axes=(0, 0, None))
    states = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    for i in range(steps):
        rows = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch(i))
        states, metrics = step(states, rows, key(7))
    return states, metrics


def jitted_vmap(f, **options):
    return jax.jit(jax.vmap(f, **options))


def check_replicas(row, mapped):
    cfg = in_parts(sgd(row.cfg), 1)
    family, past = row.make(cfg, axis_name="i"), history(row, sgd(row.cfg))
    states, metrics = per_device(family, past.states[0], row.batch, 3, mapped)
    first = jax.tree.map(lambda x: x[0], states)
    for i in range(1, 8):
        assert_same(*(jax.tree.map(lambda x, j=j: x[j], (states, metrics)) for j in (i, 0)))
    if not row.noisy:
        assert_same(first, past.states[3], atol=1e-6)
    return first


def test_per_device_view_keeps_replicas_equal(row):
    first = check_replicas(row, jitted_vmap)
    if row.counts_times:
        assert int(first.extra["count"].sum()) == 3 * B  # gathered from all devices


@pytest.mark.slow
def test_per_device_view_under_pmap():
    check_replicas(ROWS["transformer"], jax.pmap)


def test_devices_draw_their_own_noise():
    keys = jax.vmap(lambda _: core.step_key(key(0), 3, "i"), axis_name="i")(jnp.arange(8))
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys))}) == 8


def test_several_steps_per_call_equal_single_steps(row):
    family, past = row.make(sgd(row.cfg)), history(row, sgd(row.cfg))
    several = jax.tree.map(lambda *x: np.stack(x), *[row.batch(i) for i in range(4)])

    def body(state, rows):
        return family.step(state, rows, core.step_key(key(7), state.step))

    together, metrics = jax.jit(partial(jax.lax.scan, body))(past.states[0], several)
    assert all(m.shape == (4,) for m in metrics.values())
    assert_same(together, past.states[4], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "vq", "gan", "cyclegan", "ddpm", "transformer"])
def test_fit_gives_the_same_bits_however_it_is_cut_into_calls(name):
    row = ROWS[name]

    def fit(eval_every):  # calls of 4, 4 and 1 updates without validations, else of 3, 3 and 3
        run = train.Run(steps=9, batch_size=B, steps_per_call=4, eval_every=eval_every)
        return train.fit(row.make, row.cfg, run, row.source, on_eval=lambda *_: {}).state

    assert_same(fit(3), fit(0))


@pytest.mark.slow
def test_micro_batches_take_the_mean_over_parts(row):
    """Part i has the key fold_in(key, i) and the `extra` that part i - 1 left; gradients are averaged."""
    if not row.one_update:
        pytest.skip(
            "a GAN's step is several updates; descend's own tests hold what one of them does"
        )
    parts = jax.jit(row.make(in_parts(sgd(row.cfg), 4)).step)
    past = history(row, in_parts(sgd(row.cfg), 1))
    state, batch = past.states[0], row.batch(0)
    got, metrics = parts(state, batch, key(5))
    extra, moves, losses = state.extra, [], []
    for i, part in enumerate(core.parts(batch, 4)):
        begin = copy(state._replace(extra=extra))
        new, m = past.step(begin, part, jax.random.fold_in(key(5), i))
        extra = new.extra
        moves.append(new.params)
        losses.append(m["loss"])
    assert_same(got.params, jax.tree.map(lambda *x: sum(x) / 4, *moves), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    if extra is not None:
        assert_same(got.extra, extra, atol=1e-6)


@pytest.mark.slow
def test_unequal_masks_weigh_what_counts_not_rows():
    """However the batch is cut, the update is that of the mean over all tokens that count, not of a mean of means."""
    row = ROWS["transformer"]
    rng = np.random.default_rng(0)
    # From rows that count fully to rows that do not count at all; the first device's are all of these.
    mask = (rng.random((B, 8)) < np.linspace(-0.3, 1.2, B)[:, None]).astype(np.float32)
    assert not mask[: B // 8].any() and mask.sum() > B
    rows = {"tokens": rng.integers(0, 12, (B, 9)).astype(np.int32), "mask": mask}
    nothing = {**rows, "mask": np.zeros_like(mask)}
    plain = sgd(row.cfg)
    step = {m: jax.jit(row.make(dataclasses.replace(plain, micro=m)).step) for m in (1, 2, 8)}
    state = history(row, plain).states[0]
    expected, metrics = step[1](state, rows, key(1))
    each = jax.jit(partial(transformer.nll, row.cfg))(state.params, rows["tokens"])
    np.testing.assert_allclose(metrics["loss"], (each * mask).sum() / mask.sum(), rtol=1e-5)
    assert "weight" not in metrics
    for micro in (2, 8):
        got, cut = step[micro](state, rows, key(1))
        assert_same(got.params, expected.params, atol=1e-6)
        assert_same(cut, metrics, atol=1e-5)
    view = row.make(dataclasses.replace(plain, micro=2), axis_name="i")
    states, cut = per_device(view, state, lambda i: rows, 1, jitted_vmap)
    assert_same(jax.tree.map(lambda x: x[3], states.params), expected.params, atol=1e-6)
    assert_same(jax.tree.map(lambda x: x[3], cut), metrics, atol=1e-5)
    for micro in (1, 2):
        got, _ = step[micro](state, nothing, key(1))
        assert_same(got.params, state.params)


PLATFORMS = ("cpu", "cuda", "tpu")


def exported(row):
    """Returns the step as a program for all platforms, which takes and gives flat lists of arrays.

    No device of theirs is needed. A row of the contract has the state, the batch and the key.
    """
    family = row.make(averaged(row.cfg))
    args = jax.eval_shape(family.init, key(0)), row.batch(0), jax.random.key_data(key(1))
    flat, tree = jax.tree.flatten(args)

    def step(*arrays):
        state, batch, data = jax.tree.unflatten(tree, arrays)
        return jax.tree.leaves(family.step(state, batch, jax.random.wrap_key_data(data)))

    return jax.export.export(jax.jit(step), platforms=PLATFORMS)(*flat), step


def test_the_step_exports_for_cpu_gpu_and_tpu(row):
    program, _ = exported(row)
    state = jax.tree.leaves(jax.eval_shape(row.make(averaged(row.cfg)).init, key(0)))
    for avals in (program.in_avals, program.out_avals):  # the state comes back as it went in
        for aval, leaf in zip(avals, state, strict=False):
            assert (aval.shape, aval.dtype) == (leaf.shape, leaf.dtype)
    assert program.platforms == PLATFORMS
    # A custom call is a kernel of one platform. Without any, each compiler takes its own kernels
    # for convolutions and attention, and random numbers have the same bits everywhere.
    assert "custom_call" not in program.mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "gan", "ddpm", "transformer", "lstm", "contrastive"])
def test_a_program_that_was_written_and_read_gives_the_same_numbers(name):
    row = dataclasses.replace(ROWS[name], cfg=sgd(ROWS[name].cfg))
    program, step = exported(row)
    read = jax.export.deserialize(program.serialize())
    state = row.make(averaged(row.cfg)).init(key(0))
    arrays = jax.tree.leaves((state, row.batch(0), jax.random.key_data(key(1))))
    # Another program may round a last bit differently.
    assert_same(read.call(*arrays), jax.jit(step)(*arrays), atol=1e-6)


def test_rules_place_moments_and_average_like_the_parameters():
    row = ROWS["ddpm"]
    family = row.make(averaged(row.cfg))._replace(
        rules=((r"net'\]\['Dense_0.*kernel", P(None, "data")),)
    )
    template = jax.eval_shape(family.init, key(0))
    placed = jax.tree_util.tree_leaves_with_path(engine.shardings_of(family, template, mesh_of(8)))
    cut = [jax.tree_util.keystr(path) for path, s in placed if s.spec == P(None, "data")]
    assert len(cut) == 4  # the parameter, both moments of Adam, the average
    assert {n.split("[")[0].split("(")[0] for n in cut} >= {".params", ".ema"}
    assert sum(".opt_state" in n for n in cut) == 2
    assert all("Dense_0" in n and "kernel" in n for n in cut)


def test_large_leaves_without_a_rule_are_cut_along_their_largest_axis():
    shapes = core.State(
        jax.ShapeDtypeStruct((), jnp.int32),
        {
            "big": jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
            "odd": jax.ShapeDtypeStruct((1021, 4093), jnp.float32),
            "small": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        },
        (),
    )
    placed = engine.shardings_of(core.Family(None, None, None, None), shapes, mesh_of(8))
    assert {n: s.spec for n, s in placed.params.items()} == {
        "big": P(None, "data"),
        "odd": P(),
        "small": P(),
    }


def test_ema_of_zero_keeps_nothing():
    assert vae.make(ROWS["vae"].cfg).init(key(0)).ema is None
    assert EMA(0.0).read(core.State(jnp.zeros((), jnp.int32), {"w": 1}, ())) == {"w": 1}
