"""What must hold when things go wrong: kills, damaged files, full disks, numbers that are not finite."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import __main__ as commands
from aigc_jax import data, interrupt, train, vae
from aigc_jax.core import State
from aigc_jax.train import checkpoints
from aigc_jax.train import folder as folders

from . import trainee
from .trainee import wait_for

ROOT = Path(__file__).parent.parent
DIGITS = data.load("digits")
ENV = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def launch(folder, *flags):
    command = [sys.executable, "-m", "tests.trainee", str(folder), *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def start():
    """start(folder, flags...) trains in a process of its own, which a test that fails leaves to no other."""
    started = []

    def begin(folder, *flags):
        started.append(launch(folder, *flags))
        return started[-1]

    yield begin
    trainee.end(started)


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def kill(process):
    process.kill()
    process.communicate()


def steps_logged(folder):
    try:
        return len((folder / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Bits of runs that nothing interrupts, one for each set of flags."""
    known = {}

    def get(*flags):
        if flags not in known:
            process = launch(tmp_path_factory.mktemp("unbroken") / "run", *flags, "--seconds", 0)
            try:
                code, out, err = finish(process)
            finally:
                trainee.end([process])
            assert code == 0, err
            known[flags] = json.loads(out)
            assert known[flags]["updates"] == 60
        return known[flags]["sha"]

    return get


def saving(folder):
    return list((folder / "checkpoints").glob("saving-*"))


def phase(folder):
    """What a killed process was doing, from what it left."""
    left = [p.name for p in saving(folder)]
    if any("tmp" in name for name in left):
        return "Orbax writes"
    if left:
        return (
            "sums are made"
            if not any((p / "SHA256SUMS").exists() for p in saving(folder))
            else "before the rename"
        )
    return "between saves"


def check_resume(start, folder, unbroken, *flags):
    """The same command again restored a step > 0, ran only what was left, and ends with an unbroken run's bits."""
    code, out, err = finish(start(folder, *flags, "--seconds", 0))
    assert code == 0, err
    report = json.loads(out)
    assert report["first"] > 0 and report["updates"] == 60 - report["first"]
    assert report["sha"] == unbroken(*flags)
    assert not saving(folder)
    lines = train.metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 61))


@pytest.mark.soak
@pytest.mark.parametrize(
    "until, flags",
    [
        (17, ()),
        (30, ("--steps-per-call", 4)),
        (22, ("--family", "gan", "--steps-per-call", 2)),
        (22, ("--family", "stylegan")),
        (22, ("--family", "cyclegan")),
    ],
)
def test_killed_between_steps(tmp_path, unbroken, start, until, flags):
    folder = tmp_path / "run"
    process = start(folder, *flags)
    wait_for(lambda: steps_logged(folder) >= until, process)
    kill(process)
    assert steps_logged(folder) < 60
    check_resume(start, folder, unbroken, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, steps_per_call", [("vae", 4), ("gan", 2), ("stylegan", 1), ("cyclegan", 1)]
)
def test_cut_off_between_saves(tmp_path, family, steps_per_call):
    """The process dies two updates after the last save: the same command again ends with an unbroken run's bits."""

    class PlugPulled(BaseException):  # an Exception of a validation would be saved after
        pass

    make, cfg, source = trainee.FAMILIES[family]
    if family == "vae":
        cfg = trainee.ACCUMULATING

    def die(family, state, step):
        if step == 12:
            raise PlugPulled

    def go(folder, on_eval=None):
        run = train.Run(
            folder=str(folder),
            steps=20,
            batch_size=16,
            save_every=5,
            eval_every=6,
            devices=1,
            steps_per_call=steps_per_call,
        )
        return trainee.fingerprint(train.fit(make, cfg, run, source, on_eval=on_eval).state)

    with pytest.raises(PlugPulled):
        go(tmp_path / "run", die)
    assert int(train.load(tmp_path / "run").state.step) == 10
    assert go(tmp_path / "run") == go("")


@pytest.mark.slow
def test_killed_while_a_save_is_under_way(tmp_path, unbroken, start):
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        process = start(folder)
        wait_for(lambda: (folder / "checkpoints" / "10").exists(), process)  # noqa: B023
        wait_for(lambda: saving(folder), process)  # noqa: B023
        kill(process)
        if saving(folder):
            return check_resume(start, folder, unbroken)
    pytest.fail("no kill hit a save")


@pytest.mark.soak
def test_twenty_kills_over_all_phases(tmp_path, unbroken, start):
    rng = random.Random(0)
    phases = {}
    for i in range(20):
        folder = tmp_path / str(i)
        process = start(folder, "--seconds", 0.003)
        wait_for(lambda: (folder / "checkpoints" / "5").exists(), process)  # noqa: B023
        if i % 2:
            wait_for(lambda: saving(folder), process)  # noqa: B023
            time.sleep(rng.random() * 0.04)
        else:
            time.sleep(rng.random() * 0.3)
        kill(process)
        phases.setdefault(phase(folder), []).append(steps_logged(folder))
        if steps_logged(folder) < 60:
            check_resume(start, folder, unbroken)
    for name, at in phases.items():
        print(f"killed {len(at)} times while {name}: after updates {at}")
    assert len(phases) >= 3


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.soak
def test_asked_to_stop_it_saves_and_leaves(tmp_path, unbroken, start, number):
    folder = tmp_path / "run"
    process = start(folder, "--save-every", 0)
    wait_for(lambda: steps_logged(folder) >= 7, process)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 1 and out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and signal.Signals(number).name in lines[0] and str(folder) in lines[0]
    check_resume(start, folder, unbroken)


def asking(number, at):
    """The digits, whose batch `at` sends this process a signal."""
    arrays, rows, take = DIGITS.resident

    def ask(seed, i, size):
        if i == at:
            os.kill(os.getpid(), number)
        return rows(seed, i, size)

    return DIGITS._replace(resident=(arrays, ask, take))


@pytest.fixture
def handlers():
    """What handles signals is as before, and so after the test."""
    old = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    yield old
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, number",
    [
        ("update", signal.SIGTERM),
        ("update", signal.SIGINT),
        ("update", signal.SIGHUP),
        ("validation", signal.SIGTERM),
        ("last", signal.SIGTERM),
    ],
)
def test_asked_to_stop_at_any_moment_it_leaves(tmp_path, handlers, at, number):
    """Within an update, within a validation, within the very last one: never swallowed, never unsaved."""

    def on_eval(family, state, step):
        if (at, step) in (("validation", 10), ("last", 20)):
            os.kill(os.getpid(), number)
        return {}

    run = short(tmp_path / "run", eval_every=10)
    name = signal.Signals(number).name
    with pytest.raises(SystemExit, match=f"stopped by {name}") as stopped:
        source = asking(number, 7 if at == "update" else None)
        train.fit(vae.make, trainee.ACCUMULATING, run, source, on_eval=on_eval)
    step = {"update": 8, "validation": 10, "last": 20}[at]
    assert f"step {step}" in str(stopped.value) and int(train.load(run.folder).state.step) == step
    assert {n: signal.getsignal(n) for n in handlers} == handlers


def test_what_is_ignored_stays_ignored(tmp_path, handlers):
    """nohup ignores SIGHUP: the run goes on when its terminal closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    result = train.fit(vae.make, trainee.ACCUMULATING, short(""), asking(signal.SIGHUP, 7))
    assert int(result.state.step) == 20


@pytest.mark.slow
def test_a_second_interrupt_does_what_it_did_before(tmp_path, handlers):
    """Its old handler is called at once, and the folder can be gone on with."""

    def twice(family, state, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second came back")

    with pytest.raises(KeyboardInterrupt):
        train.fit(
            vae.make,
            trainee.ACCUMULATING,
            short(tmp_path / "run", eval_every=8),
            DIGITS,
            on_eval=twice,
        )
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert int(train.load(tmp_path / "run").state.step) == 5
    result = train.fit(vae.make, trainee.ACCUMULATING, short(tmp_path / "run"), DIGITS)
    again = train.fit(vae.make, trainee.ACCUMULATING, short(""), DIGITS)
    assert trainee.fingerprint(result.state) == trainee.fingerprint(again.state)


IMPORT = {
    "Python": "import time; time.sleep(600)",
    "a library that comes back late": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


@pytest.mark.parametrize("what", ["aigc_jax", "experiments", "experiments.vae_digits"])
@pytest.mark.parametrize("within", IMPORT)
def test_an_interrupt_before_training_ends_in_one_line(tmp_path, what, within):
    """A stand-in for JAX, whose import hangs, is interrupted."""
    (tmp_path / "jax.py").write_text(f"print('importing', flush=True); {IMPORT[within]}")
    process = subprocess.Popen(
        [sys.executable, "-m", what],
        cwd=ROOT,
        env={**ENV, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert finish(process) == (130, "", "interrupted\n")
    finally:
        trainee.end([process])


def test_importing_the_library_leaves_interrupts_alone():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.soak
def test_interrupts_at_random_moments_of_a_start(tmp_path):
    """One line, nothing left running, and a folder that the same command goes on with."""
    rng, outcomes = random.Random(0), {}
    command = [
        sys.executable,
        "-m",
        "experiments.vae_digits",
        "--scale",
        "smoke",
        "--run.folder",
        str(tmp_path / "run"),
    ]
    for _ in range(40):
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            time.sleep(0.15 + rng.random() * 8)  # Python itself takes 0.1 s to begin
            process.send_signal(signal.SIGINT)
            code, _, err = finish(process)
        finally:
            trainee.end([process])
        # Beside the lines of a run that goes well there is at most one.
        normal = r"step \d+/|.* (continuing|complete) at step "
        lines = [line for line in err.strip().splitlines() if not re.match(normal, line)]
        assert "Traceback" not in err and len(lines) <= 1, err
        last = (lines or [""])[-1]
        outcomes.setdefault((code, last.split(":")[0].split(" at ")[0]), []).append(last)
    print({kind: len(lines) for kind, lines in outcomes.items()})
    assert {code for code, _ in outcomes} <= {0, 1, 130}
    again = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def short(folder, steps=20, **options):
    return train.Run(
        folder=str(folder), steps=steps, batch_size=16, save_every=5, devices=1, **options
    )


def flip_a_bit(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def lose_half(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files[::2]:
        path.unlink()


def lose_the_sums(folder):
    (folder / "SHA256SUMS").unlink()


def add_a_file(folder):
    (folder / "d" / "more").write_text("x")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.fit(vae.make, trainee.ACCUMULATING, short(folder), DIGITS)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["15", "20"]
    return folder, train.fit(vae.make, trainee.ACCUMULATING, short("", 30), DIGITS).state


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in (truncate, lose_half, lose_the_sums, add_a_file)
        ),
    ],
)
def test_damaged_checkpoint_is_passed_over(tmp_path, finished, damage, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    damage(folder / "checkpoints" / "20")
    assert int(train.load(folder).state.step) == 15
    warning = capfd.readouterr().err.strip().splitlines()
    assert len(warning) == 1 and "step 20" in warning[0] and "damaged" in warning[0]
    result = train.fit(vae.make, trainee.ACCUMULATING, short(folder, 30), DIGITS)
    assert "continuing at step 15 of 30" in capfd.readouterr().err
    assert trainee.fingerprint(result.state) == trainee.fingerprint(finished[1])
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["25", "30", "damaged-20"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path, finished):
    """The run goes back to 15 and stops at 18: the good 18 stays, although a damaged 20 has the larger number."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    flip_a_bit(folder / "checkpoints" / "20")
    train.fit(vae.make, trainee.ACCUMULATING, short(folder, 18, keep=1), DIGITS)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["18", "damaged-20"]
    assert int(train.load(folder).state.step) == 18


def test_odd_lines_in_the_log_are_dropped(tmp_path, finished):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'7\n[]\n{"step": "x"}\n{"step": 20, "train": {"lo\xff')
    train.fit(vae.make, trainee.ACCUMULATING, short(folder, 30), DIGITS)
    assert [line["step"] for line in train.metrics(folder)] == [20, 30]


@pytest.mark.slow
def test_a_start_that_was_killed_at_once_starts_again(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for path in (folder / ".lock", folder / "run.json.new", folder / "checkpoints" / "saving-5"):
        path.write_text("")
    assert int(train.fit(vae.make, trainee.ACCUMULATING, short(folder, 5), DIGITS).state.step) == 5


def test_no_intact_checkpoint(tmp_path, finished, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    for step in ("15", "20"):
        flip_a_bit(folder / "checkpoints" / step)
    with pytest.raises(train.Refused, match="no intact checkpoint"):
        train.load(folder)
    result = train.fit(vae.make, trainee.ACCUMULATING, short(folder, 30), DIGITS)
    assert trainee.fingerprint(result.state) == trainee.fingerprint(finished[1])


# ------------------------------------------------------------------------------------------ read while another trains


def prune(folder, old, new):
    """What a save does beside a reader at keep = 1: a new number appears, then the old one goes."""
    shutil.copytree(folder / "checkpoints" / old, folder / "checkpoints" / "new")
    (folder / "checkpoints" / "new").rename(folder / "checkpoints" / new)
    (folder / "checkpoints" / old).rename(folder / "checkpoints" / f"saving-{old}-old")
    shutil.rmtree(folder / "checkpoints" / f"saving-{old}-old")


@pytest.mark.parametrize("at", ["intact", "restore", "after restore"])
def test_a_checkpoint_that_is_pruned_while_it_is_read(tmp_path, finished, monkeypatch, capfd, at):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "15")
    real, todo = (
        getattr(checkpoints.Checkpoints, at.split()[-1]),
        [("20", "21"), ("21", "22"), ("22", "23")],
    )

    def during(self, step, *rest):
        if at == "after restore":
            found = real(self, step, *rest)
        if todo:
            prune(folder, *todo.pop(0))
        return found if at == "after restore" else real(self, step, *rest)

    monkeypatch.setattr(checkpoints.Checkpoints, at.split()[-1], during)
    result = train.load(folder)
    assert not todo and int(result.state.step) == 20 and capfd.readouterr().err == ""
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["23"]


def test_a_listing_that_misses_a_rename_is_made_again(finished, monkeypatch):
    scan, misses = os.scandir, [True]
    monkeypatch.setattr(
        checkpoints.os, "scandir", lambda path: iter(()) if misses and misses.pop() else scan(path)
    )
    assert checkpoints.Checkpoints(finished[0], 2).steps() == [15, 20]


def test_info_passes_over_what_is_pruned_meanwhile(tmp_path, finished, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    flip_a_bit(folder / "checkpoints" / "15")
    real, todo = checkpoints.Checkpoints.intact, [("20", "21")]

    def during(self, step):
        if todo and step == 20:
            prune(folder, *todo.pop())
        return real(self, step)

    monkeypatch.setattr(checkpoints.Checkpoints, "intact", during)
    commands.info(folder)
    lines = [
        line.split(None, 1)[1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("saved")
    ]
    assert lines == ["step 15  DAMAGED: it will be passed over", "step 21"]


@pytest.mark.soak
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # lost tasks of Orbax, see _hush
def test_four_hundred_loads_of_a_run_that_trains(tmp_path, start):
    """keep = 1, a save every two updates: not one fails."""
    folder = tmp_path / "run"
    process = start(folder, "--steps", 10**6, "--save-every", 2, "--seconds", 0, "--keep", 1)
    wait_for(lambda: len(list((folder / "checkpoints").glob("[0-9]*"))) > 0, process)
    steps = [int(train.load(folder).state.step) for _ in range(400)]
    assert process.poll() is None and steps == sorted(steps)
    print(f"400 loads saw {len(set(steps))} checkpoints, up to step {steps[-1]}")


@pytest.mark.soak
def test_two_processes_of_two_seeds_begin_at_once(tmp_path, start):
    """One trains, the other is refused in one line, whatever of the two comes first where."""
    for i in range(8):
        folder = tmp_path / str(i)
        both = [start(folder, "--seed", seed) for seed in (0, 1)]
        ends = [finish(process) for process in both]
        assert sorted(code for code, _, _ in ends) == [0, 1], ends
        [(seed, (_, _, err))] = [(seed, end) for seed, end in enumerate(ends) if end[0]]
        assert "Refused" in err and ("another process" in err or "run.seed" in err), err
        assert json.loads((folder / "run.json").read_text())["run"]["seed"] == 1 - seed
        assert [line["step"] for line in train.metrics(folder)] == list(range(1, 61))


# ----------------------------------------------------------------------------------------------------------- full disk

LIMITED = """
import resource, sys, runpy, pathlib
from aigc_jax.train.checkpoints import Checkpoints
save = Checkpoints.save
def limited(self, step, *rest, **named):
    if step == 10:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    save(self, step, *rest, **named)
Checkpoints.save = limited
sys.argv = ["trainee", *sys.argv[1:]]
runpy.run_module("tests.trainee", run_name="__main__")
"""


def check_full(folder, code, err):
    assert code == 1
    lines = [line for line in err.strip().splitlines() if "SaveFailed" in line]
    assert (
        lines
        and "step 10 could not be saved" in lines[-1]
        and "the checkpoint of step 5 stands" in lines[-1]
    ), err
    # tensorstore's threads outlive a failed save, on a busy machine even the clearing: the next run clears saving-*.
    assert [
        p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("saving-")
    ] == ["5"]
    assert int(train.load(folder).state.step) == 5


@pytest.mark.slow
@pytest.mark.parametrize("k", ["1", "4"])
def test_a_file_that_cannot_grow_is_said_and_the_older_checkpoint_stands(tmp_path, k):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", LIMITED, str(folder), "--steps-per-call", k]
    process = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    check_full(folder, process.returncode, process.stderr)


def threads():
    """Threads that the end of a process waits for."""
    return {
        t for t in threading.enumerate() if not t.daemon and type(t).__module__.startswith("orbax")
    }


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 10])
def test_no_folder_for_a_checkpoint(tmp_path, after, monkeypatch):
    """checkpoints/ becomes a file: one line, which names no checkpoint that is not there, and no thread that waits."""
    folder, save = tmp_path / "run", checkpoints.Checkpoints.save

    def broken(self, step, *rest):
        self.wait()
        if step > after:
            self.folder.rename(folder / "away")
            self.folder.write_text("")
        save(self, step, *rest)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", broken)
    with pytest.raises(
        train.SaveFailed, match=r"step \d+ could not be saved in .*; there is no checkpoint$"
    ):
        train.fit(vae.make, trainee.ACCUMULATING, short(folder), DIGITS)
    assert not threads()


@pytest.mark.slow
def test_a_log_that_cannot_be_written_says_what_stands(tmp_path, monkeypatch):
    def full(self, step, kind, values):
        if step >= at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.log.Log, "write", full)
    for at, stands in ((4, "there is no checkpoint"), (14, "the checkpoint of step 10 stands")):
        with pytest.raises(train.SaveFailed, match=f"No space left on device; {stands}$"):
            train.fit(
                vae.make, trainee.ACCUMULATING, short(tmp_path / str(at), log_every=1), DIGITS
            )


@pytest.mark.slow
def test_cleaning_up_hides_no_failure(tmp_path, monkeypatch):
    """Orbax's own end fails too, as on a disk without inodes: the line stays."""

    def fail(self):
        raise OSError(28, "No space left on device")

    import orbax.checkpoint

    monkeypatch.setattr(orbax.checkpoint.StandardCheckpointer, "close", fail)
    monkeypatch.setattr(checkpoints, "_sums", lambda folder: fail(None))
    with pytest.raises(
        train.SaveFailed, match="step 5 could not be saved.*; there is no checkpoint$"
    ):
        train.fit(vae.make, trainee.ACCUMULATING, short(tmp_path / "run"), DIGITS)


@pytest.mark.slow
def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path, monkeypatch, capfd
):
    def stuck(path, **options):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", stuck)
    assert (
        int(train.fit(vae.make, trainee.ACCUMULATING, short(tmp_path / "run"), DIGITS).state.step)
        == 20
    )
    lines = [line for line in capfd.readouterr().err.splitlines() if "cannot be removed" in line]
    assert lines and all(line.startswith("warning: ") for line in lines)
    assert int(train.load(tmp_path / "run").state.step) == 20


def tmpfs(folder, options):
    """A small file system, or a skipped test where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine allows no tmpfs to be mounted")
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("inodes", [*range(6, 24), 30, 40])
def test_a_disk_without_inodes(tmp_path, start, inodes):
    """Wherever in a save they end: one line with its own words, and the process ends."""
    disk = tmpfs(tmp_path / "disk", f"nr_inodes={inodes},size=64m")
    try:
        code, out, err = finish(start(disk / "run", "--seconds", 0))
        last = err.strip().splitlines()[-1]
        assert code == 1 and out == "" and ("SaveFailed: " in last or "Refused: " in last), err
        there = sorted(
            int(p.name) for p in (disk / "run").glob("checkpoints/[0-9]*") if p.name.isdecimal()
        )
        if "SaveFailed: " in last:
            assert last.endswith(
                f"the checkpoint of step {there[-1]} stands" if there else "there is no checkpoint"
            )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_full_disk_in_an_experiment_is_one_line(tmp_path):
    """The command line's view: a small file system, one line, exit code 1, and the same command goes on later."""
    disk = tmpfs(tmp_path / "disk", "size=2m")
    try:
        folder = disk / "run"
        command = [
            sys.executable,
            "-m",
            "experiments.vae_digits",
            "--scale",
            "smoke",
            "--run.folder",
            str(folder),
            "--run.steps",
            "400",
            "--run.save-every",
            "50",
            "--run.keep",
            "100",
        ]
        process = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert process.returncode == 1, process.stderr
        assert "Traceback" not in process.stderr
        last = process.stderr.strip().splitlines()[-1]
        assert last.startswith("error: step ") and "stands" in last, process.stderr
        steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
        assert steps and int(train.load(folder, at_most=10**6).state.step) == steps[-1]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert again.returncode == 0 and f"continuing at step {steps[-1]} of 400" in again.stderr, (
            again.stderr
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5])
def test_a_loss_that_is_not_finite_stops_the_run_and_replays(tmp_path, monkeypatch, capsys, k):
    run = train.Run(
        folder=str(tmp_path / "run"),
        steps=20,
        batch_size=16,
        save_every=5,
        steps_per_call=k,
        devices=1,
    )
    with pytest.raises(train.NonFinite) as stopped:
        train.fit(trainee.make_nan, trainee.ACCUMULATING, run, DIGITS)
    words = str(stopped.value)
    assert "step 8: loss = nan" in words and "the checkpoint of step 5 stands" in words
    command = f"python -m aigc_jax replay {run.folder} --step 8"
    assert command in words
    assert [p.name for p in Path(run.folder, "checkpoints").iterdir()] == ["5"]
    good, _ = train.replay(run.folder, DIGITS, step=7)
    bad, facts = train.replay(run.folder, DIGITS, step=8)
    assert np.isfinite(good["loss"]) and np.isnan(bad["loss"])
    np.testing.assert_array_equal(facts["rows"], data.order(1437, 0, 7, 16))
    monkeypatch.setattr(sys, "argv", command.split()[2:])
    commands.main()
    assert "<- not finite" in capsys.readouterr().out


@pytest.mark.slow
def test_replay_repeats_the_logged_numbers(tmp_path, monkeypatch, capsys):
    run = train.Run(
        folder=str(tmp_path / "run"),
        steps=12,
        batch_size=16,
        save_every=5,
        log_every=1,
        devices=1,
        steps_per_call=4,
    )
    train.fit(vae.make, trainee.ACCUMULATING, run, DIGITS)
    for line in train.metrics(run.folder)[:1] + train.metrics(run.folder)[-1:]:
        values, facts = train.replay(run.folder, DIGITS, step=line["step"])
        assert values == line["train"] == facts["logged"]
    with pytest.raises(train.Refused, match="other data"):
        train.replay(run.folder, data.load("digits", "test"), step=3)


def test_save_waits_until_metrics_are_known_to_be_finite(tmp_path):
    """The NaN of update 8 is fetched a call late; a save due at 8 must not keep its state."""
    run = train.Run(folder=str(tmp_path / "run"), steps=20, batch_size=16, save_every=4, devices=1)
    with pytest.raises(train.NonFinite, match="the checkpoint of step 4 stands"):
        train.fit(trainee.make_nan, trainee.ACCUMULATING, run, DIGITS)
    assert jax.tree.all(
        jax.tree.map(lambda x: bool(np.isfinite(x).all()), train.load(run.folder).state.params)
    )


@pytest.mark.slow
def test_replay_compares_itself_with_the_log(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    train.fit(vae.make, trainee.ACCUMULATING, short(folder, 8, log_every=4), DIGITS)

    def said(step):
        monkeypatch.setattr(sys, "argv", ["aigc_jax", "replay", str(folder), "--step", str(step)])
        commands.main()
        return capsys.readouterr().out

    assert "equal to metrics.jsonl in every bit" in said(8)
    assert "holds no line of this step" in said(7)
    lines = train.metrics(folder)
    loss = lines[1]["train"]["loss"]
    lines[1]["train"]["loss"] = loss + 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"NOT as in metrics.jsonl: loss was {loss + 0.5!r} and is {loss!r} (0.5 apart)" in said(
        8
    )
    lines[1]["train"]["loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"NOT as in metrics.jsonl: loss was None and is {loss!r}" in said(8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, leaf",
    [("make_nan_params", "params."), ("make_inf_ema", "ema."), ("make_nan_moments", "opt_state.")],
)
@pytest.mark.parametrize("steps", [8, 12])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, make, leaf, steps):
    """Loss and gradient of update 8 are finite, its state is not; at keep = 1 nothing finite is lost."""
    run = train.Run(
        folder=str(tmp_path / "run"), steps=steps, batch_size=16, save_every=4, keep=1, devices=1
    )
    with pytest.raises(train.NonFinite) as stopped:
        train.fit(getattr(trainee, make), trainee.CFG, run, DIGITS)
    words = str(stopped.value)
    assert (
        words.startswith(f"step 8: {leaf}")
        and " is not finite; the checkpoint of step 4 stands; repeat it" in words
    )
    assert [p.name for p in Path(run.folder, "checkpoints").iterdir()] == ["4"]
    assert int(train.load(run.folder).state.step) == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "complex64"])
def test_what_counts_as_not_finite(dtype):
    def state(**changes):
        fields = {
            "step": jnp.zeros((), jnp.int32),
            "params": {
                "w": jnp.ones((2, 3), dtype),
                "n": jnp.ones(2, jnp.int32),
                "key": jax.random.key(0),
            },
            "opt_state": (jnp.ones(3, dtype), jnp.ones((), bool)),
            "extra": {"history": jnp.ones(3, dtype)},
            "ema": {"w": jnp.ones((2, 3), dtype)},
        }
        return State(**{**fields, **changes})

    bad = jnp.array([1.0, jnp.nan, 1.0]).astype(dtype)
    assert checkpoints.not_finite(state()) is None
    assert checkpoints.not_finite(state(extra=None, ema=None, opt_state=())) is None
    assert checkpoints.not_finite(state(params={"w": bad})) == "params.w"
    assert checkpoints.not_finite(state(ema={"w": bad})) == "ema.w"
    assert checkpoints.not_finite(state(extra={"history": bad})) == "extra.history"
    assert checkpoints.not_finite(state(opt_state=(bad,))) == "opt_state.0"
    if "float8" not in dtype:  # which has no infinity
        infinite = jnp.array([1.0, -jnp.inf]).astype(dtype)
        assert checkpoints.not_finite(state(params={"w": infinite})) == "params.w"
        assert checkpoints.not_finite(state(ema={"w": infinite})) == "ema.w"
        # A running minimum begins there.
        assert (
            checkpoints.not_finite(state(opt_state=(infinite,), extra={"history": infinite}))
            is None
        )


@pytest.mark.slow
def test_an_older_checkpoint_that_is_not_finite_is_passed_over(tmp_path, finished, capfd):
    """As versions before this one saved them, with sums that agree."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    state = train.load(folder).state
    saves = checkpoints.Checkpoints(folder, 3)
    saves.save(
        25,
        state._replace(
            step=state.step + 5, params=jax.tree.map(lambda x: x * jnp.nan, state.params)
        ),
    )
    saves.close()
    assert int(train.load(folder).state.step) == 20
    [line] = capfd.readouterr().err.strip().splitlines()
    assert "step 25" in line and "params." in line and "not finite" in line
    result = train.fit(vae.make, trainee.ACCUMULATING, short(folder, 30), DIGITS)
    assert trainee.fingerprint(result.state) == trainee.fingerprint(finished[1])
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["25", "30", "damaged-25"]


def test_parameters_that_are_not_finite_start_nothing(tmp_path, finished):
    params = jax.tree.map(lambda x: x * jnp.nan, finished[1].params)
    with pytest.raises(train.Refused, match="params.* not finite"):
        train.fit(vae.make, trainee.ACCUMULATING, short(tmp_path / "run"), DIGITS, params=params)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- validations, and what they raise

TINY = vae.Config(shape=(8, 8, 1), levels=17, latent_dim=2, hidden=(4,))
FEW = data.load("digits", "train[:40]")


def tiny(folder, **options):
    return train.Run(
        **{"folder": str(folder), "steps": 2, "batch_size": 20, "devices": 1, **options}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no such file"), RuntimeError("odd"), SystemExit(3)]
)
def test_what_on_eval_raises_loses_no_training_and_is_made_up_for(tmp_path, error):
    raising = [True]

    def on_eval(family, state, step):
        if raising:
            raise error
        return {"seen": float(step)}

    with pytest.raises(type(error)) as raised:
        train.fit(vae.make, TINY, tiny(tmp_path), FEW, on_eval=on_eval)
    assert raised.value is error
    assert int(train.load(tmp_path).state.step) == 2
    raising.clear()
    for _ in range(2):  # the second has nothing to do
        train.fit(vae.make, TINY, tiny(tmp_path), FEW, on_eval=on_eval)
        lines = [line for line in train.metrics(tmp_path) if "valid" in line]
        assert lines == [{"step": 2, "valid": {"seen": 2.0}}]


def test_the_lock_is_held_until_the_last_save_is_written(tmp_path, monkeypatch):
    close, held = checkpoints.Checkpoints.close, []

    def closing(self):
        try:
            train.folder.lock(self.folder.parent).release()
        except train.Refused as e:
            held.append(str(e))
        close(self)

    monkeypatch.setattr(checkpoints.Checkpoints, "close", closing)
    train.fit(vae.make, TINY, tiny(tmp_path), FEW)
    assert len(held) == 1 and "another process is training" in held[0]


@pytest.mark.slow
def test_checkpoints_of_another_run_are_refused(tmp_path):
    for seed in (0, 1):
        train.fit(vae.make, TINY, tiny(tmp_path / str(seed), seed=seed), FEW)
    longer = tiny(tmp_path / "0", steps=3, keep=3, eval_every=1)
    assert (
        int(train.fit(vae.make, TINY, longer, FEW).state.step) == 3
    )  # a change that is no other run
    shutil.rmtree(tmp_path / "1" / "checkpoints")
    shutil.copytree(tmp_path / "0" / "checkpoints", tmp_path / "1" / "checkpoints")
    for use in (
        lambda: train.load(tmp_path / "1"),
        lambda: train.fit(vae.make, TINY, tiny(tmp_path / "1", steps=4, seed=1), FEW),
    ):
        with pytest.raises(
            train.Refused, match="step 3 in .* is of another run than the run.json beside it"
        ):
            use()
    for step in (2, 3):  # those of older versions say nothing
        folder = tmp_path / "1" / "checkpoints" / str(step)
        (folder / checkpoints.RUN).unlink()
        (folder / checkpoints.SUMS).write_text(checkpoints._sums(folder))
    assert int(train.load(tmp_path / "1").state.step) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # lost tasks of Orbax, see _hush
@pytest.mark.parametrize("file", ["_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"])
def test_an_intact_checkpoint_that_orbax_cannot_read_is_passed_over(tmp_path, capfd, file):
    train.fit(vae.make, TINY, tiny(tmp_path, save_every=1), FEW)
    folder = tmp_path / "checkpoints" / "2"
    (folder / file).write_text("{}")
    (folder / checkpoints.SUMS).write_text(checkpoints._sums(folder))
    loaded, said = train.load(tmp_path), capfd.readouterr().err
    if file == "_CHECKPOINT_METADATA":  # holds nothing that is needed
        assert int(loaded.state.step) in (1, 2)
    else:
        assert int(loaded.state.step) == 1 and "step 2" in said and "cannot be read" in said


def test_a_number_beyond_every_float_in_the_log_is_dropped(tmp_path):
    lines = (
        {"step": 1, "valid": {"a": 10**400}},
        {"step": 10**400, "valid": {"a": 1}},
        {"step": 2, "valid": {"a": 7}},
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.metrics(tmp_path) == [{"step": 2, "valid": {"a": 7}}]
    assert train.log.ranked([{"step": 1, "valid": {"a": 10**400}}], "a", [1]) == []


def test_a_folder_in_which_another_process_begins_meanwhile(tmp_path, monkeypatch):
    listdir = os.listdir

    def begun(folder):
        (tmp_path / "run.json").touch()
        (tmp_path / "metrics.jsonl").touch()
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", begun)
    train.folder.vacant(tmp_path)


@pytest.mark.parametrize(
    "option",
    [["-m", "aigc_jax"], ["-maigc_jax"], ["-um", "aigc_jax"], ["-X", "dev", "-bmaigc_jax"]],
)
def test_the_module_of_a_command_is_found(option):
    assert interrupt._module(["python", *option, "-m", "other"]) == "aigc_jax"
    assert interrupt._module(["python", "-Wmodule", "--check-hash-based-pycs", "script.py"]) == ""


def test_a_package_inside_a_foreign_repository_has_no_commit(tmp_path, monkeypatch):
    """An installed package lies in an environment that the user's repository does not track."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    package = tmp_path / "environment" / "folder.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(folders, "__file__", str(package))
    assert folders._commit() == ""  # outside of git
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert folders._commit() == ""
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a copy of the package"], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    assert folders._commit() == head.stdout.strip()
    package.write_text("1\n")
    assert folders._commit() == head.stdout.strip() + " with changes"
