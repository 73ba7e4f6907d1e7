"""Models that come with the package: what `ship` writes, `load` opens by name."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aigc_jax import data, ddpm, gan, train, vae
from aigc_jax.commands import runs
from aigc_jax.commands.sample import sample
from aigc_jax.train import Run, shipping, weights

CONFIGS = {
    "an average": (vae.make, vae.Config((8, 8, 1), levels=17, hidden=(5,), latent_dim=2, ema=0.9)),
    "no average": (vae.make, vae.Config((8, 8, 1), levels=17, hidden=(5,), latent_dim=2)),
    "an average of parameters and codes": (
        vae.make_vq,
        vae.VQConfig((8, 8, 1), levels=17, codes=5, code_dim=2, widths=(), patch=2, ema=0.9),
    ),
    "BatchNorm, an average of G": (
        gan.make,
        gan.Config(
            shape=(8, 8, 1),
            levels=17,
            latent_dim=3,
            gen=gan.NetConfig("mlp", (4,), norm="batch"),
            disc=gan.NetConfig("mlp", (4,)),
            ema=0.9,
        ),
    ),
    "a history of losses": (
        ddpm.make,
        ddpm.Config(
            shape=(8, 8, 1),
            levels=17,
            T=21,
            times="importance",
            net=ddpm.NetConfig("mlp", (8,), dropout=0.0),
            ema=0.9,
        ),
    ),
}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    def fit(name):
        monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
        make, cfg = CONFIGS[name]
        run = Run("", steps=2, batch_size=8, devices=1)
        return make, train.fit(make, cfg, run, data.load("digits"))

    return fit


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_model_samples_as_the_model_rounded_to_float16(trained, tmp_path, name):
    make, result = trained(name)
    train.ship(result, make, tmp_path / "small.safetensors", command="make it")
    assert "small" in train.shipped()
    back = train.load("small")
    assert back.config == result.config and back.info == result.info
    assert int(back.state.step) == 2 and back.state.opt_state is None

    def rounded(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.float16).astype(x.dtype) if is_float else x

    half = result._replace(state=jax.tree.map(rounded, result.state._replace(opt_state=None)))
    key = jax.random.key(0)
    samples = (train.sample(each, key, n=3) for each in (back, half))
    np.testing.assert_array_equal(*samples)
    assert weights.header(tmp_path / "small.safetensors")["command"] == "make it"


@pytest.mark.slow
def test_a_run_may_start_from_a_shipped_model(trained, tmp_path):
    make, result = trained("an average")
    train.ship(result, make, tmp_path / "small.safetensors")
    run = Run("", steps=1, batch_size=8, devices=1, init="small")
    more = train.fit(make, result.config, run, data.load("digits"))
    assert int(more.state.step) == 1


def test_a_folder_of_the_same_name_comes_first(trained, tmp_path, monkeypatch):
    make, result = trained("no average")
    train.ship(result, make, tmp_path / "small.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    with pytest.raises(train.Refused, match="small is no run folder"):
        train.load("small")


def test_a_name_that_is_neither_a_folder_nor_a_model(trained, tmp_path):
    make, result = trained("no average")
    train.ship(result, make, tmp_path / "small.safetensors")
    with pytest.raises(train.Refused, match="no such folder; models that come.*: small$"):
        train.load("smal")


def test_commands_take_the_name_of_a_shipped_model(trained, tmp_path, capsys):
    make, result = trained("no average")
    train.ship(result, make, tmp_path / "small.safetensors", command="make it")
    runs.info(Path("small"))
    said = capsys.readouterr().out
    assert "aigc_jax.vae.make" in said and "command  make it" in said and "sha256" in said
    with pytest.raises(train.Refused, match="--out"):
        sample(Path("small"), n=2)
    sample(Path("small"), n=2, out=tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 100


def _changed(file, **changes):
    """Writes the file again, with other arrays or texts in its header."""
    arrays, about = load_file(file), weights.header(file)
    for name, change in changes.items():
        if name == "arrays":
            change(arrays)
        else:
            about[name] = change(about[name])
    save_file(arrays, file, about)


def test_damaged_files_are_refused_in_one_line(trained, tmp_path):
    make, result = trained("no average")
    file = train.ship(result, make, tmp_path / "small.safetensors")
    whole = file.read_bytes()

    def refused(words):
        with pytest.raises(train.Refused, match=words) as found:
            shipping.load_shipped(file)
        assert "\n" not in str(found.value)
        file.write_bytes(whole)

    file.write_bytes(whole[:-10])
    refused("damaged")
    file.write_bytes(b"{}")
    refused("damaged")
    at = len(whole) - 3
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused("does not fit its sha256")
    _changed(file, record=lambda text: text.replace('"latent_dim": 2', '"latent_dim": 3'))
    refused("does not fit its sha256")


def test_a_record_that_names_other_code_or_shapes_is_refused(trained, tmp_path):
    make, result = trained("no average")
    file = train.ship(result, make, tmp_path / "small.safetensors")
    whole = file.read_bytes()
    cases = {
        '["aigc_jax.vae", "make"]': ('["os", "system"]', "only functions named make"),
        '"latent_dim": 2': ('"latent_dim": 3', "can build.*shape"),
        '"hidden": [5]': ('"hidden": [5, 5]', "can build.*other names"),
        '"levels": 17': ('"levels": 1', "can build"),
    }
    for was, (now, words) in cases.items():
        file.write_bytes(whole)
        arrays, about = load_file(file), weights.header(file)
        assert was in about["record"]
        about["record"] = about["record"].replace(was, now)
        about["sha256"] = shipping._sha256(arrays, about["record"])
        save_file(arrays, file, about)
        with pytest.raises(train.Refused, match=words):
            shipping.load_shipped(file)


def test_what_float16_cannot_hold_is_refused_and_nothing_is_written(trained, tmp_path):
    make, result = trained("no average")
    for bad in (1e6, np.nan, np.inf):
        params = jax.tree.map(lambda x, bad=bad: x.at[0].set(bad), result.state.params)
        wrong = result._replace(state=result.state._replace(params=params))
        with pytest.raises(train.Refused, match="float16 cannot hold"):
            train.ship(wrong, make, tmp_path / "bad.safetensors")
    assert not list(tmp_path.glob("bad*"))


def test_the_classifiers_of_the_metrics_are_no_shipped_models():
    assert not {"digits", "mnist", "fashion_mnist"} & set(train.shipped())
    for name in train.shipped():
        assert json.loads(weights.header(weights.file_of(name))["record"])
