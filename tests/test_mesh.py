"""Meshes of data x model, scanned layers, remat by name: the numbers of one device, and what each device holds."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aigc_jax import core, data, ddpm, train, transformer, vae
from aigc_jax.nn import sharding
from aigc_jax.train import engine

B = 40  # no other size is a multiple of 40
SGD = core.Optim("sgd", lr=0.1)
TEXT = transformer.Config(16, 8, 2, 8, 32, std=0.2, ema=0.9, optim=SGD)
MASKED = ddpm.TokenConfig(16, 8, layers=2, heads=8, width=32, std=0.2, optim=SGD)
PICTURE = ddpm.Config(shape=(8, 8, 1), levels=17, optim=SGD)
DIT = ddpm.NetConfig("dit", widths=(32, 32), heads=8, dropout=0.0)
UNET = ddpm.NetConfig("unet", (16, 32), 1, attention=(4,), heads=8, groups=8, dropout=0.0)
MODELS = {
    "transformer": (transformer.make, TEXT),
    "swiglu": (transformer.make, replace(TEXT, activation="swiglu", hidden=48, positions="rotary")),
    "masked": (ddpm.make_tokens, MASKED),
    "dit": (ddpm.make, replace(PICTURE, net=DIT)),
    "unet": (ddpm.make, replace(PICTURE, net=UNET)),
}
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(autouse=True)
def small_leaves_are_split(monkeypatch):
    monkeypatch.setattr(engine, "CUT_FROM", 512)


def batch_of(name):
    rng = np.random.default_rng(0)
    if name in ("dit", "unet"):
        return {"image": rng.integers(0, 17, (B, 8, 8, 1)).astype(np.uint8)}
    length = 8 if name == "masked" else 9
    return {"tokens": rng.integers(0, 16, (B, length)).astype(np.int32)}


def shaken(params):
    """Parameters of which none is 0, as some are at first."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def first_state(make, cfg):
    state = jax.jit(make(cfg).init)(jax.random.key(0))
    params = jax.jit(shaken)(state.params)
    return state._replace(params=params, ema=None if state.ema is None else params)


def trained(make, cfg, batch, rows, tensor, steps=3):
    """Returns (the last state, the compiled update) on a mesh of rows x tensor devices."""
    family, state = make(cfg), first_state(make, cfg)
    mesh = engine.mesh_of(jax.devices()[: rows * tensor], tensor)
    places = engine.shardings_of(family, state, mesh)
    state = jax.device_put(state, places)
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    update = jax.jit(engine.global_update(family, mesh), out_shardings=(places, None))
    compiled = update.lower(state, batch, jax.random.key(7)).compile()
    for _ in range(steps):
        state, _ = compiled(state, batch, jax.random.key(7))
    return state, compiled


@cache
def alone(name):
    make, cfg = MODELS[name]
    return jax.device_get(trained(make, cfg, batch_of(name), 1, 1)[0])


def assert_near(found, wanted, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), found, wanted)


# ------------------------------------------------------------------------------------------ meshes


def how_often(name, mesh):
    """Marks a case that takes a minute to compile: `make test-all` takes one mesh, `make soak` the others."""
    if name == "transformer":
        return []
    return [pytest.mark.slow if mesh == (4, 2) else pytest.mark.soak]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, id=f"{name}-{mesh[0]}x{mesh[1]}", marks=marks)
        for name in MODELS
        for mesh in MESHES
        for marks in (how_often(name, mesh),)
    ],
)
def test_a_mesh_has_the_numbers_of_one_device(name, mesh):
    make, cfg = MODELS[name]
    (rows, tensor), wanted = mesh, alone(name)
    state, compiled = trained(make, cfg, batch_of(name), rows, tensor)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), wanted.params, first_state(make, cfg).params
    )
    assert max(jax.tree.leaves(moved)) > 0.01
    assert_near(state, wanted, atol=1e-6)
    if rows > 1:  # no device sees the rows of another
        gathered = re.findall(r"= (.+?) all-gather\(", compiled.as_text())
        sizes = {int(n) for shape in gathered for n in re.findall(r"\d+", shape.split("{")[0])}
        assert gathered and not [n for n in sizes if n and n % B == 0]


PAIRS = {  # which kernels, embeddings and biases the axis model splits; written down by hand
    "transformer": r"(qkv|up|out|down)'\]\['kernel'|wte|up'\]\['bias'",
    "masked": r"(qkv|up|out|down|head)'\]\['kernel'|(up|head)'\]\['bias'",  # 17 rows of wte do not divide
    "dit": r"block\d'\]\['(qkv|up|out|down)'\]\['kernel'|up'\]\['bias'",  # not the last layer, "out"
    "unet": r"(down|middle|up)\w+'\]\['(Conv_[01]|Dense_0)'\]\['kernel'|attention'\]\['(q|k|v|out)'\]\['kernel'"
    r"|(down|middle|up)\w+'\]\['(Conv_0|Dense_0)'\]\['bias'|GroupNorm_1|attention'\]\['(q|k|v)'\]\['bias'",
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_device_holds_its_share_of_every_leaf(name, mesh):
    make, cfg = MODELS[name]
    family = make(replace(cfg, optim=core.Optim("adam"), ema=0.9))
    template = jax.eval_shape(family.init, jax.random.key(0))
    rows, tensor = mesh
    placed = engine.shardings_of(family, template, engine.mesh_of(jax.devices(), tensor))
    held = {"params": 0, "moments": 0, "ema": 0}
    wanted = dict(held)
    places = jax.tree.leaves(placed)
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(template), places, strict=True
    ):
        where = jax.tree_util.keystr(path)
        part = (
            "params"
            if where.startswith(".params")
            else "ema"
            if where.startswith(".ema")
            else "moments"
        )
        split = tensor if re.search(PAIRS[name], where) else 1
        size = leaf.size // split
        free = [n for n in leaf.shape if n % rows == 0]
        if size >= engine.CUT_FROM and free:
            size //= rows
        held[part] += np.prod(place.shard_shape(leaf.shape))
        wanted[part] += size
    assert held == wanted
    # Adam has two moments; its count and the step are two numbers more.
    assert held["params"] == held["ema"] == (held["moments"] - 2) // 2
    assert tensor == 1 or held["params"] < 0.6 * sum(
        x.size for x in jax.tree.leaves(template.params)
    )


def test_rules_that_do_not_apply_are_left_out():
    axes = {"data": 4, "model": 2}
    assert engine._spec(P("model"), (7, 8), axes) == P()  # 7 does not divide
    assert engine._spec(P(None, "pipe"), (8, 8), axes) == P()  # no such axis
    assert engine._spec(P("model", "data"), (8,), axes) == P()  # a factored moment has fewer axes
    assert engine._spec(P(("data", "model")), (8, 8), axes) == P(("data", "model"))
    assert engine._spec(P(None, "model"), (64, 64), axes) == P("data", "model")
    assert engine._spec(P("model"), (64, 64), {"data": 8}) == P("data")
    assert engine._spec(P(), (0, 3), axes) == P()


def traced(make, cfg, batch, tensor):
    family, mesh = make(cfg), engine.mesh_of(jax.devices(), tensor)
    state = jax.eval_shape(family.init, jax.random.key(0))
    return jax.eval_shape(engine.global_update(family, mesh), state, batch, jax.random.key(0))


@pytest.mark.slow
def test_heads_and_widths_that_cannot_be_shared_are_named():
    narrow = replace(UNET, widths=(12, 32), groups=4, heads=4)
    for make, cfg, name, words in (
        (transformer.make, replace(TEXT, heads=4), "transformer", "cannot share 4 heads"),
        (transformer.make, replace(TEXT, hidden=36), "transformer", "share 36 units of the MLP"),
        (ddpm.make, replace(PICTURE, net=narrow), "unet", "12 channels of a residual block"),
    ):
        with pytest.raises(ValueError, match=r"8 devices \(the axis model\) cannot share") as e:
            traced(make, cfg, batch_of(name), 8)
        assert words in str(e.value) and "take a multiple of 8" in str(e.value)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "data", "model") is x
    sharding.check_divides(7, "heads")
    with jax.set_mesh(engine.mesh_of(jax.devices()[:1])):
        assert sharding.constrain(x, "data", "model") is x


# --------------------------------------------------------------------------------------- run.tensor


def texts():
    rows = np.random.default_rng(3).integers(0, 16, (40, 9)).astype(np.int32)
    return data.from_arrays({"tokens": rows}, levels=16)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh_and_is_loaded_on_one_device(tmp_path):
    text = texts()
    run = train.Run(str(tmp_path / "run"), steps=4, batch_size=8, save_every=2, tensor=2)
    plain = train.fit(transformer.make, TEXT, replace(run, folder="", tensor=1, devices=1), text)
    train.fit(transformer.make, TEXT, replace(run, steps=2), text)
    on = train.fit(transformer.make, TEXT, replace(run, tensor=4), text)
    assert_near(jax.device_get(on.state.params), jax.device_get(plain.state.params), atol=1e-6)
    again = train.load(tmp_path / "run")
    assert_near(jax.device_get(again.state), jax.device_get(on.state), atol=0)


def test_a_model_without_layers_to_share_is_refused():
    cfg = vae.Config(shape=(8, 8, 1), levels=17, latent_dim=2, hidden=(8,))
    with pytest.raises(train.Refused, match="is 2, but this model has no layers to share"):
        train.fit(vae.make, cfg, train.Run(batch_size=8, tensor=2), data.load("digits"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensor": 3}, "run.tensor is 3, which does not divide 8 devices"),
        ({"tensor": 2, "pmap": True}, "run.tensor splits layers, run.pmap copies them"),
        (
            {"tensor": 2, "batch_size": 6},
            "run.batch_size 6 does not divide by 4 groups of 2 devices",
        ),
    ],
)
def test_runs_that_cannot_be_split_are_refused(change, words):
    with pytest.raises(train.Refused, match=words):
        train.fit(
            transformer.make,
            TEXT,
            replace(train.Run(batch_size=8), **change),
            texts(),
        )
    with pytest.raises(ValueError, match="run.tensor must be at least 1"):
        train.Run(tensor=0)


# ----------------------------------------------------------------------------- scanned layers, remat

SCANS = {
    "transformer": lambda cfg: replace(cfg, scan=True),
    "masked": lambda cfg: replace(cfg, scan=True),
    "dit": lambda cfg: replace(cfg, net=replace(cfg.net, scan=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True, "dots"])
@pytest.mark.parametrize("name", SCANS)
def test_scanned_layers_have_the_same_numbers_and_parameters(name, remat):
    make, cfg = MODELS[name]
    cfg = SCANS[name](cfg)
    cfg = (
        replace(cfg, net=replace(cfg.net, remat=remat))
        if name == "dit"
        else replace(cfg, remat=remat)
    )
    assert_near(jax.device_get(trained(make, cfg, batch_of(name), 1, 1)[0]), alone(name), atol=1e-6)
    text = str(
        jax.make_jaxpr(make(cfg).step)(first_state(make, cfg), batch_of(name), jax.random.key(0))
    )
    assert ("checkpoint" in text or "remat" in text) == bool(remat)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [None, "dots"])
def test_scanned_layers_have_the_same_numbers_on_a_mesh(remat):
    cfg = replace(TEXT, scan=True, remat=remat or False)
    state, _ = trained(transformer.make, cfg, batch_of("transformer"), 4, 2)
    assert_near(jax.device_get(state), alone("transformer"), atol=1e-6)


@pytest.mark.slow
def test_bfloat16_on_a_mesh_is_as_near_as_on_one_device():
    cfg = replace(TEXT, dtype="bfloat16")
    found = [
        jax.device_get(trained(transformer.make, cfg, batch_of("transformer"), *mesh)[0].params)
        for mesh in ((1, 1), (4, 2))
    ]
    exact = alone("transformer").params
    away = [
        max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (exact, x)), strict=True))
        for x in found
    ]
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}
    assert 0 < away[1] < 2 * away[0] < 0.02


@pytest.mark.slow
def test_scanned_layers_write_the_same_text_and_have_the_same_attention():
    params, key = first_state(transformer.make, TEXT).params, jax.random.key(2)
    scanned = replace(TEXT, scan=True)
    prompt = jnp.array([[3, 1, 4]], jnp.int32)
    texts = [
        transformer.generate(cfg, params, prompt, key, max_new_tokens=5) for cfg in (TEXT, scanned)
    ]
    np.testing.assert_array_equal(*texts)
    weights = [transformer.attention(cfg, params, prompt) for cfg in (TEXT, scanned)]
    np.testing.assert_array_equal(*weights)


@pytest.mark.slow
def test_scanned_layers_drop_by_the_same_law_and_each_its_own():
    """With dropout the mean over keys is near the unrolled one's, and layers draw different masks."""
    cfg = replace(TEXT, dropout=0.3, layers=2)
    params, tokens = (
        first_state(transformer.make, cfg).params,
        jnp.asarray(batch_of("transformer")["tokens"][:2, :8]),
    )
    keys = jax.random.split(jax.random.key(5), 2000)

    def moments(cfg):
        draws = jax.vmap(lambda key: transformer.apply(cfg, params, tokens, key))(keys)
        return draws.mean(0), draws.std(0)

    (mean, std), (mean_scan, std_scan) = (
        jax.jit(moments, static_argnums=0)(c) for c in (cfg, replace(cfg, scan=True))
    )
    error = np.abs(mean - mean_scan) / (np.asarray(std) / np.sqrt(1000))
    assert error.max() < 5 and std.min() > 0
    np.testing.assert_allclose(std, std_scan, rtol=0.15)


def test_a_scan_is_for_equal_blocks():
    with pytest.raises(
        ValueError, match="model.net.scan is for equal blocks, so for dit, not unet"
    ):
        replace(PICTURE, net=replace(UNET, scan=True))


@pytest.mark.slow
def test_dots_keeps_products_and_recomputes_the_rest():
    """Counted in the gradient's program: "dots" repeats no product of a kernel, True repeats all."""

    def products(remat):
        cfg = replace(TEXT, remat=remat)
        params = first_state(transformer.make, cfg).params
        tokens = jnp.asarray(batch_of("transformer")["tokens"])
        loss = jax.grad(lambda p: transformer.nll(cfg, p, tokens).mean())
        return str(jax.make_jaxpr(loss)(params)).count("dot_general")

    none, dots, everything = products(False), products("dots"), products(True)
    # Of each of two blocks "dots" repeats the two products of attention, which have batch axes. True
    # repeats these, qkv, out, up and the four means of two norms; of down only the inputs are needed.
    assert dots - none == 2 * 2
    assert everything - none == 2 * 9
