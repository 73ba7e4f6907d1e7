"""Several processes that train one model: flags, rows read, another number of processes and mesh, deaths."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from aigc_jax import core, data, ddpm, train
from aigc_jax.train import engine, processes
from tests import trainee

ROOT = Path(__file__).resolve().parents[1]
N, B = 64, 16
NET = ddpm.NetConfig("dit", widths=(32,), heads=4, dropout=0.0)
CFG = ddpm.Config(shape=(4, 4, 1), levels=17, net=NET, optim=core.Optim("sgd", lr=0.1))
CHILD = """
import json, sys
folder, port, processes, process, options, broken = sys.argv[1:]
from aigc_jax import data, ddpm, train
from aigc_jax.train import engine
engine.CUT_FROM = 512
run = train.Run(folder, batch_size=16, save_every=2, log_every=1, coordinator=f"localhost:{port}",
                processes=int(processes), process=int(process), **json.loads(options))
train.connect(run)
from tests.test_processes import CFG, Pictures, by_number, streamed
pictures = Pictures(json.loads(broken))
result = train.fit(ddpm.make, CFG, run, streamed(pictures))
with open(f"{folder}-{process}.json", "w") as file:  # a pipe that nobody reads yet would fill
    json.dump([sorted(set(pictures.read)), by_number(result.state.params)], file)
"""


class Pictures:
    """64 pictures that are read one by one; it remembers which. Number `broken` cannot be read."""

    def __init__(self, broken=None):
        rng = np.random.default_rng(0)
        self.images, self.read = rng.integers(0, 17, (N, 4, 4, 1)).astype(np.uint8), []
        self.broken = broken

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.read.append(i)
        if i == self.broken:
            raise OSError(f"picture {i} is broken")
        return {"image": self.images[i]}


def streamed(pictures):
    return data.from_source(pictures, levels=17, fingerprint="of the test")  # reads example 0 only


def by_number(params):
    return [np.asarray(x, np.float64).ravel().tolist() for x in jax.tree.leaves(params)]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def started(tmp_path):
    """started(n, **options) starts n processes that train one model in tmp_path / "run"."""
    running = []

    def start(n, devices=2, broken=None, **options):
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), free_port(), str(n)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.extend(
            subprocess.Popen(
                [*command, str(i), json.dumps(options), json.dumps(broken)],
                cwd=ROOT,
                env=env,
                **pipes,
            )
            for i in range(n)
        )
        return running

    yield start
    trainee.end(running)


# ---------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"processes": 2}, "several processes need run.coordinator, host:port .* got ''"),
        ({"processes": 2, "coordinator": "here"}, "host:port of process 0 or auto, got 'here'"),
        (
            {"processes": 2, "process": 2},
            r"run.process must be in 0..1 \(run.processes is 2\), got 2",
        ),
        ({"process": 1}, r"run.process must be in 0..0 \(run.processes is 1\), got 1"),
        ({"processes": 0}, "run.processes must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        train.Run(**flags)


def test_a_run_that_did_not_connect_is_refused():
    run = train.Run(steps=1, batch_size=16, coordinator="localhost:1", processes=2)
    with pytest.raises(train.Refused, match="run.processes is 2, JAX knows 1: call train.connect"):
        train.fit(ddpm.make, CFG, run, streamed(Pictures()))


def test_one_process_connects_to_nobody():
    train.connect(train.Run())
    assert not jax.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------ rows


def test_a_part_of_a_batch_reads_its_own_rows_only():
    pictures = Pictures()
    source = data.from_source(pictures, levels=17)
    whole = source.batch(3, 5, B)
    pictures.read.clear()
    rows = np.array([4, 5, 9, 15])
    part = source.part(3, 5, B, rows)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[rows], b), whole, part)
    assert pictures.read == whole["index"][rows].tolist()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_feed_places_the_rows_that_it_read(monkeypatch, axis):
    """Here all rows are this process's own; real processes with a part of them are below."""
    feed = engine.Feed(streamed(Pictures()), engine.mesh_of(jax.devices()[:1]))
    monkeypatch.setattr(engine.Feed, "reads_part", True)
    assert feed.rows_here(B).tolist() == list(range(B))
    x = np.arange(2 * B).reshape((B, 2) if axis == 0 else (2, B))
    np.testing.assert_array_equal(feed.place_batch(x, B, axis), x)
    # A process may hold rows that do not lie side by side.
    rows = np.array([0, 1, 2, 3, 12, 13, 14, 15])
    monkeypatch.setattr(engine.Feed, "rows_here", lambda self, size: rows)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, place, piece: (shape, piece))
    shape, piece = feed.place_batch(np.take(x, rows, axis), B, axis)
    whole = (slice(None),) * axis
    assert shape == x.shape
    np.testing.assert_array_equal(piece((*whole, slice(12, 16))), np.take(x, range(12, 16), axis))
    np.testing.assert_array_equal(piece((*whole, slice(0, 2))), np.take(x, range(2), axis))


# ----------------------------------------------------------------------------------- real processes


def agree_with_one(folder, n, steps):
    """Compares the parameters of n processes with a single one's; returns what each has read."""
    found = [json.loads((folder / f"run-{i}.json").read_text()) for i in range(n)]
    alone = train.fit(
        ddpm.make,
        CFG,
        train.Run(steps=steps, batch_size=B, devices=1),
        streamed(Pictures()),
    )
    for _, params in found:
        for ours, theirs in zip(by_number(alone.state.params), params, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    return [set(rows) for rows, _ in found]


@pytest.mark.slow
def test_two_processes_read_their_own_rows_and_go_on_as_one_over_another_mesh(tmp_path, started):
    two = started(2, steps=4, tensor=2)
    outs = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], outs
    read = agree_with_one(tmp_path, 2, 4)
    # Four batches are an epoch. Each process has read its half of each. For shapes both have read
    # example 0 and the first one of the order.
    first = streamed(Pictures()).batch(0, 0, 1)["index"][0]
    assert read[0] | read[1] == set(range(N)) and read[0] & read[1] == {0, first}
    assert int(train.load(tmp_path / "run").state.step) == 4
    run = train.Run(str(tmp_path / "run"), 6, B, save_every=2, log_every=1, devices=4)
    on = train.fit(ddpm.make, CFG, run, streamed(Pictures()))
    whole = train.fit(ddpm.make, CFG, replace(run, folder="", devices=1), streamed(Pictures()))
    for ours, theirs in zip(*map(by_number, (on.state.params, whole.state.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(tmp_path, started, victim):
    two = started(2, steps=1_000_000)
    trainee.wait_for((tmp_path / "run" / "checkpoints" / "2").exists, *two)
    two[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _, said = two[1 - victim].communicate(timeout=30)
    assert two[1 - victim].returncode == 1 and time.monotonic() - begin < 30
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    end = "the same commands continue from the newest checkpoint"
    assert lines == [
        f"error: another process of the run has ended, so process {1 - victim} ends; {end}"
    ]
    assert "Traceback" not in said and "Check failure" not in said
    assert int(train.load(tmp_path / "run").state.step) >= 2


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other(started):
    """A picture that only one of them reads is broken: one says so, the other does not wait for ever."""
    two = started(2, steps=1_000_000, broken=N - 1)
    said = [p.communicate(timeout=120)[1] for p in two]
    assert all(p.returncode for p in two)
    assert sum(f"picture {N - 1} is broken" in text for text in said) == 1
    assert sum("another process of the run has ended" in text for text in said) == 1


def test_an_error_after_a_fit_is_told_to_the_others(monkeypatch):
    """Such as one in what a script computes between two runs."""
    monkeypatch.setattr(processes._Self, "finished", False)
    with processes.together():
        pass
    ours, theirs = socket.socketpair()
    with ours, theirs:
        processes._part([ours])
        processes.failed()
        processes._part([ours])
        assert theirs.recv(2) == processes.GOODBYE + processes.FAILED


@pytest.mark.soak
def test_four_processes_agree_with_one(tmp_path, started):
    four = started(4, steps=4)
    outs = [p.communicate(timeout=600) for p in four]
    assert [p.returncode for p in four] == [0] * 4, outs
    agree_with_one(tmp_path, 4, 4)
