"""core: one update, its order and its isolation, against closed forms."""

import copy
import typing
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aigc_jax import core, ddpm, gan, train, transformer, vae
from aigc_jax.core import EMA, Optim, State

KEY = jax.random.key(0)


def quadratic(params, state, batch, key):
    """Mean over rows of |w - x|^2 / 2: the gradient is w - mean(x)."""
    return 0.5 * jnp.square(params["w"][None] - batch["x"]).sum(-1).mean(), (state.extra, {})


def rows(seed, n=12, d=3):
    return {"x": jax.random.normal(jax.random.key(seed), (n, d))}


def test_sgd_is_the_textbook_update():
    optim = Optim("sgd", lr=0.1)
    state = core.start({"w": jnp.ones(3)}, optim)
    new, metrics = core.descend(quadratic, optim, state, rows(1), KEY)
    gradient = 1 - rows(1)["x"].mean(0)
    np.testing.assert_allclose(new.params["w"], 1 - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    np.testing.assert_allclose(metrics["lr"], 0.1)
    assert int(new.step) == 0 and new.ema is None  # these belong to finish


def test_momentum_moves_in_a_straight_line_to_its_end():
    optim = Optim("sgd", lr=0.1, momentum=0.5, momentum_end=0.7, momentum_steps=4)
    state = core.start({"w": jnp.ones(3)}, optim)
    w, velocity = np.ones(3), np.zeros(3)
    for i in range(8):
        state = core.finish(core.descend(quadratic, optim, state, rows(i), KEY)[0], EMA())
        velocity = min(0.7, 0.5 + 0.05 * i) * velocity + w - np.asarray(rows(i)["x"]).mean(0)
        w = w - 0.1 * velocity
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    with pytest.raises(ValueError, match="set both optim.momentum_end"):
        Optim("sgd", momentum_end=0.7)


@pytest.mark.parametrize(
    "optim, peer",
    [
        (Optim("adam", lr=0.01, b1=0.8, b2=0.99), optax.adam(0.01, b1=0.8, b2=0.99)),
        (
            Optim("adam", lr=0.01, weight_decay=0.1),
            optax.adamw(0.01, weight_decay=0.1, mask={"kernel": True, "bias": False}),
        ),
        (Optim("rmsprop", lr=0.01, b2=0.9), optax.rmsprop(0.01, decay=0.9, eps_in_sqrt=False)),
        (
            Optim("rmsprop", lr=0.01, b2=0.9, eps=0.0, eps_root=1e-3),
            optax.rmsprop(0.01, decay=0.9, eps=1e-3),
        ),
        (Optim("adagrad", lr=0.1, eps=0.0, eps_root=1e-3), optax.adagrad(0.1, 0.0, eps=1e-3)),
        (Optim("sgd", lr=0.01, momentum=0.9), optax.sgd(0.01, momentum=0.9)),
        (
            Optim("adam", lr=0.01, clip=0.5),
            optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01)),
        ),
    ],
)
def test_optimizers_agree_with_optax(optim, peer):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}

    def loss(params, state, batch, key):
        return jnp.square(batch["x"][:, :2] @ params["kernel"] + params["bias"][None]).mean(), (
            None,
            {},
        )

    state, theirs, moments = core.start(params, optim), params, peer.init(params)
    for i in range(5):
        state = core.finish(core.descend(loss, optim, state, rows(i), KEY)[0], EMA())
        grads = jax.grad(lambda p, i=i: loss(p, None, rows(i), KEY)[0])(theirs)
        updates, moments = peer.update(grads, moments, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name in params:
        assert np.abs(theirs[name] - params[name]).max() > 1e-3
        np.testing.assert_allclose(state.params[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-6, 1.0])
@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_eps_is_added_to_the_root_as_in_torch(name, size):
    """torch.optim.RMSprop and Adagrad, written in numpy; with gradients as small as eps the place of eps decides."""
    optim = Optim(name, lr=0.1, b2=0.9, eps=1e-6)
    state = core.start({"w": jnp.zeros(3)}, optim)
    w, v = np.zeros(3), np.zeros(3)
    for i in range(4):
        g = size * np.asarray(jax.random.normal(jax.random.key(i), (3,)), np.float64)
        g[0] = 0  # no gradient, no update

        def loss(params, state, batch, key, g=g):
            return (params["w"] * jnp.float32(g)).sum(), (None, {})

        state, _ = core.descend(loss, optim, state, {}, KEY)
        v = 0.9 * v + 0.1 * g**2 if name == "rmsprop" else v + g**2
        w = w - 0.1 * g / (np.sqrt(v) + 1e-6)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)


def test_momentum_counts_steps_and_not_the_updates_of_a_net():
    """Three updates a step, as of a critic: all three have the momentum of their step."""
    optim = Optim("sgd", lr=0.1, momentum=0.5, momentum_end=0.9, momentum_steps=4)
    state = core.start({"w": jnp.ones(3)}, optim)
    w, velocity = np.ones(3), np.zeros(3)
    for i in range(6):
        for j in range(3):
            state, _ = core.descend(quadratic, optim, state, rows(3 * i + j), KEY)
            velocity = (
                min(0.9, 0.5 + 0.1 * i) * velocity + w - np.asarray(rows(3 * i + j)["x"]).mean(0)
            )
            w = w - 0.1 * velocity
        state = core.finish(state, EMA())
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-4)


def test_the_clip_has_a_derivative_where_nothing_is_to_be_clipped():
    """Through an update from the optimum: d/dw (w - lr (w - mean)) is 1 - lr, and not 0 / 0."""
    optim, batch = Optim("sgd", lr=0.1, clip=1.0), {"x": jnp.zeros((4, 3))}

    def moved(w):
        state = core.start({"w": w}, optim)
        return core.descend(quadratic, optim, state, batch, KEY)[0].params["w"].sum()

    np.testing.assert_allclose(jax.grad(moved)(jnp.zeros(3)), 0.9, rtol=1e-6)
    far = jnp.array([3.0, 4.0, 0.0])  # the gradient's direction: only its length is held
    expected = 1 - 0.1 * ((1 - jnp.eye(3)[2]) * 0) - 0.1 * (jnp.ones(3) / 5 - far * far.sum() / 125)
    np.testing.assert_allclose(jax.grad(moved)(far), expected, rtol=1e-5)


def test_rates_warm_up_then_fall_to_the_floor():
    for curve, middle in (("linear", 0.55), ("cosine", 0.55), ("exponential", np.sqrt(0.1))):
        optim = Optim(lr=2.0, warmup=10, decay=100, curve=curve, floor=0.1)
        got = [float(optim.rate(s)) for s in (0, 5, 10, 60, 110, 1000)]
        np.testing.assert_allclose(got, [0, 1, 2, 2 * middle, 0.2, 0.2], rtol=1e-5)
    assert float(Optim(lr=0.3).rate(10**6)) == pytest.approx(0.3)


@pytest.mark.parametrize("warmup", [0, 10])
def test_rate_is_held_between_warm_up_and_decay(warmup):
    """CycleGAN's schedule: the first half at lr, then linear to 0."""
    optim = Optim(lr=2.0, warmup=warmup, hold=100, decay=100, curve="linear")
    got = [float(optim.rate(warmup + s)) for s in (0, 50, 100, 150, 200, 300)]
    np.testing.assert_allclose(got, [2, 2, 2, 1, 0, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="hold must be at least 0 and needs optim.decay"):
        Optim(hold=10)


def test_rate_counts_in_state_steps_not_in_updates():
    """n_critic updates within a step all see the step's rate."""
    optim = Optim("sgd", lr=1.0, decay=10, curve="linear")
    state = core.start({"w": jnp.ones(3)}, optim)._replace(step=jnp.array(5, jnp.int32))
    for _ in range(3):
        state, metrics = core.descend(quadratic, optim, state, rows(0), KEY)
        assert float(metrics["lr"]) == 0.5


def test_clip_acts_after_the_mean_over_micro_batches():
    optim = Optim("sgd", lr=1.0, clip=1.0)
    state = core.start({"w": jnp.zeros(1)}, optim)
    batch = {
        "x": jnp.array([[100.0], [-98.0], [100.0], [-98.0]])
    }  # parts of mean 100 and -98, together 1
    new, metrics = core.descend(quadratic, optim, state, batch, KEY, micro=2)
    np.testing.assert_allclose(new.params["w"], [1.0], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], 1.0, rtol=1e-5)


def test_micro_batches_use_little_memory():
    """Rolled: the peak does not grow with the number of parts."""
    optim = Optim("sgd")
    w = jnp.ones((64, 64))

    def loss(params, state, batch, key):
        h = batch["x"]
        for _ in range(8):
            h = jnp.tanh(h @ params["w"])
        return h.mean(), (None, {})

    def peak(micro):
        state = core.start({"w": w}, optim)
        step = jax.jit(lambda s, b, k: core.descend(loss, optim, s, b, k, micro=micro))
        return (
            step.lower(state, {"x": jnp.ones((4096, 64))}, KEY)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert peak(16) < 0.4 * peak(1)


def test_parts_are_strided_and_refuse_a_remainder():
    batch = {"x": jnp.arange(12).reshape(6, 2), "y": jnp.arange(6)}
    for n in (1, 2, 3):
        for i, part in enumerate(core.parts(batch, n)):
            np.testing.assert_array_equal(part["x"], batch["x"][i::n])
            np.testing.assert_array_equal(part["y"], batch["y"][i::n])
    with pytest.raises(ValueError, match="batch of 6 does not divide into 4"):
        core.parts(batch, 4)


def two_nets(params, state, batch, key):
    """A loss that reads both nets: only the one under training may move, and has a gradient."""
    gen, disc = (params if state.params[n] is None else state.params[n] for n in ("gen", "disc"))
    return jnp.square(gen["w"] * disc["w"] - batch["x"].mean()).sum(), (state.extra, {})


@pytest.mark.parametrize("net, other", [("gen", "disc"), ("disc", "gen")])
def test_an_update_moves_its_own_net_only(net, other):
    optims = {"gen": Optim(lr=0.1), "disc": Optim("sgd", lr=0.1, momentum=0.5)}
    params = {"gen": {"w": jnp.full(2, 2.0)}, "disc": {"w": jnp.full(2, 3.0)}}
    state = core.start(params, optims, extra={"gen": {"n": jnp.zeros(())}, "disc": {}})
    new, metrics = core.descend(two_nets, optims[net], state, rows(0), KEY, net=net)
    assert (new.params[net]["w"] != state.params[net]["w"]).all()
    for before, after in ((state.params, new.params), (state.opt_state, new.opt_state)):
        for a, b in zip(jax.tree.leaves(before[other]), jax.tree.leaves(after[other]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert set(metrics) == {f"{net}_loss", f"{net}_grad_norm", f"{net}_lr"}

    # Through gradients: what the update of one net becomes does not depend on the other's optimizer state.
    def moved(opt):
        s = state._replace(opt_state={**state.opt_state, other: opt})
        return (
            core.descend(two_nets, optims[net], s, rows(0), KEY, net=net)[0].params[net]["w"].sum()
        )

    slopes = jax.grad(moved, allow_int=True)(state.opt_state[other])
    assert all(not np.any(g) for g in jax.tree.leaves(slopes) if g.dtype == jnp.float32)


@pytest.mark.parametrize("net", [None, "gen"])
def test_a_loss_cannot_read_the_parameters_under_training(net):
    params = {"gen": {"w": jnp.ones(2)}, "disc": {"w": jnp.ones(2)}}
    optim = Optim()
    state = core.start(params, optim if net is None else {"gen": optim, "disc": optim})
    seen = []

    def loss(params, state, batch, key):
        seen.append(state.params)
        return sum(jnp.sum(x) for x in jax.tree.leaves(params)), (None, {})

    core.descend(loss, optim, state, rows(0), KEY, net=net)
    assert (
        seen[0] is None if net is None else (seen[0]["gen"] is None and seen[0]["disc"] is not None)
    )


def test_start_copies_the_average_and_finish_moves_it_once():
    ema = EMA(0.75, of=lambda s: {"w": s.params["w"], "stats": s.extra})
    state = core.start({"w": jnp.ones(2)}, Optim(), extra=jnp.zeros(3), ema=ema)
    assert state.ema["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()
    state = core.finish(state._replace(params={"w": jnp.full(2, 5.0)}, extra=jnp.ones(3)), ema)
    np.testing.assert_allclose(state.ema["w"], 4.6)  # the first decay is .1
    np.testing.assert_allclose(state.ema["stats"], 0.9)
    assert int(state.step) == 1
    assert ema.read(state) is state.ema


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.9, 0.9999])
def test_the_average_is_warmed_up(decay):
    """min(decay, (1 + t) / (10 + t)) in float64, t from 0; a run that starts again at t goes on with t."""
    ema = EMA(decay)
    state = core.start({"w": jnp.zeros(3)}, Optim(), ema=ema)
    expected = np.zeros(3)
    for t in range(40):
        w = np.asarray(jax.random.normal(jax.random.key(t), (3,)))
        state = core.finish(state._replace(params={"w": jnp.asarray(w)}), ema)
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * w
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5, atol=1e-6)
    late = core.finish(state._replace(step=jnp.int32(10**8)), ema)
    np.testing.assert_allclose(
        late.ema["w"], decay * expected + (1 - decay) * w, rtol=1e-4, atol=1e-6
    )


def test_a_short_run_averages_near_its_end():
    """300 updates towards 1 with decay .9999: a constant decay would leave 97 % of the first value."""
    ema, optim = EMA(0.9999), Optim("sgd", lr=0.05)
    step = jax.jit(core.make_step(quadratic, optim, ema=ema))
    state = core.start({"w": jnp.full(3, 100.0)}, optim, ema=ema)
    for _ in range(300):
        state, _ = step(state, {"x": jnp.ones((2, 3))}, KEY)
    np.testing.assert_allclose(state.params["w"], 1, atol=1e-3)
    np.testing.assert_allclose(state.ema["w"], 1, atol=0.01)


def test_labels_are_whole_numbers_of_the_right_shape_and_range():
    for label in (2, np.int64(2), jnp.int32(2), np.full(4, 2, np.uint8), [2] * 4, jnp.full(4, 2)):
        found = core.labels(label, 3, (4,))
        assert found.dtype == jnp.int32 and found.tolist() == [2] * 4
    np.testing.assert_array_equal(core.labels(np.array([0, 1]), 3, (5, 2)), [[0, 1]] * 5)
    np.testing.assert_array_equal(core.labels(None, 3, (4,), in_turn=True), [0, 1, 2, 0])
    assert core.labels(None, 0, (4,)) is core.labels(None, 0, (4,), in_turn=True) is None
    assert jax.jit(lambda y: core.labels(y, 3, (4,)))(jnp.arange(4) % 3).tolist() == [0, 1, 2, 0]
    seven = jnp.array([7])
    with pytest.raises(
        ValueError, match=r"label must lie in 0\.\.2, got 7\.\.7"
    ):  # what is concrete inside of jit too
        jax.jit(lambda: core.labels(seven, 3, (1,)))()


@pytest.mark.parametrize(
    "label, classes, words",
    [
        (7, 3, r"label must lie in 0\.\.2, got 7\.\.7"),
        (3, 3, r"0\.\.2, got 3"),
        (-1, 3, r"got -1\.\.-1"),
        ([0, 1, 2, 3], 3, r"got 0\.\.3"),
        (np.array([0, 1, 2, -1], np.int8), 3, r"got -1\.\.2"),
        (np.full(4, 2**40), 3, "got 1099511627776"),
        (1.0, 3, r"whole numbers in 0\.\.2, got float64"),
        (jnp.zeros(4), 3, "got float32"),
        (jnp.zeros(4, jnp.bfloat16), 3, "got bfloat16"),
        (True, 3, "got bool"),
        (np.zeros(4, bool), 3, "got bool"),
        ([0, 1], 3, r"one entry for each of 4 samples, got \(2,\)"),
        ([0], 3, r"got \(1,\)"),
        (np.zeros((4, 1), int), 3, r"got \(4, 1\)"),
        (None, 3, "a conditional model needs label="),
        (0, 0, "takes no labels"),
    ],
)
def test_bad_labels_are_refused_in_one_line(label, classes, words):
    with pytest.raises(ValueError, match=words) as e:
        core.labels(label, classes, (4,))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_pixels_are_whole_numbers_within_the_levels(levels):
    image = np.arange(levels).reshape(1, 1, -1, 1)
    for dtype in (np.uint8, np.int32, np.int64, np.uint16):
        found = core.pixels(image.astype(dtype), levels)
        assert found.dtype == jnp.float32 and found.ravel().tolist() == list(range(levels))
    for wrong in (
        image / 1.0,
        image.astype(np.float16),
        jnp.asarray(image, jnp.bfloat16),
        image > 0,
    ):
        for call in (core.pixels, jax.jit(core.pixels, static_argnums=1)):
            with pytest.raises(
                ValueError,
                match=rf"image must be whole numbers in 0\.\.{levels - 1}, got .*encode or elbo",
            ):
                call(wrong, levels)
    for wrong in (image + 1, image - 1, (image + 2).astype(np.int16)):
        with pytest.raises(ValueError, match=rf"image must lie in 0\.\.{levels - 1}, got"):
            core.pixels(wrong, levels)


def test_step_keys_depend_on_the_step_alone():
    keys = [
        tuple(np.asarray(jax.random.key_data(core.step_key(KEY, s))).tolist()) for s in (0, 1, 2, 1)
    ]
    assert keys[1] == keys[3] and len(set(keys)) == 3


def test_state_holds_arrays_only():
    with_net = core.start({"w": jnp.ones(2)}, Optim())
    assert State._fields == ("step", "params", "opt_state", "extra", "ema")
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(with_net))


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("b1", 1.0),
        ("clip", -1.0),
        ("floor", 2.0),
        ("eps", 0.0),
    ],
)
def test_bad_optim_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"optim\.{field}.*{value}"):
        Optim(**{field: value})
    with pytest.raises(ValueError, match="ema"):
        EMA(1.0)


@dataclass(frozen=True)
class Fields:  # pytest checks no annotations of a test, so that only check_fields does
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    word: str = ""
    choice: Literal["a", "b"] = "a"
    maybe: float | None = None
    dtype: Literal["float32"] | None = None
    widths: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)
    optim: Optim = Optim()
    anything: Any = None


@pytest.mark.parametrize(
    ("field", "good"),
    [
        ("flag", (True, np.bool_(False))),
        ("count", (-1, 10**20, np.int64(2), np.uint8(2))),
        ("rate", (1, 1.5, np.float32(0.5), np.float64(0.5), np.int32(1), float("nan"))),
        ("word", ("a", np.str_("a"))),
        ("choice", ("b", np.str_("b"))),
        ("maybe", (None, 1, 0.5, np.float32(0.5))),
        ("dtype", (None, "float32")),
        ("widths", ((), (1,), (1, np.int64(2), 3), [], [1, 2])),
        ("pair", ((1, 0.5), [0.0, np.float32(0.5)])),
        ("optim", (Optim(lr=0.1),)),
        ("anything", (None, 1, "a", [], object)),
    ],
)
def test_fields_that_fit_their_annotations_pass(field, good):
    for value in good:
        core.check_fields(Fields(**{field: value}))


NOT_NUMBERS = (None, "1", (1,), 1j, True, np.bool_(True), np.array([1, 2]), {}, object)


@pytest.mark.parametrize(
    ("field", "rule", "bad"),
    [
        ("flag", "True or False", (1, 0.0, None, "True", ())),
        ("count", "a whole number", (*NOT_NUMBERS, 1.0, np.float64(1.0), float("inf"))),
        ("rate", "a number", NOT_NUMBERS),
        ("word", "of type str", (None, 1, b"a", ("a",))),
        ("choice", "one of a, b", (None, "c", "A", 1, ("a",))),
        ("maybe", "a number, or None", ("None", (0.5,), True)),
        ("dtype", "one of float32, or None", ("float16", "None", 32)),
        ("widths", "a tuple, each a whole number", (None, 1, "12", (1.0,), ("1",), (True,), {1})),
        ("pair", "a tuple of 2, each a number", ((), (0.1,), (0.1, 0.2, 0.3), (0.1, None), 0.1)),
        ("optim", "of type Optim", (None, {}, Optim)),
    ],
)
def test_fields_that_do_not_fit_are_refused_by_name_and_value(field, rule, bad):
    for value in bad:
        with pytest.raises(ValueError) as e:
            core.check_fields(Fields(**{field: value}), name="model.gen")
        assert str(e.value) == f"model.gen.{field} must be {rule}, not {value!r:.60}"


def test_the_smallest_value_of_a_field():
    core.check_at_least(Fields(count=2, rate=2.0), 2, "count", "rate")
    for low, words in (
        ({"count": 1}, r"run\.count must be at least 2, got 1"),
        ({"rate": float("nan")}, r"run\.rate must be at least 2, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            cfg = Fields(**{"count": 2, "rate": 2.0} | low)
            core.check_at_least(cfg, 2, "count", "rate", name="run")


@pytest.mark.parametrize(
    ("cfg", "check", "name"),
    [
        (Optim(), Optim.__post_init__, "optim"),
        (vae.Config(), vae.Config.__post_init__, "model"),
        (gan.Config(), gan.Config.__post_init__, "model"),
        (gan.NetConfig(), lambda net: net.check("gen"), "model.gen"),
        (ddpm.Config(), ddpm.Config.__post_init__, "model"),
        (ddpm.DiscreteConfig(), ddpm.DiscreteConfig.__post_init__, "model"),
        (ddpm.NetConfig(), lambda net: net.check((32, 32, 3)), "model.net"),
        (transformer.Config(), transformer.Config.__post_init__, "model"),
        (train.Run(), train.Run.__post_init__, "run"),
    ],
)
def test_every_config_checks_its_annotations(cfg, check, name):
    """The fields are set past __init__: in pytest, jaxtyping would refuse them before our own check."""
    hints = typing.get_type_hints(type(cfg))
    for field in fields(cfg):
        wrong = copy.copy(cfg)
        object.__setattr__(wrong, field.name, object)
        if hints[field.name] is Any or (name, field.name) in (("run", "folder"), ("run", "init")):
            continue  # an optimizer, which `start` checks; folders, which may be paths
        with pytest.raises(ValueError, match=rf"^{name}\.{field.name} must be .*, not <class"):
            check(wrong)


def test_every_choice_has_its_entry():
    def choices(config, field):
        return set(typing.get_args(typing.get_type_hints(config)[field]))

    assert choices(Optim, "name") == set(core._DIRECTIONS)
    assert choices(Optim, "curve") == set(core._CURVES)
    assert choices(gan.NetConfig, "init") == set(gan.nets.INITIALISERS)
    assert choices(ddpm.Config, "objective") == {"simple", "vlb", "hybrid", *ddpm._WEIGHTS}


def test_a_momentum_that_moves_asks_for_the_step():
    optim = Optim("sgd", momentum=0.5, momentum_end=0.7, momentum_steps=4)
    params = {"w": jnp.ones(3)}
    chain = optim.chain()
    with pytest.raises(ValueError, match=r"pass step=state\.step"):
        chain.update(params, chain.init(params), params)


SMALL = {"shape": (4, 4, 1), "levels": 17, "classes": 3}


def x64_vae(**options):
    return vae.make(
        vae.Config(**SMALL, binarisation="dynamic", latent_dim=2, hidden=(4,), ema=0.9, **options)
    )


def x64_gan(**options):
    gen, disc = (
        gan.NetConfig(widths=(4,), norm="batch"),
        gan.NetConfig(widths=(4,), dropout=(0.2, 0.5)),
    )
    return gan.make(
        gan.Config(**SMALL, latent_dim=2, gen=gen, disc=disc, penalty="gp", ema=0.9, **options)
    )


def x64_ddpm(**options):
    return ddpm.make(
        ddpm.Config(**SMALL, T=3, net=ddpm.NetConfig("mlp", (4,)), micro=2, mirror=True, **options)
    )


X64 = {
    "vae": x64_vae,
    "vae of two layers": partial(
        x64_vae, upper_dim=2, upper_hidden=(3,), objective="dreg", k=2, kl_warmup=9, micro=2
    ),
    "gan": x64_gan,
    "gan in parts": partial(x64_gan, micro=2),
    "ddpm": partial(x64_ddpm, times="importance", schedule="cosine"),
    "ddpm, learned variance": partial(
        x64_ddpm, variance="learned", objective="hybrid", schedule="cosine"
    ),
    "ddpm, straight": partial(x64_ddpm, schedule="straight", prediction="velocity"),
    "vdm": partial(
        x64_ddpm,
        schedule="learned",
        variance="beta_tilde",
        objective="vlb",
        times="low_discrepancy",
    ),
    "binomial": lambda: ddpm.make_discrete(
        ddpm.DiscreteConfig(4, T=3, terms=2, net=ddpm.NetConfig("mlp", (4,)), micro=2)
    ),
    "transformer": lambda: transformer.make(
        transformer.Config(5, 8, layers=1, heads=1, width=4, micro=2)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", X64)
def test_x64_changes_no_dtype_of_a_state_or_a_sample(name):
    family, key = X64[name](), jax.random.key(0)
    batch = {"image": np.zeros((4, 4, 4, 1), np.uint8), "label": np.zeros(4, np.uint8)}
    batch = {
        "binomial": {"points": np.zeros((4, 4), np.float32)},
        "transformer": {"tokens": np.zeros((4, 9), int)},
    }.get(name, batch)
    state = jax.eval_shape(family.init, key)
    with jax.enable_x64(True):
        assert jax.eval_shape(family.init, key) == state
        assert jax.eval_shape(family.step, state, batch, key)[0] == state
        drawn = jax.eval_shape(partial(family.sample, n=2), state, key)
    assert drawn.dtype == (jnp.int32 if name == "transformer" else jnp.float32)
