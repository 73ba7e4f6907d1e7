"""`python -m experiments plan`: batches from configs alone, every script's models, mistakes."""

import importlib

import jax
import numpy as np
import pytest

from aigc_jax import contrastive, data, ddpm, gan, transformer, vae
from experiments import __main__ as commands
from experiments import _catalog, _plan

PICTURE = {"shape": (8, 8, 1), "levels": 17}


@pytest.mark.parametrize(
    ("cfg", "source"),
    [
        (vae.Config(**PICTURE), "digits"),
        (vae.Config(**PICTURE, classes=10, binarisation="static"), "digits"),
        (vae.AutoencoderConfig(**PICTURE), "digits"),
        (vae.VQConfig(**PICTURE), "digits"),
        (gan.Config(**PICTURE, classes=10), "digits"),
        (gan.Config(shape=(2,)), "ring"),
        (ddpm.Config(**PICTURE, classes=10), "digits"),
        (ddpm.Config(shape=(2,), net=ddpm.NetConfig("mlp", (8,))), "ring"),
    ],
)
def test_a_batch_is_told_from_the_config_alone(cfg, source):
    given = data.load(source).batch(0, 0, 6)
    batch = _plan.batch_of(cfg, 6)
    for name, rows in batch.items():
        assert (rows.shape, rows.dtype) == (given[name].shape, given[name].dtype)
    assert ("label" in batch) == bool(getattr(cfg, "classes", 0))
    assert ("index" in batch) == (getattr(cfg, "binarisation", None) == "static")


def test_batches_of_pairs_contexts_and_texts():
    pair = data.pair(data.load("digits"), data.load("digits"), aligned=True).batch(0, 0, 3)
    for name, rows in _plan.batch_of(gan.CycleConfig(**PICTURE, disc_widths=(4, 4)), 3).items():
        assert (rows.shape, rows.dtype) == (pair[name].shape, pair[name].dtype)
    dit = ddpm.NetConfig("dit", (8,), heads=2)
    shapes = {
        n: x.shape for n, x in _plan.batch_of(ddpm.Config((4, 4, 2), None, net=dit), 3).items()
    }
    assert shapes == {"points": (3, 4, 4, 2)}
    latents = ddpm.Config(shape=(4, 4, 2), levels=None, context=(3, 5), net=dit)
    assert _plan.batch_of(latents, 3)["context"].shape == (3, 3, 5)
    text = _plan.batch_of(transformer.Config(vocab=12, context=8), 3)["tokens"]
    assert (text.shape, text.dtype) == ((3, 9), np.int32)
    assert _plan.batch_of(ddpm.TokenConfig(vocab=12, context=8), 3)["tokens"].shape == (3, 8)
    caption = contrastive.TextConfig(vocab=12, context=4, width=8, layers=1, heads=2)
    captioned = _plan.batch_of(contrastive.Config(**PICTURE, text=caption), 3)
    assert captioned["tokens"].shape == (3, 4) and captioned["image"].shape == (3, 8, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", _catalog.names())
def test_the_step_of_every_scripts_models_takes_such_a_batch(name):
    setup = importlib.import_module(f"experiments.{name}").SCALES["smoke"].setup
    for cfg in _plan.models(setup).values():
        family = _plan.MAKES[type(cfg)](cfg)
        state = jax.eval_shape(family.init, jax.random.key(0))
        batch = _plan.batch_of(cfg, setup.run.batch_size)
        after, metrics = jax.eval_shape(family.step, state, batch, jax.random.key(1))
        assert after.step.shape == () and metrics


def test_the_command_prints_a_plan(capsys):
    _plan.main(["vae_digits", "--scale", "smoke", "--topology", "cpu:4"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "model    model of vae_digits, scale smoke"
    assert said[1].startswith("devices  4 of cpu:4 as data=4")
    assert said[2] == "batch    100 examples over all devices"


def test_a_model_whose_batch_is_not_told_is_named(capsys, monkeypatch):
    monkeypatch.setattr(_plan, "report", lambda *_: True)  # what is planned is tested above
    _plan.main(["language_models", "--scale", "smoke"])
    said = capsys.readouterr().out
    assert "model    transformer of language_models, scale smoke" in said
    assert "model    lstm of language_models is not planned: its config tells no batch" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("no_such", "there is no script no_such"),
        ("vae_digits --scale paper", "vae_digits has no scale paper, only smoke, cpu"),
        ("iwae_table", "the configs of iwae_table do not tell the batches"),
        ("vae_digits --topology tpu", "topology must be cpu:N"),
        (
            "vae_digits --batch-size 7",
            "a batch of 7 does not divide by 4 devices; one of 8 (batch_size) does",
        ),
        ("vae_digits --batch-size 0", "batch_size must be at least 1, got 0"),
        ("vae_digits --mesh data=3", "mesh data=3 has 3 devices, the topology 4"),
        ("vae_digits --mesh data=2,model=2", "this model has no layers to share"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", "plan", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and len(err.splitlines()) == 1
