"""Runs that an earlier version saved load and compute the same. `golden/make_runs.py` made them."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from aigc_jax import train

from .golden import make_runs

NAMES = list(make_runs.RUNS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(Path(make_runs.__file__).parent / "runs.tar.xz") as archive:
        # Python 3.11.2 (Debian 12) has no filters; from 3.12 on, none would be a warning.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(folder)
    return folder / "runs"


def test_there_is_a_saved_run_of_each_net(saved):
    assert sorted(path.name for path in saved.iterdir() if path.is_dir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_run_loads(name, saved):
    expected = json.loads((saved / "expected.json").read_text())[name]
    result = train.load(saved / name)
    assert int(result.state.step) == 3
    assert make_runs.shapes(result.state) == expected["shapes"]
    assert make_runs.digest(result.state) == expected["state"]
    now = jax.eval_shape(result.family.init, jax.random.key(0))
    assert make_runs.shapes(now) == expected["shapes"]
    scores = make_runs.scores(result)
    assert scores.keys() == expected["scores"].keys()
    for quantity, value in expected["scores"].items():
        # Another version of XLA may round otherwise.
        np.testing.assert_allclose(scores[quantity], value, rtol=1e-4, err_msg=quantity)
