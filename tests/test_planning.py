"""`train.plan`: operations by formula beside independent counts, memory, traffic between devices, the command."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from aigc_jax import __main__ as commands
from aigc_jax import data, ddpm, gan, train, transformer, vae
from aigc_jax.commands.plan import devices_for, how_many, lighter, tensor_of
from aigc_jax.train import engine, planning

DIGITS = data.load("digits")
WIDE = gan.NetConfig(widths=(256, 256))
STEPS = {  # (make, config, batch): wide enough that products are most of the work
    "vae": (vae.make, vae.Config(shape=(8, 8, 1), levels=17, latent_dim=16, hidden=(256,)), 64),
    "gan": (
        gan.make,
        gan.Config(shape=(8, 8, 1), levels=17, latent_dim=64, gen=WIDE, disc=WIDE),
        64,
    ),
    "ddpm": (
        ddpm.make,
        ddpm.Config(shape=(8, 8, 1), levels=17, net=ddpm.NetConfig("mlp", widths=(256, 256))),
        64,
    ),
    "transformer": (
        transformer.make,
        transformer.Config(vocab=128, context=32, layers=2, heads=4, width=128),
        16,
    ),
}


def batch_of(name, size):
    if name == "transformer":
        return {"tokens": np.zeros((size, 33), np.int32)}
    return {"image": DIGITS.batch(0, 0, size)["image"]}  # labels that are not used are not sent


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (4, 0, 2)])
def test_a_product_takes_2mkn(shape):
    m, k, n = shape
    assert planning.flops(jnp.dot, ones(m, k), ones(k, n)) == 2 * m * k * n


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(2, 0), (1, 3)]])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilations", [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 3), (2, 1))])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2)])  # of features, of the batch
def test_a_convolution_counts_what_meets_a_value(padding, strides, dilations, groups):
    """Independent: with all values 1, an output is the number of its multiplications."""
    lhs, rhs = dilations
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding if max(lhs) == 1 or isinstance(padding, list) else [(1, 1), (0, 2)],
        lhs_dilation=lhs,
        rhs_dilation=rhs,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups[0],
        batch_group_count=groups[1],
    )
    x, kernel = ones(2, 7, 6, 4), ones(3, 2, 4 // groups[0], 6)
    assert planning.flops(conv, x, kernel) == 2 * int(conv(x, kernel).sum()) > 0


@pytest.mark.parametrize("argnum", [0, 1])
def test_gradients_of_a_convolution_cost_as_much_as_itself(argnum):
    """Each multiplication of the forward pass returns once in either gradient, strides and all."""

    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)

    x, kernel = ones(2, 9, 8, 3), ones(3, 3, 3, 5)
    y, pull = jax.vjp(lambda v: conv(v, kernel) if argnum == 0 else conv(x, v), (x, kernel)[argnum])
    assert planning.flops(pull, y) == planning.flops(conv, x, kernel) > 0


def test_loops_count_as_often_as_they_run_and_branches_once():
    w = ones(4, 4)
    once = planning.flops(jnp.dot, w, w)

    def scanned(x):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, w), None), x, None, length=7)[0]

    def branched(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    def looped(x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)

    assert planning.flops(scanned, w) == 7 * once
    assert planning.flops(branched, w) == 2 * once
    assert planning.flops(looped, w) == once
    assert planning.flops(jax.checkpoint(jnp.dot), w, w) == once
    assert planning.flops(jnp.sum, w) == 0


@pytest.fixture(scope="module", params=STEPS)
def planned(request):
    make, cfg, size = STEPS[request.param]
    batch = batch_of(request.param, size)
    plans = [train.plan(make, cfg, batch, jax.devices()[:n]) for n in (1, 8)]
    return request.param, make, cfg, batch, *plans


@pytest.mark.slow
def test_operations_by_formula_are_near_what_the_compiler_counts(planned):
    """The compiler counts elementwise work too, and merges a product that is written twice."""
    *_, one, eight = planned
    assert one.flops == eight.flops
    assert abs(one.flops / one.compiled_flops - 1) < 0.1
    assert one.compiled_flops / 8 <= eight.compiled_flops < one.compiled_flops / 4


@pytest.mark.slow
def test_memory_is_the_state_and_a_part_of_the_batch_and_the_state_is_reused(planned):
    _, make, cfg, batch, one, eight = planned
    state = jax.eval_shape(make(cfg).init, jax.random.key(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    for plan in (one, eight):
        part = sum(np.asarray(x).nbytes for x in jax.tree.leaves(batch)) / plan.devices
        assert 0 <= plan.arguments - size - part <= 64  # and the key
        assert plan.reused == size  # donated
        assert plan.memory == plan.arguments + plan.temporaries + plan.outputs - plan.reused


def test_devices_exchange_gradients_and_little_else(planned):
    name, make, cfg, _, one, eight = planned
    assert one.traffic == {}
    params = jax.eval_shape(make(cfg).init, jax.random.key(0)).params
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert set(eight.traffic) == {"all-reduce"}  # no batch is gathered
    assert size <= eight.traffic["all-reduce"][1] <= 2.2 * size, name


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("  %a = f32[8,16]{1,0} all-reduce(%x), to_apply=%add", {"all-reduce": (1, 512)}),
        ("  a = (f32[2]{0}, bf16[3]{0}, pred[]) all-reduce(x, y, z)", {"all-reduce": (1, 15)}),
        ("  a = (f32[1,2], f32[4,2]{1,0}) all-gather-start(x)", {"all-gather": (1, 32)}),
        (
            "  a = ((f32[1], s8[2]), (f32[4], s8[8])) all-gather-start(x, y)",
            {"all-gather": (1, 24)},
        ),
        ("  a = f32[4]{0:T(256)S(1)} all-reduce-start(x)", {"all-reduce": (1, 16)}),
        (
            "  a = (f32[4], f32[4], u32[], u32[]) collective-permute-start(x)",
            {"collective-permute": (1, 16)},
        ),
        ("  a = f8e4m3fn[3]{0} ragged-all-to-all(x)", {"ragged-all-to-all": (1, 3)}),
        ("  a = u8[5]{0} collective-permute(x)\n" * 2, {"collective-permute": (2, 10)}),
        ("  a = f32[] add(all-reduce.1, y)", {}),
    ],
)
def test_traffic_is_read_from_the_programs_text(line, found):
    assert planning.traffic(line) == found


PROGRAM = """
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = f32[4]{0} all-reduce(%x), channel_id=3, to_apply=%add
  %f = f32[4]{0} fusion(%a), kind=kOutput, calls=%fused
}

%fused (p: f32[4]) -> f32[4] {
  %b = f32[16]{0} all-gather(%p), channel_id=9, dimensions={0}
}

%cond.1 (p: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%cond.1, body=%body.1
  %d = f32[8]{0} all-gather(%x), channel_id=4
  %e = f32[8]{0} all-gather(%y), channel_id=4
}
"""


def test_a_tpus_loops_say_their_length_in_the_condition_and_copies_count_once():
    found = {"all-reduce": (12, 12 * 16), "all-gather": (13, 12 * 64 + 32)}
    assert planning.traffic(PROGRAM) == found
    known = PROGRAM.replace("body=%body.1", 'body=%body.1, x={"known_trip_count":{"n":"5"}}')
    assert planning.traffic(known)["all-reduce"] == (5, 5 * 16)
    unknown = PROGRAM.replace("direction=LT", "direction=NE")
    assert planning.traffic(unknown)["all-reduce"] == (1, 16)


def test_traffic_of_a_loop_counts_as_often_as_it_runs():
    mesh = engine.mesh_of(jax.devices())
    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (P("data"), P()))

    @partial(jax.jit, in_shardings=(rows, rows), out_shardings=whole)
    def looped(x, w):  # w [8, 64, 64] is gathered as a whole; in each pass x w is summed
        def body(c, w):
            y = jax.lax.with_sharding_constraint((x * c).sum(0) @ w, whole)
            return c + y[0], y

        return jax.lax.scan(body, 0.0, jax.lax.with_sharding_constraint(w, whole))[1]

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 64), (8, 64, 64)))
    found = planning.traffic(looped.lower(*shapes).compile().as_text())
    assert found["all-reduce"] == (8, 8 * 64 * 4)
    assert found["all-gather"] == (1, 8 * 64 * 64 * 4)


def test_a_bound_is_the_time_of_a_chip_that_does_nothing_else():
    plan = planning.Plan(4, 30, 1, 20, 1, 7, 800, 0.0, {"all-reduce": (2, 30)})
    assert plan.memory == 30 + 1 + 20 - 1 + 7
    chip = planning.Chip(100, 10.0, 5.0, 3.0)
    assert plan.bounds(chip) == {"products": 20.0, "memory": 10.0, "links": 10.0}


def test_the_largest_batch_lies_on_a_line():
    def plan(memory):
        return planning.Plan(4, memory, 0, 0, 0, 0, 0, 0.0, {})

    chip = planning.Chip(1015, 1.0, 1.0, 1.0)
    assert planning.largest_batch(plan(200), plan(280), (8, 16), chip, 4) == 88  # 89.5, by fours
    assert planning.largest_batch(plan(200), plan(280), (8, 16), chip, 1) == 89
    assert planning.largest_batch(plan(9000), plan(13000), (8, 16), chip, 4) == 0
    assert planning.largest_batch(plan(200), plan(200), (8, 16), chip, 4) is None


@pytest.mark.parametrize(
    "name",
    ["", "v5e", "v4:2x2", "cpu:0", "cpu:2x2", "v5e:0x4", "v5e:4", "gpu:8", "v5p:4x4", "v6e:2x2x2"],
)
def test_unknown_topologies_are_refused(name):
    with pytest.raises(train.Refused, match=rf"v5p:AxBxC.*got {re.escape(name)}$"):
        planning.devices_of(name)


def test_devices_that_are_missing_are_named():
    assert planning.devices_of("cpu:8") == jax.devices()
    with pytest.raises(train.Refused, match="has 8 CPU devices, not 9: set JAX_NUM_CPU_DEVICES=9"):
        planning.devices_of("cpu:9")


def test_a_batch_that_does_not_divide_is_refused():
    make, cfg, _ = STEPS["vae"]
    with pytest.raises(
        train.Refused,
        match="a batch of 12 does not divide by 8 devices; one of 16 .batch_size. does",
    ):
        train.plan(make, cfg, batch_of("vae", 12), jax.devices())


def test_a_batch_has_as_many_parts_as_training_asks_for():
    """8 devices x 4 micro-batches x 3 critic updates: what `fit` would refuse is refused here."""
    cfg = gan.Config(shape=(2,), latent_dim=2, micro=4, n_critic=3)
    batch = {"points": jax.ShapeDtypeStruct((96 + 48, 2), np.float32)}
    words = "144 does not divide by 8 devices x 4 micro-batches x 3 n_critic; one of 192"
    with pytest.raises(train.Refused, match=words):
        train.plan(gan.make, cfg, batch, jax.devices())
    cfg = dataclasses.replace(cfg, n_critic=1)
    batch = {"points": jax.ShapeDtypeStruct((24, 2), np.float32)}
    with pytest.raises(train.Refused, match="24 does not divide by 4 groups of 2 .*; one of 32"):
        train.plan(gan.make, cfg, batch, jax.devices(), tensor=2)


def test_how_many_fit_is_said_only_near_what_was_planned():
    between = "by the memory of 8 and 16"
    assert how_many(0, (8, 16)) == f"about 0 examples would fit, {between}"
    assert how_many(16_000, (8, 16)) == f"about 16,000 examples would fit, {between}"
    assert how_many(16_008, (8, 16)) == f"more than 16,000 examples would fit, {between}"
    assert "unknown" in how_many(None, (8, 16))


@pytest.mark.slow
def test_the_command_prints_a_plan(tmp_path, monkeypatch, capsys):
    points = data.load("ring")
    cfg = gan.Config(shape=(2,), latent_dim=2)
    train.fit(gan.make, cfg, train.Run(str(tmp_path / "run"), 1, 16, devices=1), points)
    argv = ["aigc_jax", "plan", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*argv, "--topology", "cpu:8", "--batch-size", "64"])
    commands.main()
    said = capsys.readouterr().out
    assert "8 of cpu:8 as data=8, compiled by the CPU's compiler, not a TPU's\n" in said
    assert "batch    64 examples over all devices" in said
    assert "traffic  all-reduce: " in said and "fits" not in said  # a virtual CPU has no size
    monkeypatch.setattr("sys.argv", [*argv, "--topology", "cpu:7"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: a batch of 16 does not divide by 7 devices; one of 21 (batch_size) does\n"
    )


@pytest.mark.parametrize(
    ("mesh", "devices", "tensor"),
    [("data=4,model=2", 8, 2), ("model=2,data=4", 8, 2), ("data=8", 8, 1), ("model=8", 8, 8)],
)
def test_a_mesh_is_written_as_axes(mesh, devices, tensor):
    assert tensor_of(mesh, devices) == tensor


@pytest.mark.parametrize("mesh", ["data=4", "data=4,model=4", "data=8,model=0"])
def test_a_mesh_that_is_not_the_topology_is_refused(mesh):
    with pytest.raises(train.Refused, match=f"mesh {mesh} has .* devices, the topology 8"):
        tensor_of(mesh, 8)
    with pytest.raises(train.Refused, match="mesh must be such as data=8,model=2, got '4x2'"):
        tensor_of("4x2", 8)


def test_a_lighter_config_recomputes_and_then_takes_parts():
    cfg = transformer.Config(vocab=8, context=4, layers=1, heads=1, width=4, micro=2)
    (_, again), (words, parts) = lighter(cfg)
    assert again == dataclasses.replace(cfg, remat=True)
    assert parts == dataclasses.replace(cfg, remat=True, micro=8) and "8 micro-batches" in words
    net = ddpm.Config(shape=(8, 8, 1), net=ddpm.NetConfig("mlp", widths=(4,)))
    assert next(lighter(net))[1].net.remat is True
    assert list(lighter(vae.Config()))[-1][1].micro == 4
    style = gan.NetConfig("style", widths=(4, 4))
    pictures = gan.Config(shape=(8, 8, 1), gen=style, disc=style)
    assert [words for words, _ in lighter(pictures)] == ["4 micro-batches (model.micro)"]


@pytest.mark.slow
@pytest.mark.parametrize("fits", ["both", "one", "too large", "none"])
def test_the_command_says_whether_it_fits(tmp_path, monkeypatch, capsys, fits):
    """A chip's compiler is not here: its answers are given."""
    run = train.Run(str(tmp_path / "run"), 1, 16, devices=1)
    train.fit(gan.make, gan.Config(shape=(2,), latent_dim=2), run, data.load("ring"))

    def plan(make, cfg, batch, devices, *, tensor):
        size = len(batch["points"]) // cfg.micro
        if fits == "none" or (fits == "one" and size > 16):
            raise planning.DoesNotFit(f"a batch of {size} does not fit: of 15.75G")
        state = 2**33 + (2**33 - 2**29 if fits == "too large" else 0)
        return planning.Plan(4, state + 2**28 * size, 0, 2**30, 2**30, 0, 8, 8.0, {})

    monkeypatch.setattr(train, "plan", plan)
    monkeypatch.setattr("aigc_jax.commands.plan.devices_of", lambda topology: [])
    monkeypatch.setattr("aigc_jax.commands.plan.version", lambda package: "1.2.3")
    monkeypatch.setattr(
        "sys.argv", ["aigc_jax", "plan", str(tmp_path / "run"), "--topology", "v5e:2x2"]
    )
    if fits in ("both", "one"):
        commands.main()
    else:
        with pytest.raises(SystemExit) as stopped:
            commands.main()
        assert stopped.value.code == 1
    said = capsys.readouterr().out
    if fits == "none":
        assert "chip     does not fit: a batch of 16 does not fit: of 15.75G\n" in said
        assert "4 micro-batches (model.micro): does not fit (a batch of 4 does not" in said
        return
    if fits == "too large":  # 15.5 GiB, and 0.25 per example of a part
        assert "chip     does not fit into 15.8 GiB: 3.75 GiB too much per device\n" in said
        assert "4 micro-batches (model.micro): does not fit, 16.5 GiB per device\n" in said
        return
    assert "chip     fits into 15.8 GiB\n" in said and "bound    at least" in said
    assert "compiled by libtpu 1.2.3, jaxlib 1.2.3\n" in said
    assert ("         32 examples do not fit\n" in said) == (fits == "one")
    sizes = "16 and 32" if fits == "both" else "8 and 16"  # 31 by the line, and 4 devices
    assert f"about 28 examples would fit, by the memory of {sizes}\n" in said
    assert "memory (no measurement)" in said


def test_without_libtpu_the_cpus_plan_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
    assert devices_for("v5e:2x4") == ("cpu:8", jax.devices())
    said = capsys.readouterr().err
    assert "pip install 'jax[tpu]'" in said and said.endswith("What follows is of cpu:8.\n")


def test_a_libtpu_that_does_not_fit_is_one_line(monkeypatch):
    """Another jaxlib: the plugin's own error, and what to install."""
    from jax.experimental import topologies

    def broken(**options):
        raise RuntimeError("Unexpected PJRT_Plugin_Attributes_Args size:\nexpected 32, got 24")

    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies, "get_topology_desc", broken)
    for topology, shape in (("v5e:3x3", "2x2, 2x4 and 4x4"), ("v5p:3x3x3", "2x2x1, 2x2x2 and")):
        with pytest.raises(train.Refused, match=f"no topology {topology}.*{shape}") as error:
            planning.devices_of(topology)
        assert "install the libtpu that fits this JAX" in str(error.value)
        assert "\n" not in str(error.value) and "expected 32, got 24" in str(error.value)


def test_without_libtpu_the_message_says_what_to_do():
    try:
        devices = planning.devices_of("v5e:2x2")
    except train.Refused as e:
        assert "pip install 'jax[tpu]'" in str(e) and "cpu:4" in str(e)
    else:
        assert len(devices) == 4


@pytest.mark.slow
def test_the_benchmark_of_a_device_runs_and_counts_by_formula(tmp_path):
    """A tiny GPT: a forward pass takes 2 L (12 D^2 + 2 T D) + 2 V D per token, an update three times that."""
    out, script = tmp_path / "rows.json", Path(__file__).parents[1] / "benchmarks" / "device.py"
    options = [
        "--tiny",
        "--nets",
        "gpt2",
        "dit",
        "unet",
        "--updates",
        "1",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    said = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=True
    ).stdout
    rows = {row["net"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["gpt2", "dit", "unet"] and all(f"| {name} |" in said for name in rows)
    L, D, T, V, tokens = 2, 32, 32, 64, 4 * 32
    formula = 3 * tokens * (2 * L * (12 * D**2 + 2 * T * D) + 2 * V * D)
    assert 1 <= rows["gpt2"]["operations_per_update"] / formula < 1.01  # and the norms' means
    for row in rows.values():
        rate = row["operations_per_update"] / (row["ms_per_update"] / 1e3)
        np.testing.assert_allclose(row["operations_per_second"], rate)
        assert row["mfu"] is None  # of a CPU no peak is listed
        assert {"python", "jax", "jaxlib"} <= set(row["versions"])
    per_second = 4 * T / (rows["gpt2"]["ms_per_update"] / 1e3)
    np.testing.assert_allclose(rows["gpt2"]["tokens_per_second"], per_second)
