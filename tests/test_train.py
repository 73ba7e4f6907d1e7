"""fit, load and what surrounds them, where nothing goes wrong but much could."""

import dataclasses
import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest

from aigc_jax import core, data, train, transformer, vae
from aigc_jax.core import Optim
from aigc_jax.data import text
from aigc_jax.train import Run, engine, fit, load, progress
from aigc_jax.train import folder as folders

from . import trainee

ROOT = Path(__file__).parent.parent
DIGITS = data.load("digits")
VALID = data.load("digits", "train[:50]")
CFG = trainee.CFG
SGD = dataclasses.replace(CFG, ema=0.0, optim=Optim("sgd", lr=1e-3))
SPEAKER = transformer.Config(vocab=12, context=8, layers=1, heads=2, width=16)
CROPS = text.from_tokens(np.random.default_rng(0).integers(0, 12, 500), length=8)


def run(folder="", steps=20, **options):
    return Run(**{"folder": str(folder), "steps": steps, "batch_size": 16, "devices": 1, **options})


def same_bits(a, b):
    return trainee.fingerprint(a) == trainee.fingerprint(b)


# ----------------------------------------------------------------------------------------------------------- exactness


def test_fit_is_the_contract_in_a_loop():
    """The whole of training by hand, from the keys and the rows that the design names."""
    family = vae.make(CFG)
    k_init, k_step, _, _ = jax.random.split(jax.random.key(3), 4)
    state, step = jax.jit(family.init)(k_init), jax.jit(family.step)
    for i in range(20):
        state, _ = step(state, DIGITS.batch(3, i, 16), core.step_key(k_step, i))
    got = fit(vae.make, CFG, run(seed=3), DIGITS).state
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 8])
def test_a_longer_run_on_an_old_folder_is_an_unbroken_one(tmp_path, k):
    unbroken = fit(vae.make, CFG, run(steps=31, steps_per_call=k), DIGITS).state
    for steps in (10, 23, 31):
        state = fit(vae.make, CFG, run(tmp_path / "r", steps, steps_per_call=k), DIGITS).state
    assert same_bits(state, unbroken)


@pytest.mark.slow
def test_host_batches_train_like_resident_ones():
    hosted = DIGITS._replace(resident=None)
    for k in (1, 4):
        a, b = (
            fit(vae.make, CFG, run(steps_per_call=k), source).state for source in (DIGITS, hosted)
        )
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.slow
def test_seeds_differ_and_repeat():
    a, b, again = (fit(vae.make, CFG, run(seed=s), DIGITS).state for s in (0, 1, 0))
    assert same_bits(a, again) and not same_bits(a, b)


# ---------------------------------------------------------------------------------------------------------------- mesh


@pytest.mark.slow
def test_the_batch_lies_on_eight_devices_an_eighth_each():
    seen = []

    def make(cfg, *, axis_name=None):
        family = vae.make(cfg)

        def step(state, batch, key):
            jax.debug.inspect_array_sharding(batch["image"], callback=lambda s: seen.append(s))
            return family.step(state, batch, key)

        return family._replace(step=step)

    fit(make, CFG, run(steps=2, devices=8), DIGITS)
    [sharding] = set(seen)
    assert len(sharding.device_set) == 8
    assert sharding.shard_shape((16, 8, 8, 1)) == (2, 8, 8, 1)
    feed = engine.Feed(DIGITS, engine.mesh_of(jax.devices()))
    rows = feed.place(feed.from_host(0, 0, 16, 1))
    for d, shard in enumerate(
        rows.addressable_shards
    ):  # device d has the contiguous rows d*b .. (d+1)*b
        np.testing.assert_array_equal(shard.data, data.order(1437, 0, 0, 16)[2 * d : 2 * d + 2])


@pytest.mark.slow
@pytest.mark.parametrize("k, micro", [(1, 1), (5, 2)])
def test_five_sgd_steps_on_eight_devices_agree_with_one(k, micro):
    cfg = dataclasses.replace(SGD, binarisation="dynamic", micro=micro)  # noise in x and in z
    one, eight = (
        fit(vae.make, cfg, run(steps=5, devices=n, steps_per_call=k), DIGITS).state for n in (1, 8)
    )
    assert len(eight.step.sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- pmap


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_pmap_agrees_with_one_device_where_no_noise_is_drawn(k):
    cfg = dataclasses.replace(SPEAKER, micro=2, optim=Optim("sgd", lr=0.1))
    source = CROPS
    one = fit(transformer.make, cfg, run(steps=7), source).state
    eight = fit(
        transformer.make, cfg, run(steps=7, devices=8, pmap=True, steps_per_call=k), source
    ).state
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_under_pmap_every_device_has_its_rows_and_its_own_noise():
    seen = []

    def make(cfg, *, axis_name=None):
        family = vae.make(cfg, axis_name=axis_name)

        def step(state, batch, key):
            own = jax.random.normal(jax.random.fold_in(key, 99), ())
            jax.debug.callback(
                lambda rows, noise: seen.append((tuple(rows.tolist()), float(noise))),
                batch["index"],
                own,
            )
            return family.step(state, batch, key)

        return family._replace(step=step) if axis_name else family

    fit(make, CFG, run(steps=1, devices=8, pmap=True), DIGITS)
    jax.effects_barrier()
    rows = data.order(1437, 0, 0, 16).reshape(8, 2)
    assert {r for r, _ in seen} == set(map(tuple, rows.tolist())) and len(
        {noise for _, noise in seen}
    ) == 8


def test_pmap_without_jit_is_refused():
    with (
        jax.disable_jit(),
        pytest.raises(train.Refused, match="run.pmap does not work under jax.disable_jit"),
    ):
        fit(vae.make, CFG, run(steps=1, devices=8, pmap=True), DIGITS)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4])
def test_pmap_saves_validates_resumes_and_replays_one_state(tmp_path, k):
    cfg = dataclasses.replace(CFG, micro=2)
    options = {
        "devices": 8,
        "pmap": True,
        "steps_per_call": k,
        "save_every": 5,
        "eval_every": 5,
        "log_every": 1,
    }

    def go(name, steps):
        return fit(vae.make, cfg, run(tmp_path / name, steps, **options), DIGITS, valid=VALID).state

    unbroken = go("unbroken", 18)
    go("cut", 7)
    assert same_bits(go("cut", 18), unbroken)
    loaded = load(tmp_path / "cut").state
    assert same_bits(loaded, unbroken) and loaded.step.shape == ()
    metrics, _ = train.replay(tmp_path / "cut", DIGITS, step=12)
    assert metrics == next(
        line["train"] for line in train.metrics(tmp_path / "cut") if line["step"] == 12
    )
    scores = [
        line["valid"]["nll_nats"] for line in train.metrics(tmp_path / "cut") if "valid" in line
    ]
    np.testing.assert_allclose(
        scores[-1], train.evaluate(load(tmp_path / "cut"), VALID)["nll_nats"], rtol=0.05
    )
    with pytest.raises(train.Refused, match="run.pmap was True there and is False here"):
        fit(vae.make, cfg, run(tmp_path / "cut", 20, devices=8), DIGITS)
    with pytest.raises(train.Refused, match="run.devices was 8 there and is 4 here"):
        fit(vae.make, cfg, run(tmp_path / "cut", 20, devices=4, pmap=True), DIGITS)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 8), (8, 2)])
def test_resuming_on_another_number_of_devices(tmp_path, first, then):
    fit(vae.make, SGD, run(tmp_path / "r", 10, devices=first), DIGITS)
    state = fit(vae.make, SGD, run(tmp_path / "r", 20, devices=then), DIGITS).state
    assert len(state.step.sharding.device_set) == then
    unbroken = fit(vae.make, SGD, run(steps=20), DIGITS).state
    for a, b in zip(jax.tree.leaves(unbroken), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_large_parameters_are_cut_saved_and_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CUT_FROM", 64)
    fit(vae.make, SGD, run(tmp_path / "r", 10, devices=8), DIGITS)
    state = fit(vae.make, SGD, run(tmp_path / "r", 20, devices=8), DIGITS).state
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params)) >= 4
    whole = fit(vae.make, SGD, run(steps=20), DIGITS).state
    for a, b in zip(
        jax.tree.leaves(whole), jax.tree.leaves(load(tmp_path / "r").state), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


TWO = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.test_train import SGD, run
from tests import trainee
from aigc_jax import data, train, vae
settings = run(sys.argv[3], int(sys.argv[4]), devices=0, save_every=3, log_every=1)
result = train.fit(vae.make, SGD, settings, data.load("digits"))
if jax.process_index() == 0:
    print([round(float(x.sum()), 5) for x in jax.tree.leaves(result.state.params)])
"""


@pytest.fixture
def two_processes(tmp_path):
    """two_processes(steps) starts two that train one model in tmp_path / "r"; they end with the test."""
    both = []

    def start(steps):
        env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        command = [sys.executable, "-c", TWO, f"localhost:{free_port()}"]
        both.extend(
            subprocess.Popen(
                [*command, str(i), str(tmp_path / "r"), str(steps)],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        )
        return both

    yield start
    trainee.end(both)


@pytest.mark.slow
def test_two_processes_stop_and_save_together(tmp_path, two_processes):
    both = two_processes(100_000)
    trainee.wait_for((tmp_path / "r" / "checkpoints" / "3").exists, *both)
    for p in both:
        p.send_signal(signal.SIGTERM)
    outs = [p.communicate(timeout=600) for p in both]
    assert [p.returncode for p in both] == [1, 1], outs
    step = int(load(tmp_path / "r").state.step)
    assert all(f"stopped by preemption at step {step}: saved" in err for _, err in outs)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, two_processes):
    """Each process places its own rows; both see the same global batch, and agree with one process."""
    both = two_processes(6)
    outs = [p.communicate(timeout=600) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    alone = fit(vae.make, SGD, run(steps=6), DIGITS).state.params
    np.testing.assert_allclose(
        json.loads(outs[0][0].splitlines()[-1]),
        [float(x.sum()) for x in jax.tree.leaves(alone)],
        atol=2e-5,
    )
    assert int(load(tmp_path / "r").state.step) == 6


# ---------------------------------------------------------------------------------------------- validation, best, logs


@pytest.mark.slow
def test_validation_counts_every_example_once():
    """50 examples in batches of 16: the last is padded, and no example counts twice."""
    result = fit(vae.make, CFG, run(), DIGITS)
    got = train.evaluate(result, VALID, batch_size=16)
    k_eval = jax.random.split(jax.random.key(0), 4)[2]
    values = []
    for i in range(4):
        each = result.family.evaluate(
            result.state, VALID.batch(0, i, 16), jax.random.fold_in(k_eval, i)
        )["nll_nats"]
        values += each[: 50 - 16 * i].tolist()
    assert len(values) == 50
    np.testing.assert_allclose(got["nll_nats"], np.mean(values), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["token", "frame"])
def test_likelihood_per_token_is_sum_over_sum(per):
    """Examples of unequal length, a ragged last batch: neither a mean of ratios nor of batches."""
    length, nll = np.arange(1, 11), np.random.default_rng(0).random(10) * 50
    source = data.from_arrays({"points": np.stack([length, nll], -1).astype(np.float64)})

    def evaluate(state, batch, key):
        return {f"{per}s": batch["points"][:, 0], "nll_nats": batch["points"][:, 1]}

    family = vae.make(CFG)._replace(evaluate=evaluate)
    result = train.Result(family, family.init(jax.random.key(0)), None, source.info, None)
    got = train.evaluate(result, source, batch_size=4)
    np.testing.assert_allclose(got[f"nll_nats_per_{per}"], nll.sum() / length.sum(), rtol=1e-6)
    np.testing.assert_allclose(got["nll_nats"], nll.mean(), rtol=1e-6)


@pytest.mark.slow
def test_last_k_and_best_are_kept(tmp_path):
    """on_eval reports a value whose lowest point is known."""
    folder = tmp_path / "r"

    def dip(family, state, step):
        return {"dip": abs(step - 12)}

    fit(
        vae.make,
        CFG,
        run(folder, 40, eval_every=4, save_every=5, keep=2, best="dip"),
        DIGITS,
        valid=VALID,
        on_eval=dip,
    )
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert kept == [12, 35, 40]
    assert int(load(folder).state.step) == 12
    assert int(load(folder, at_most=39).state.step) == 35
    unbroken = fit(vae.make, CFG, run(steps=12), DIGITS).state
    assert same_bits(load(folder).state, unbroken)


@pytest.mark.slow
def test_best_survives_a_resume(tmp_path):
    def dip(family, state, step):
        return {"dip": abs(step - 8)}

    for steps in (10, 40):
        options = {"eval_every": 4, "save_every": 5, "keep": 1, "best": "dip"}
        fit(vae.make, CFG, run(tmp_path / "r", steps, **options), DIGITS, valid=VALID, on_eval=dip)
    assert sorted(int(p.name) for p in (tmp_path / "r" / "checkpoints").iterdir()) == [8, 40]


def empty(path):
    path.write_text("")


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[-3:]))


@pytest.mark.slow
@pytest.mark.parametrize("lose", [empty, cut, Path.unlink])
def test_best_does_not_hang_on_the_log(tmp_path, lose):
    """What a validation reported stays with its checkpoint: load chooses as before, and fit keeps what was best."""

    def dip(family, state, step):
        return {"dip": abs(step - 8)}

    folder = tmp_path / "r"
    options = {"eval_every": 4, "save_every": 5, "keep": 1, "best": "dip"}
    fit(vae.make, CFG, run(folder, 20, **options), DIGITS, on_eval=dip)
    lose(folder / "metrics.jsonl")
    assert int(load(folder).state.step) == 8
    fit(vae.make, CFG, run(folder, 28, **options), DIGITS, on_eval=dip)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["28", "8"]
    assert int(load(folder).state.step) == 8


@pytest.mark.slow
def test_best_of_an_older_version_comes_from_the_log(tmp_path):
    """A folder whose checkpoints hold no validation; then the second best, where the best is damaged."""

    def dip(family, state, step):
        return {"dip": abs(step - 8)}

    folder = tmp_path / "r"
    fit(
        vae.make,
        CFG,
        run(folder, 16, eval_every=4, save_every=4, keep=3, best="dip"),
        DIGITS,
        on_eval=dip,
    )
    for step in ("8", "12", "16"):
        sums = folder / "checkpoints" / step / "SHA256SUMS"
        (sums.parent / "valid.json").unlink()
        sums.write_text(
            "".join(line for line in sums.read_text().splitlines(True) if "valid.json" not in line)
        )
    assert int(load(folder).state.step) == 8
    (folder / "checkpoints" / "8" / "SHA256SUMS").unlink()
    assert int(load(folder).state.step) == 12


@pytest.mark.slow
def test_logs_are_those_of_an_unbroken_run(tmp_path):
    """Saved at 10, stopped at 14, started again: nothing is said twice, and the numbers are the same."""

    def stop(family, state, step):
        if step == 14:
            raise RuntimeError("pulled the plug")
        return {}

    options = {"save_every": 10, "eval_every": 7, "log_every": 3}
    with pytest.raises(RuntimeError):
        fit(vae.make, CFG, run(tmp_path / "r", **options), DIGITS, valid=VALID, on_eval=stop)
    assert max(line["step"] for line in train.metrics(tmp_path / "r")) == 12
    fit(vae.make, CFG, run(tmp_path / "r", **options), DIGITS, valid=VALID)
    fit(vae.make, CFG, run(tmp_path / "u", **options), DIGITS, valid=VALID)
    assert train.metrics(tmp_path / "r") == train.metrics(tmp_path / "u")
    steps = [line["step"] for line in train.metrics(tmp_path / "r") if "train" in line]
    assert steps == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.slow
def test_tensorboard_events_hold_the_metrics(tmp_path):
    import struct

    from tensorboardX.proto.event_pb2 import Event

    fit(vae.make, CFG, run(tmp_path / "r", 10, log_every=5), DIGITS, valid=VALID)
    fit(vae.make, CFG, run(tmp_path / "r", 15, log_every=5), DIGITS, valid=VALID)
    found, purged = {}, []
    for path in (tmp_path / "r" / "events").iterdir():
        raw = path.read_bytes()
        while raw:
            (n,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + n])
            raw = raw[16 + n :]
            for value in event.summary.value:
                found[event.step, value.tag] = value.simple_value
            if event.HasField("session_log"):
                purged.append(event.step)
    assert purged == [11]
    for line in train.metrics(tmp_path / "r"):
        for kind in ("train", "valid"):
            for name, value in line.get(kind, {}).items():
                np.testing.assert_allclose(found[line["step"], f"{kind}/{name}"], value, rtol=1e-6)


def test_a_finished_run_is_left_alone(tmp_path, capfd):
    first = fit(vae.make, CFG, run(tmp_path / "r"), DIGITS)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "checkpoints").rglob("*")}
    again = fit(vae.make, CFG, run(tmp_path / "r"), DIGITS)
    assert same_bits(first.state, again.state) and "complete at step 20" in capfd.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "checkpoints").rglob("*")}


# ----------------------------------------------------------------------------------------------------- load and sample


def test_load_needs_nothing_but_the_folder(tmp_path):
    result = fit(vae.make, CFG, run(tmp_path / "r"), DIGITS)
    loaded = load(tmp_path / "r")
    assert same_bits(result.state, loaded.state)
    assert loaded.config == CFG and loaded.info == result.info and loaded.folder == tmp_path / "r"
    samples = train.sample(loaded, jax.random.key(1), n=10, chunk=4)
    assert samples.shape == (10, 8, 8, 1)
    draw = jax.jit(lambda key: loaded.family.sample(loaded.state, key, n=4))
    expected = np.concatenate([draw(jax.random.fold_in(jax.random.key(1), i)) for i in range(3)])[
        :10
    ]
    np.testing.assert_allclose(samples, expected, atol=1e-6)


def edited(folder, **changes):
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"make": ["os", "system"]}, "make or make_"),
        ({"make": ["aigc_jax.vae", "make_tea"]}, "make_tea"),
        ({"make": ["aigc_jax.nowhere", "make"]}, "cannot be imported"),
        ({"make": ["experiments.nowhere", "make"]}, "no module named experiments.nowhere"),
        ({"config": {"latent_dimm": 3}}, "latent_dimm"),
        ({"config": {"levels": 1}}, "levels"),
        ({"config": [1]}, "config must be dict"),
    ],
)
def test_load_refuses_what_it_does_not_know(tmp_path, changes, words):
    folder = tmp_path / "r"
    fit(vae.make, CFG, run(folder, 2), DIGITS)
    edited(folder, **changes)
    with pytest.raises(train.Refused, match=words) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_what_was_edited_by_hand_is_refused_by_name(tmp_path):
    """Every field that the numbers depend on; not those that say how long, how often and from where."""
    folder = tmp_path / "r"
    fit(vae.make, CFG, run(folder, 2), DIGITS)
    record = json.loads((folder / "run.json").read_text())
    for part, name, value in (
        ("config", "ema", 0.8),
        ("config", "levels", 16),
        ("data", "levels", 9),
        ("data", "fingerprint", "0" * 64),
        ("run", "seed", 3),
        ("run", "batch_size", 8),
    ):
        edited(folder, **{**record, part: {**record[part], name: value}})
        with pytest.raises(
            train.Refused, match=rf"^{part} in .*run.json does not fit the sha256.*: undo the edit"
        ):
            load(folder)
        if name != "fingerprint":
            with pytest.raises(train.Refused, match=f"^{part} in"):
                train.replay(folder, DIGITS, step=1)
        with pytest.raises(train.Refused, match=f"^{part} in"):
            fit(vae.make, CFG, run(folder, 4), DIGITS)
    edited(folder, **{**record, "make": ["tests.trainee", "make_nan"]})
    with pytest.raises(train.Refused, match="^make in"):
        load(folder)
    free = {
        "run": {
            **record["run"],
            "steps": 9,
            "keep": 7,
            "folder": "moved",
            "log_every": 3,
            "devices": 2,
        }
    }
    edited(
        folder,
        make=record["make"],
        data={**record["data"], "source": {"name": "images:moved"}},
        **free,
    )
    assert int(load(folder).state.step) == 2
    (folder / "run.json").write_text(
        json.dumps(dict(reversed(record.items())))
    )  # another layout, the same record
    assert int(load(folder).state.step) == 2
    edited(folder, sha256=None)  # a version that wrote no sums
    assert int(load(folder).state.step) == 2
    edited(folder, config={**record["config"], "ema": 0.8}, sha256=None)
    with pytest.raises(train.Refused, match="the checkpoint of step 2 in .* is of another run"):
        load(folder)


@pytest.mark.slow
def test_an_edited_tokenizer_is_refused(tmp_path):
    info = dataclasses.replace(CROPS.info, tokenizer="x" * 20)
    folder = tmp_path / "r"
    fit(transformer.make, SPEAKER, run(folder, 2), CROPS._replace(info=info))
    assert load(folder).info.tokenizer == "x" * 20
    for content in ("x" * 19 + "y", ""):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(train.Refused, match="tokenizer.json does not fit the sha256"):
            load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(train.Refused, match="tokenizer.json is missing"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"make": 3}',
        '{"make": [1, 2]}',
        "[" * 100_000,
        "\xff",
        '{"make": ["a", "b"], "run": 3}',
    ],
)
def test_a_broken_record_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    for open_it in (load, lambda folder: fit(vae.make, CFG, run(folder, 4), DIGITS)):
        with pytest.raises(train.Refused, match="run.json is damaged") as refused:
            open_it(tmp_path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(train.Refused, match="no run folder"):
        load(tmp_path)
    (tmp_path / "run.json").write_text('{"make": ')
    with pytest.raises(train.Refused, match="damaged"):
        load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(vae.make, CFG, run(tmp_path / "r", 2), DIGITS)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    edited(tmp_path / "r", config={**record["config"], "hidden": [7]})
    with pytest.raises(train.Refused, match="does not fit"):
        load(tmp_path / "r")


# ---------------------------------------------------------------------------------------------------------- warm start


@pytest.mark.slow
def test_warm_start_takes_parameters_and_nothing_else(tmp_path):
    fit(vae.make, CFG, run(tmp_path / "a", 15), DIGITS)
    source = load(tmp_path / "a").state
    fit(vae.make, CFG, run(tmp_path / "b", 1, init=str(tmp_path / "a"), seed=9), DIGITS)
    start = load(
        tmp_path / "b", at_most=0
    ).state  # saved before the first update: a replay needs it
    assert int(start.step) == 0
    assert same_bits(start.params, source.params) and same_bits(start.ema, source.ema)
    assert all(not np.any(x) for x in jax.tree.leaves(start.opt_state))
    values, _ = train.replay(tmp_path / "b", DIGITS, step=1)
    assert np.isfinite(values["loss"])


@pytest.mark.slow
def test_warm_start_never_falls_back_to_the_seed(tmp_path):
    """All checkpoints damaged: the run starts again from the other run's parameters, not from random ones."""
    fit(vae.make, CFG, run(tmp_path / "a", 6), DIGITS)
    warm = run(tmp_path / "b", 9, init=str(tmp_path / "a"), save_every=3, keep=1)
    state = fit(vae.make, CFG, warm, DIGITS).state
    assert sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir()) == [
        "0",
        "9",
    ]  # 0 is never pruned
    for step in ("0", "9"):
        (tmp_path / "b" / "checkpoints" / step / "SHA256SUMS").unlink()
    assert same_bits(fit(vae.make, CFG, warm, DIGITS).state, state)


@pytest.mark.slow
def test_warm_start_refuses_another_shape(tmp_path):
    fit(vae.make, CFG, run(tmp_path / "a", 2), DIGITS)
    other = dataclasses.replace(CFG, hidden=(7,))
    with pytest.raises(train.Refused, match=r"does not fit.*bias is \(32,\) there, \(7,\) here"):
        fit(vae.make, other, run(tmp_path / "b", 2, init=str(tmp_path / "a")), DIGITS)
    fit(vae.make, dataclasses.replace(CFG, ema=0.0), run(tmp_path / "c", 2), DIGITS)
    with pytest.raises(train.Refused, match="no average"):
        fit(vae.make, CFG, run(tmp_path / "d", 2, init=str(tmp_path / "c")), DIGITS)


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg, options, source, words",
    [
        (
            dataclasses.replace(CFG, optim=Optim(lr=2e-3)),
            {},
            DIGITS,
            r"model.optim.lr was 0.001 there and is 0.002 here",
        ),
        (CFG, {"seed": 4}, DIGITS, "run.seed was 0 there and is 4 here"),
        (CFG, {"batch_size": 8}, DIGITS, "run.batch_size was 16 there and is 8 here"),
        (CFG, {}, VALID, r"data.fingerprint was .*'split': 'train'} .* and is .*train\[:50\]"),
    ],
)
def test_another_identity_is_refused_both_values_named(tmp_path, cfg, options, source, words):
    folder = tmp_path / "r"
    fit(vae.make, CFG, run(folder, 4), DIGITS)
    before = trainee.fingerprint(load(folder).state)
    record = (folder / "run.json").read_text()
    with pytest.raises(train.Refused, match=words):
        fit(vae.make, cfg, run(folder, 8, **options), source)
    assert (
        trainee.fingerprint(load(folder).state) == before
        and (folder / "run.json").read_text() == record
    )


@pytest.mark.slow
def test_saving_and_logging_are_no_identity(tmp_path):
    fit(vae.make, CFG, run(tmp_path / "r", 4), DIGITS)
    options = {"save_every": 3, "log_every": 2, "keep": 5, "steps_per_call": 2, "eval_every": 4}
    assert (
        int(fit(vae.make, CFG, run(tmp_path / "r", 8, **options), DIGITS, valid=VALID).state.step)
        == 8
    )


@pytest.mark.parametrize(
    "cfg, options, words",
    [
        (CFG, {"batch_size": 12, "devices": 8}, "batch_size 12 does not divide by 8 devices"),
        (dataclasses.replace(CFG, micro=3), {}, "16 does not divide by 1 devices x 3 micro"),
        (CFG, {"devices": 9}, "devices is 9, this machine has 8"),
        (CFG, {"best": "nll_nats"}, "no validation set"),
        (dataclasses.replace(CFG, levels=16), {}, "levels is 16"),
        (CFG, {"init": "nowhere"}, "nowhere is no run folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, cfg, options, words):
    with pytest.raises(train.Refused, match=words):
        fit(vae.make, cfg, run(tmp_path / "r", **options), DIGITS)
    assert not (tmp_path / "r").exists()


def test_best_that_nobody_reports_is_refused(tmp_path):
    with pytest.raises(
        train.Refused, match="'fid'; reported are kl_nats, nll_nats, reconstruction_nats"
    ):
        fit(vae.make, CFG, run(tmp_path / "r", best="fid"), DIGITS, valid=VALID)
    assert not (tmp_path / "r").exists()
    with pytest.raises(
        train.Refused, match="'fid'; reported are dip"
    ):  # known at the first validation only
        fit(vae.make, CFG, run(tmp_path / "s", best="fid"), DIGITS, on_eval=lambda *_: {"dip": 1.0})
    assert int(load(tmp_path / "s", at_most=20).state.step) == 20  # what was trained is kept


@pytest.mark.slow
def test_best_may_come_from_on_eval_alone_and_be_asked_for_late(tmp_path):
    def dip(family, state, step):
        return {"dip": abs(step - 8)}

    fit(vae.make, CFG, run(tmp_path / "r", 16, eval_every=4), DIGITS, on_eval=dip)  # keeps 16 alone
    fit(
        vae.make,
        CFG,
        run(tmp_path / "r", 24, eval_every=4, best="dip", keep=1),
        DIGITS,
        on_eval=dip,
    )
    assert int(load(tmp_path / "r").state.step) == 16  # the lowest of those that exist


def test_a_damaged_best_checkpoint_is_said(tmp_path, capfd):
    def dip(family, state, step):
        return {"dip": abs(step - 8)}

    fit(vae.make, CFG, run(tmp_path / "r", 16, eval_every=4, best="dip"), DIGITS, on_eval=dip)
    (tmp_path / "r" / "checkpoints" / "8" / "SHA256SUMS").unlink()
    assert int(load(tmp_path / "r").state.step) == 16
    assert "the best checkpoint" in capfd.readouterr().err


def test_best_is_not_compared_over_two_validation_sets(tmp_path):
    fit(vae.make, CFG, run(tmp_path / "r", 4, best="nll_nats"), DIGITS, valid=VALID)
    with pytest.raises(train.Refused, match="valid.fingerprint"):
        fit(
            vae.make,
            CFG,
            run(tmp_path / "r", 8, best="nll_nats"),
            DIGITS,
            valid=data.load("digits", "test"),
        )


def test_validation_must_be_finite():
    with pytest.raises(train.Refused, match="examples=N"):
        fit(transformer.make, SPEAKER, run(), CROPS, valid=CROPS)


def build(cfg: vae.Config):
    return vae.make(cfg)


def make_untyped(cfg):
    return vae.make(cfg)


def test_a_make_that_cannot_be_imported_is_refused(tmp_path):
    for make, words in (
        (lambda cfg: vae.make(cfg), "put it in a module"),
        (functools.partial(vae.make), "put it in a module"),
        (build, "make or make_"),
        (make_untyped, "not annotated"),
    ):
        with pytest.raises(train.Refused, match=words):
            fit(make, CFG, run(tmp_path / "r"), DIGITS)
        assert not (tmp_path / "r").exists()


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(train.Refused, match="other files"):
        fit(vae.make, CFG, run(tmp_path), DIGITS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_checkpoints_without_their_record_belong_to_nobody(tmp_path):
    folder = tmp_path / "r"
    fit(vae.make, CFG, run(folder, 2), DIGITS)
    for path in folder.iterdir():
        if path.name == "events":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        elif path.name != "checkpoints":
            path.unlink()
    for settings in (run(folder, 4), run(folder, 4, seed=1)):
        with pytest.raises(
            train.Refused, match="checkpoints and no run.json.*put it back, or choose a new folder"
        ):
            fit(vae.make, CFG, settings, DIGITS)
    assert [p.name for p in folder.iterdir()] == ["checkpoints"]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["2"]


def test_the_lock_is_taken_before_the_record_is_read(tmp_path, monkeypatch):
    """A run of another seed begins, and ends, between this one's first look at the folder and its lock."""
    lock = folders.lock

    def late(folder):
        monkeypatch.setattr(folders, "lock", lock)
        fit(vae.make, CFG, run(folder, 2, seed=1), DIGITS)
        return lock(folder)

    monkeypatch.setattr(folders, "lock", late)
    with pytest.raises(train.Refused, match="run.seed was 1 there and is 0 here"):
        fit(vae.make, CFG, run(tmp_path / "r", 4), DIGITS)


def test_a_lock_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    """As on a network file system without locks."""

    def fail(self, *args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(train.Refused, match="cannot be written or locked: .*No locks available"):
        fit(vae.make, CFG, run(tmp_path / "r", 2), DIGITS)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "r").write_text("x")
    with pytest.raises(train.Refused, match="is a file"):
        fit(vae.make, CFG, run(tmp_path / "r"), DIGITS)


def test_what_on_eval_reports_may_be_any_number(tmp_path):
    fit(
        vae.make,
        CFG,
        run(tmp_path / "r", 4),
        DIGITS,
        on_eval=lambda *_: {"a": np.float32(0.5), "b": np.nan},
    )
    assert train.metrics(tmp_path / "r")[-1] == {"step": 4, "valid": {"a": 0.5, "b": None}}


def test_fewer_steps_than_done_is_refused(tmp_path):
    fit(vae.make, CFG, run(tmp_path / "r", 8), DIGITS)
    with pytest.raises(train.Refused, match="at step 8 already, run.steps is 4"):
        fit(vae.make, CFG, run(tmp_path / "r", 4), DIGITS)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    held = []

    def intrude(family, state, step):
        with pytest.raises(train.Refused, match="another process"):
            fit(vae.make, CFG, run(tmp_path / "r", 8), DIGITS)
        held.append(step)
        return {}

    fit(vae.make, CFG, run(tmp_path / "r", 8), DIGITS, on_eval=intrude)
    assert held == [8]


@pytest.mark.slow
def test_another_environment_is_warned_of(tmp_path, capfd):
    fit(vae.make, CFG, run(tmp_path / "r", 4), DIGITS)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    edited(tmp_path / "r", environment={**record["environment"], "cores": 96})
    train.replay(tmp_path / "r", DIGITS, step=2)
    assert "warning: cores was 96" in capfd.readouterr().err
    fit(vae.make, CFG, run(tmp_path / "r", 8), DIGITS)
    assert "warning: cores was 96" in capfd.readouterr().err


@pytest.mark.parametrize(
    "field",
    ["steps", "batch_size", "seed", "eval_every", "save_every", "log_every", "keep", "devices"],
)
def test_negative_sizes_are_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"run\.{field} must be at least \d, got -3"):
        Run(**{field: -3})


@pytest.mark.slow
def test_labels_are_cut_with_the_chunks():
    cfg = dataclasses.replace(CFG, classes=10)
    result = fit(vae.make, cfg, run(steps=2), DIGITS)
    label = np.arange(20) % 3
    drawn = train.sample(result, jax.random.key(0), n=20, chunk=8, label=label)
    for i in range(3):
        rows = np.minimum(np.arange(8 * i, 8 * i + 8), 19)
        key = jax.random.fold_in(jax.random.key(0), i)
        expected = result.family.sample(
            result.state, key, n=8, label=jax.numpy.asarray(label[rows])
        )
        np.testing.assert_allclose(drawn[8 * i : 8 * i + 8], expected[: 20 - 8 * i], atol=1e-6)
    with pytest.raises(
        train.Refused, match="label must have one entry for each of 20 samples, got 8"
    ):
        train.sample(result, jax.random.key(0), n=20, chunk=8, label=label[:8])


@pytest.mark.parametrize(
    "seconds, steps, said",
    [
        (30.0, [1], "step 1/9  loss 2"),  # compiled for 30 s: no rate is known
        (30.0, [1, 2], "step 2/9  30.0 s/step  210 s left  loss 2"),
        (12.5, [1, 3], "step 3/9  6.2 s/step  38 s left  loss 2"),
        (11.0, [1, 34], "step 34/99  3.0 steps/s  22 s left  loss 2"),
        (11.0, [1, 5501], "step 5501/9999  500 steps/s  9 s left  loss 2"),
    ],
)
def test_progress_says_no_rate_that_it_does_not_know(capfd, monkeypatch, seconds, steps, said):
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shown = progress.Progress(int(said.split()[1].split("/")[1]), 0)
    shown.show(1, {"loss": 2.0, "lr": 1.0})
    for step in steps:
        now[0] += seconds
        shown.step(step)
    assert capfd.readouterr().err.splitlines()[-1] == said
