"""What must hold when things go wrong: kills, damaged files, full disks, numbers that are not finite."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aigc_jax import data, train, vae

from . import trainee

ROOT = Path(__file__).parent.parent
DIGITS = data.load("digits")
ENV = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def start(folder, *flags, **options):
    command = [sys.executable, "-m", "tests.trainee", str(folder), *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def kill(process):
    process.kill()
    process.communicate()


def steps_logged(folder):
    try:
        return len((folder / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Bits of runs that nothing interrupts, one for each set of flags."""
    known = {}

    def get(*flags):
        if flags not in known:
            code, out, err = finish(start(tmp_path_factory.mktemp("unbroken") / "run", *flags, "--seconds", 0))
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
        return "sums are made" if not any((p / "SHA256SUMS").exists() for p in saving(folder)) else "before the rename"
    return "between saves"


def check_resume(folder, unbroken, *flags):
    """The same command again restored a step > 0, ran only what was left, and ends with an unbroken run's bits."""
    code, out, err = finish(start(folder, *flags, "--seconds", 0))
    assert code == 0, err
    report = json.loads(out)
    assert report["first"] > 0 and report["updates"] == 60 - report["first"]
    assert report["sha"] == unbroken(*flags)
    assert not saving(folder)
    lines = train.metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 61))


@pytest.mark.parametrize(
    "until, flags", [(17, ()), (30, ("--steps-per-call", 4)), (22, ("--family", "gan", "--steps-per-call", 2))]
)
def test_killed_between_steps(tmp_path, unbroken, until, flags):
    folder = tmp_path / "run"
    process = start(folder, *flags)
    wait_for(lambda: steps_logged(folder) >= until, process)
    kill(process)
    assert steps_logged(folder) < 60
    check_resume(folder, unbroken, *flags)


def test_killed_while_a_save_is_under_way(tmp_path, unbroken):
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        process = start(folder)
        wait_for(lambda: (folder / "checkpoints" / "10").exists(), process)  # noqa: B023
        wait_for(lambda: saving(folder), process)  # noqa: B023
        kill(process)
        if saving(folder):
            return check_resume(folder, unbroken)
    pytest.fail("no kill hit a save")


@pytest.mark.soak
def test_twenty_kills_over_all_phases(tmp_path, unbroken):
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
            check_resume(folder, unbroken)
    for name, at in phases.items():
        print(f"killed {len(at)} times while {name}: after updates {at}")
    assert len(phases) >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(tmp_path, unbroken, number):
    folder = tmp_path / "run"
    process = start(folder, "--save-every", 0)
    wait_for(lambda: steps_logged(folder) >= 7, process)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 1 and out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and signal.Signals(number).name in lines[0] and str(folder) in lines[0]
    check_resume(folder, unbroken)


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def short(folder, steps=20, **options):
    return train.Run(folder=str(folder), steps=steps, batch_size=16, save_every=5, devices=1, **options)


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


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_half, lose_the_sums, add_a_file])
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


@pytest.mark.parametrize("at", ["update", "validation", "last"])
def test_asked_to_stop_at_any_moment_it_leaves(tmp_path, at):
    """Within an update, within a validation, within the very last one: never swallowed, never unsaved."""

    def on_eval(family, state, step):
        if (at, step) in (("validation", 10), ("last", 20)):
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    arrays, rows, take = DIGITS.resident

    def asking(seed, i, size):
        if at == "update" and i == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(seed, i, size)

    source = DIGITS._replace(resident=(arrays, asking, take))
    run = short(tmp_path / "run", eval_every=10)
    with pytest.raises(SystemExit, match="stopped by SIGTERM") as stopped:
        train.fit(vae.make, trainee.ACCUMULATING, run, source, on_eval=on_eval)
    step = {"update": 8, "validation": 10, "last": 20}[at]
    assert f"step {step}" in str(stopped.value) and int(train.load(run.folder).state.step) == step


def test_odd_lines_in_the_log_are_dropped(tmp_path, finished):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'7\n[]\n{"step": "x"}\n{"step": 20, "train": {"lo\xff')
    train.fit(vae.make, trainee.ACCUMULATING, short(folder, 30), DIGITS)
    assert [line["step"] for line in train.metrics(folder)] == [20, 30]


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


# ----------------------------------------------------------------------------------------------------------- full disk

LIMITED = """
import resource, sys, runpy, pathlib
from aigc_jax.train import Checkpoints
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
    assert lines and "step 10 could not be saved" in lines[-1] and "the checkpoint of step 5 stands" in lines[-1], err
    # tensorstore's threads outlive a failed save, on a busy machine even the clearing: the next run clears saving-*.
    assert [p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("saving-")] == ["5"]
    assert int(train.load(folder).state.step) == 5


@pytest.mark.parametrize("k", ["1", "4"])
def test_a_file_that_cannot_grow_is_said_and_the_older_checkpoint_stands(tmp_path, k):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", LIMITED, str(folder), "--steps-per-call", k]
    process = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    check_full(folder, process.returncode, process.stderr)


def test_full_disk_in_an_experiment_is_one_line(tmp_path):
    """The command line's view: a small file system, one line, exit code 1, and the same command goes on later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine allows no tmpfs to be mounted")
    try:
        folder = disk / "run"
        command = [sys.executable, "-m", "experiments.vae_digits", "--scale", "smoke", "--run.folder", str(folder),
                   "--run.steps", "400", "--run.save-every", "50", "--run.keep", "100"]  # fmt: skip
        process = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert process.returncode == 1, process.stderr
        assert "Traceback" not in process.stderr
        last = process.stderr.strip().splitlines()[-1]
        assert last.startswith("error: step ") and "stands" in last, process.stderr
        steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
        assert steps and int(train.load(folder, at_most=10**6).state.step) == steps[-1]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert again.returncode == 0 and f"continuing at step {steps[-1]} of 400" in again.stderr, again.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("k", [1, 5])
def test_a_loss_that_is_not_finite_stops_the_run_and_replays(tmp_path, k):
    run = train.Run(folder=str(tmp_path / "run"), steps=20, batch_size=16, save_every=5, steps_per_call=k, devices=1)
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
    replayed = subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert replayed.returncode == 0 and "not finite" in replayed.stdout, replayed.stderr


def test_replay_repeats_the_logged_numbers(tmp_path):
    run = train.Run(
        folder=str(tmp_path / "run"), steps=12, batch_size=16, save_every=5, log_every=1, devices=1, steps_per_call=4
    )
    train.fit(vae.make, trainee.ACCUMULATING, run, DIGITS)
    for line in train.metrics(run.folder)[:1] + train.metrics(run.folder)[-1:]:
        assert train.replay(run.folder, DIGITS, step=line["step"])[0] == line["train"]
    with pytest.raises(train.Refused, match="other data"):
        train.replay(run.folder, data.load("digits", "test"), step=3)


def test_save_waits_until_metrics_are_known_to_be_finite(tmp_path):
    """The NaN of update 8 is fetched a call late; a save due at 8 must not keep its state."""
    run = train.Run(folder=str(tmp_path / "run"), steps=20, batch_size=16, save_every=4, devices=1)
    with pytest.raises(train.NonFinite, match="the checkpoint of step 4 stands"):
        train.fit(trainee.make_nan, trainee.ACCUMULATING, run, DIGITS)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), train.load(run.folder).state.params))
