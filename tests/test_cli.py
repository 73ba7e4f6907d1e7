"""The command lines: what works, and one line with exit code 2 for a user's mistake."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from PIL import Image

from aigc_jax import __main__ as commands
from aigc_jax import data, ddpm, figures, gan, metrics, train, transformer, vae
from aigc_jax.commands import compare as compare_command
from aigc_jax.commands import sample as sample_command
from aigc_jax.core import Optim
from aigc_jax.data import music, prepare
from aigc_jax.data.text import Tokenizer
from aigc_jax.train import progress
from experiments import __main__ as experiments
from experiments import _cli, _record, jsb_chorales, vae_digits


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call("experiments.NAME" or "aigc_jax", flags...) -> (exit code, stdout, stderr), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(what, *flags):
        monkeypatch.setattr(sys, "argv", [what, *map(str, flags)])
        try:
            if what == "aigc_jax":
                commands.main()
            elif what == "experiments":
                experiments.main()
            else:
                _cli.main(what.removeprefix("experiments."))
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        out = capfd.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    old = sys.argv
    sys.argv = ["x", "--scale", "smoke", "--run.folder", str(folder), "--run.devices", "1"]
    try:
        _cli.main("vae_digits")
    finally:
        sys.argv = old
    return folder


@pytest.mark.slow
def test_smoke_run_draws_and_measures(digits_run):
    result = json.loads((digits_run / "rows.json").read_text())
    bound, marginal = result["rows"][:2]
    assert bound["verdict"].startswith("met") and bound["ours"] < marginal["ours"]
    assert abs(marginal["ours"] - 26.8) < 0.1
    assert result["scale"] == "smoke" and result["command"].endswith(
        "--scale smoke --run.devices 1"
    )
    with Image.open(digits_run / "vae_digits.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_sample_info_replay(call, digits_run, tmp_path):
    out = tmp_path / "samples.png"
    code, said, _ = call("aigc_jax", "sample", digits_run, "--n", 30, "--out", out)
    assert code == 0 and "wrote 30 samples" in said
    with Image.open(out) as picture:
        assert picture.size[0] >= 400 and np.asarray(picture).std() > 10
    code, said, _ = call("aigc_jax", "info", digits_run)
    assert code == 0 and "aigc_jax.vae.make" in said and "saved    step 600" in said
    line = next(r for r in train.metrics(digits_run) if "train" in r)
    code, said, _ = call("aigc_jax", "replay", digits_run, "--step", line["step"])
    assert code == 0 and repr(line["train"]["loss"]) in said


def test_evaluate_scores_the_recorded_set_and_other_parts(call, digits_run):
    code, said, _ = call("aigc_jax", "evaluate", digits_run)
    lines = [line["valid"] for line in train.metrics(digits_run) if "valid" in line]
    values = {
        name: float(value) for name, value in (line.split() for line in said.splitlines()[1:])
    }
    assert code == 0 and "digits train[1237:], 200 examples" in said
    assert (
        abs(values["nll_nats"] - min(line["nll_nats"] for line in lines)) < 0.5
    )  # other noise, the best checkpoint
    code, said, _ = call("aigc_jax", "evaluate", digits_run, "--split", "test")
    assert code == 0 and "digits test, 360 examples" in said
    expected = train.evaluate(train.load(digits_run), data.load("digits", "test"))
    assert f"{expected['nll_nats']:.6g}" in said


def test_evaluate_refuses_what_the_run_was_not_made_with(call, digits_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits_run, other)
    record = json.loads((other / "run.json").read_text())
    record["valid"]["fingerprint"] = "0" * 64
    (other / "run.json").write_text(json.dumps(record))
    code, _, err = call("aigc_jax", "evaluate", other)
    assert code == 2 and "its fingerprint is" in err and "not 00000000" in err
    record["valid"] = None
    (other / "run.json").write_text(json.dumps(record))
    code, _, err = call("aigc_jax", "evaluate", other)
    assert code == 2 and "name a part of its data with --split" in err


def test_exported_weights_are_those_that_sampling_uses(call, digits_run, tmp_path):
    from flax.traverse_util import unflatten_dict
    from safetensors import safe_open

    out = tmp_path / "vae.safetensors"
    code, said, _ = call("aigc_jax", "export", digits_run, out)
    assert code == 0 and "wrote 8 arrays" in said
    with safe_open(out, "np") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    result = train.load(digits_run)
    assert about["make"] == "aigc_jax.vae.make" and int(about["step"]) == int(result.state.step)
    assert json.loads(about["config"])["latent_dim"] == result.config.latent_dim
    params = unflatten_dict(weights, sep=".")
    z = jax.random.normal(jax.random.key(0), (3, result.config.latent_dim))
    np.testing.assert_array_equal(
        vae.decode(result.config, params, z), vae.decode(result.config, result.state.params, z)
    )


@pytest.mark.slow
def test_export_takes_the_average_and_sample_takes_a_label(call, tmp_path):
    from safetensors.numpy import load_file

    cfg = vae.Config(shape=(8, 8, 1), levels=17, classes=10, latent_dim=2, hidden=(5,), ema=0.5)
    folder = tmp_path / "run"
    state = train.fit(
        vae.make, cfg, train.Run(folder=str(folder), steps=3, batch_size=8), data.load("digits")
    ).state
    assert call("aigc_jax", "export", folder, tmp_path / "x.safetensors")[0] == 0
    weights = load_file(tmp_path / "x.safetensors")
    kernel = "encoder.params.Gaussian_0.Dense_0.kernel"
    np.testing.assert_array_equal(
        weights[kernel], state.ema["encoder"]["params"]["Gaussian_0"]["Dense_0"]["kernel"]
    )
    assert (
        weights[kernel] != state.params["encoder"]["params"]["Gaussian_0"]["Dense_0"]["kernel"]
    ).any()
    assert (
        call("aigc_jax", "sample", folder, "--n", 4, "--label", 3, "--out", tmp_path / "x.png")[0]
        == 0
    )
    code, _, err = call("aigc_jax", "sample", folder, "--label", 10, "--out", tmp_path / "y.png")
    assert code == 2 and "labels lie in 0..9, got 10" in err
    code, _, err = call("aigc_jax", "sample", folder, "--label", 3, "--n", 10**12)
    assert code == 2 and "n must lie in 1..4194304" in err  # before labels are made


@pytest.mark.slow
def test_a_diffusion_model_is_sampled_as_asked(call, digits_run, tmp_path):
    net = ddpm.NetConfig("mlp", (8,), dropout=0.0)
    cfg = ddpm.Config(
        shape=(8, 8, 1), levels=17, classes=10, T=30, net=net, ema=0.0, optim=Optim(lr=0.05)
    )
    run = train.Run(folder=str(tmp_path / "run"), steps=30, batch_size=64)
    result = train.fit(ddpm.make, cfg, run, data.load("digits"))
    out, seen = tmp_path / "x.png", []
    for flags in (
        [],
        ["--diffusion.sampler", "ddim", "--diffusion.steps", 5],
        ["--diffusion.w", 2.0],
    ):
        assert call("aigc_jax", "sample", run.folder, "--n", 4, "--out", out, *flags)[0] == 0
        seen.append(out.read_bytes())
    assert len(set(seen)) == 3
    for flags, words in (
        (["--diffusion.steps", 31], "must lie in 0..30"),
        (["--diffusion.eta", 0.5], "is of the sampler ddim, not of ddpm"),
        (["--diffusion.eta", 2.0, "--diffusion.sampler", "ddim"], "must lie in 0..1"),
    ):
        code, _, err = call("aigc_jax", "sample", result.folder, "--out", out, *flags)
        assert code == 2 and words in err
    code, _, err = call("aigc_jax", "sample", digits_run, "--out", out, "--diffusion.w", 1.0)
    assert code == 2 and "holds no diffusion model" in err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["sample", "{run}", "--out", "x.png", "--label", "1"], "takes no labels"),
        (["evaluate", "nowhere"], "no run folder"),
        (["evaluate", "{run}", "--split", "tset"], "no split 'tset'"),
        (
            ["evaluate", "{run}", "--batch-size", "0"],
            "batch_size must be a whole number and at least 1",
        ),
        (["export", "{run}", "x.npz"], ".safetensors file"),
        (["export", "{run}", "nowhere/x.safetensors"], "folder that exists"),
        (["export", "nowhere", "x.safetensors"], "no run folder"),
        (["sample", "{run}", "--out", "x.jpg"], ".png"),
        (["sample", "{run}", "--out", "nowhere/x.png"], "folder that exists"),
        (["sample", "{run}", "--out", "x.png", "--n", "0"], "at least 1"),
        (["sample", "nowhere", "--out", "x.png"], "no run folder"),
        (["sample", "{run}", "--out", "x.png", "--seed", "-1"], "seed"),
        (["info", "nowhere"], "no run folder"),
        (["replay", "{run}", "--step", "0"], "numbered 1..600"),
        (["replay", "{run}", "--step", "3", "--data.folder", "x"], "takes no folder"),
    ],
)
def test_mistakes_with_a_run_folder_are_one_line(call, digits_run, tmp_path, flags, words):
    code, out, err = call("aigc_jax", *[f.format(run=digits_run) for f in flags])
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("vae_digits", ["--run.stepz", "3"], "--run.stepz"),
        ("vae_digits", ["--run.steps", "-3"], "run.steps must be at least 1, got -3"),
        ("vae_digits", ["--run.steps", "many"], "many"),
        ("vae_digits", ["--model.latent-dim", "0"], "latent_dim must be at least 1, got 0"),
        ("vae_digits", ["--model.optim.lr", "-1"], "optim.lr must be at least 0, got -1"),
        ("vae_digits", ["--scale", "huge"], "huge"),
        ("vae_digits", ["--data.name", "digitz"], "unknown data set 'digitz'"),
        ("vae_digits", ["--data.name", "ring"], "not the slice"),
        ("vae_digits", ["--run.batch-size", "99"], "batch_size 99 does not divide by 8 devices"),
        ("vae_digits", ["--seeds", "0"], "seeds must be at least 1"),
        ("vae_digits", ["--scale", "smoke", "--record"], "a smoke run is no result"),
        ("vae_digits", ["--data.folder", "x", "--record"], "AIGC_DATA"),
        ("vae_manifold", ["--data.folder", "nowhere"], "there is no folder nowhere"),
        ("vae_manifold", ["--model.latent-dim", "3"], "latent-dim 2"),
        ("vae_manifold", [], "no network in this test"),
        ("vae_digits", ["--run.folder", ""], "needs a folder"),
        ("vae_digits", ["--run.seed", str(2**64)], "below 2**32"),
        ("vae_digits", ["--model.classes", "3"], "model.classes is 3, the images have 10 classes"),
        ("vae_digits", ["--model.levels", "16"], "model.levels is 16, the images have 17 levels"),
        ("vae_digits", ["--model.k", "0"], "k must be at least 1, got 0"),
        ("vae_digits", ["--model.channels", "4", "4", "4", "4"], "halve H and W 4 times"),
        ("vae_digits", ["--data.name", "images:nowhere"], "there is no folder nowhere"),
        ("vae_samples", ["--latents", "0"], "latents must be rising numbers from 1 on"),
        ("vae_elbo_curves", ["--model.classes", "10"], "wake-sleep is for model.classes 0 only"),
        ("vae_elbo_curves", ["--latents", "5", "3"], "latents must be rising"),
        ("iwae_table", ["--ks", "5", "1"], "ks must rise from 1"),
        ("iwae_table", ["--vae-ks", "0"], "numbers from 1 on"),
        ("iwae_table", ["--longer", "400", "200", "100"], "longer is for all ks but the largest"),
        ("iwae_table", ["--epochs", "0"], "epochs must be at least 1"),
        ("ppca_exact", ["--latents", "3"], "latents must be at least 5"),
        ("ppca_exact", ["--k", "1050"], "multiple of 100"),
    ],
)
def test_mistakes_of_an_experiment_are_said_and_leave_nothing(
    call, monkeypatch, tmp_path, name, flags, words
):
    def no_network(*args, **options):
        raise OSError("no network in this test")

    from tensorflow_datasets.core import constants

    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    monkeypatch.delenv("AIGC_DATA", raising=False)
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    code, out, err = call(f"experiments.{name}", *flags)
    assert code == 2, err
    assert words in " ".join(err.replace("│", " ").split()) and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_is_one_line_and_exit_code_1(call, tmp_path):
    code, _, err = call(
        "experiments.vae_digits",
        "--scale",
        "smoke",
        "--run.devices",
        1,
        "--model.optim.name",
        "sgd",
        "--model.optim.lr",
        "1e30",
    )
    last = err.strip().splitlines()[-1]
    assert (
        code == 1
        and last.startswith("error: step ")
        and "python -m aigc_jax replay runs/vae_digits-smoke --step" in last
    )
    assert "Traceback" not in err


def test_list_and_usage(call):
    code, out, _ = call("experiments", "list")
    assert code == 0 and all(name in out for name in experiments.names())
    code, _, err = call("experiments", "reproduce-everything")
    assert code == 2 and err.startswith("error: usage")


def test_rows_and_verdicts():
    row = _cli.Row("a", 3.0, error=0.1)
    assert _cli.verdict(row, {"a": "< 4"}) == "met: < 4"
    assert _cli.verdict(row, {"a": "< 2"}) == "not met: < 2"
    assert _cli.verdict(row, {}) == ""
    missed = row._replace(ours=_cli.NOT_REACHED)
    assert _cli.verdict(missed, {"a": "< 2"}) == "not met: < 2"
    assert _cli.verdict(row._replace(ours=None), {"a": "< 2"}) == "not measured: < 2"
    mean, error = _cli.mean_and_error([1.0, 2.0, 4.0])
    np.testing.assert_allclose((mean, error), (7 / 3, np.std([1, 2, 4], ddof=1) / 3**0.5))
    assert _cli.mean_and_error([5.0]) == (5.0, None)
    flags = [
        "--data.name",
        "fashion_mnist",
        "--model.hidden",
        "200",
        "100",
        "--seeds=3",
        "--run.steps",
        "9",
    ]
    kept = ["--model.hidden", "200", "100", "--run.steps", "9"]
    assert _record.without(flags, "--data.name", "--seeds") == kept
    assert _record.command("x", "paper", ["--run.folder", "/a", "--seeds", "3", "--folder=/b"]) == (
        "python -m experiments.x --scale paper --seeds 3"
    )


# -------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of 8x8 pictures: real ones, others of them sorted into splits and classes, noise, few, large."""
    root = tmp_path_factory.mktemp("pictures")
    image, label = (
        data.load("digits", "train[:500]").resident[0][name] for name in ("image", "label")
    )
    noise = np.random.default_rng(0).integers(0, 17, (60, 8, 8, 1))

    def write(name, pictures, places):
        for i, (picture, place) in enumerate(zip(pictures, places, strict=True)):
            path = root / name / place / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(picture[..., 0] / 16 * 255)).save(path)

    write("real", image[:300], [""] * 300)
    write(
        "sorted",
        image[300:],
        [f"{('train', 'test')[i % 2]}/{min(y, 3)}" for i, y in enumerate(label[300:])],
    )
    write("noise", noise, [""] * 60)
    write("few", image[:49], [""] * 49)
    write("large", image[:60].repeat(2, 1).repeat(2, 2), [""] * 60)
    return root


def table_of(said):
    """{quantity: [value, floor]} of what `compare` prints."""
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in said.splitlines()
        if line.startswith("│")
    ]
    return {name: [float(cell.split(" +- ")[0]) for cell in cells] for name, *cells in lines}


def test_compare_reads_every_picture_and_shows_the_floor(call, folders):
    code, said, err = call(
        "aigc_jax", "compare", folders / "real", folders / "sorted", "--features", "digits"
    )
    assert code == 0, err
    digest = metrics.load_classifier("digits").sha256[:12]
    assert f"150 pictures a side, 64 features: classifier digits, sha256 {digest}" in said
    assert "fewer than 640 pictures" in said
    found = table_of(said)
    assert len(found) == 7 and 0 < found["fid_digits"][0] < 4 * found["fid_digits"][1]
    assert (
        min(found["precision (k = 3)"] + found["recall (k = 3)"] + found["coverage (k = 5)"]) > 0.6
    )
    code, said, _ = call("aigc_jax", "compare", folders / "sorted", folders / "real", "--n", 100)
    assert (
        code == 0 and "100 pictures a side, 64 features: pixels in [0, 1]" in said
    )  # both splits: 200 pictures
    assert (
        call("aigc_jax", "compare", folders / "sorted", folders / "real")[1].splitlines()[1:]
        == said.splitlines()[1:]
    )
    assert call("aigc_jax", "compare", folders / "sorted", folders / "real", "--seed", 1)[1] != said


def test_compare_tells_noise_from_digits(call, folders):
    code, said, err = call("aigc_jax", "compare", folders / "real", folders / "noise")
    assert code == 0, err
    assert "60 pictures a side" in said
    found = table_of(said)
    assert (
        found["precision (k = 3)"][0]
        == found["coverage (k = 5)"][0]
        == 0
        < 0.6
        < found["precision (k = 3)"][1]
    )
    assert found["Frechet distance"][0] > 10 * found["Frechet distance"][1]
    assert found["kernel distance"][0] > 0.1 > abs(found["kernel distance"][1])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["real", "nowhere"], "there is no folder"),
        (["real", "few"], "holds 300 pictures, {root}/few 49: at least 100 and 50 are needed"),
        (["noise", "real"], "at least 100 and 50 are needed"),
        (["real", "large"], "{root}/real has 8 x 8 x 1, {root}/large 16 x 16 x 1"),
        (
            ["real", "sorted", "--features", "mnist"],
            "mnist takes pictures of 28 x 28 x 1, these are 8 x 8 x 1",
        ),
        (["real", "real"], "hold the same pictures"),
        (["real", "sorted", "--n", "151"], "n must lie in 50..150, got 151"),
        (["real", "sorted", "--n", "49"], "n must lie in 50..150, got 49"),
        (["real", "sorted", "--seed", "-1"], "seed must lie in 0..2**32 - 1, got -1"),
    ],
)
def test_mistakes_of_compare_are_one_line(call, folders, flags, words):
    code, out, err = call(
        "aigc_jax", "compare", *(folders / name for name in flags[:2]), *flags[2:]
    )
    assert code == 2 and out == ""
    assert (
        len(err.strip().splitlines()) == 1
        and err.startswith("error: ")
        and words.format(root=folders) in err
    )


def test_compare_takes_pictures_of_all_sizes_as_a_run_took_them(call, digits_run, tmp_path):
    """Splits of other classes and a picture beside folders: `compare` needs no labels."""
    rng = np.random.default_rng(0)
    for i in range(120):
        place = tmp_path / "own" / ("train/cat", "train/dog", "test/owl", "")[min(i % 40, 3)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i % 3, 8 + i % 5), dtype=np.uint8)).save(
            place / f"{i}.png"
        )
    training = data.load(f"images:{tmp_path}/own", size=8, labels=False)
    assert training.info.classes is None and training.info.examples == 120
    assert training.info.source["labels"] is False
    record = json.loads((digits_run / "run.json").read_text())
    record["data"]["source"] = training.info.source
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    for i in range(50):
        figures.save_image(tmp_path / "run" / "samples" / f"{i}.png", rng.random((8, 8, 1)))
    code, said, err = call("aigc_jax", "compare", "own", "run")
    assert code == 0 and "50 pictures a side, 64 features" in said, err
    code, _, err = call(
        "aigc_jax", "compare", "own", "run/samples", "--data.size", 4, "--features", "mnist"
    )
    assert code == 2 and "these are 4 x 4 x 1" in err
    code, _, err = call("aigc_jax", "compare", "own", "run/samples")  # says nothing of a size
    assert (
        code == 2
        and "(--data.size 32) to make all pictures 32 x 32" in err
        and len(err.splitlines()) == 1
    )
    code, _, err = call("aigc_jax", "compare", "own", "run", "--data.size", 0)
    assert code == 2 and "size must be a whole number of at least 1, got 0" in err


# --------------------------------------------------------------------------------------------- what `sample` writes


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """small_run(kind) -> the folder of a run of two updates: points of 3 numbers, rolls, text, a StyleGAN."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)

    def points3():
        net = gan.NetConfig("mlp", (4,))
        points = data.from_arrays({"points": rng.normal(size=(20, 3))})
        return gan.make, gan.Config(shape=(3,), gen=net, disc=net), points

    def roll():
        frames = jsb_chorales.Config(
            replace(jsb_chorales.NET, layers=1, width=8, heads=2, context=64)
        )
        pieces = data.from_arrays({"roll": (rng.random((8, 6, 88)) < 0.05).astype(np.uint8)})
        return jsb_chorales.make_frames, frames, pieces

    def text():
        (root / "own.txt").write_text("a line of text\n" * 40)
        lines = data.load(f"text:{root}/own.txt", "train", length=8)
        letters = transformer.Config(vocab=lines.info.levels, context=8, layers=1, heads=2, width=8)
        return transformer.make, letters, lines

    def style():
        nets = {"gen": gan.NetConfig("style", (4, 4)), "disc": gan.NetConfig("style", (4, 4))}
        cfg = gan.Config(shape=(8, 8, 1), levels=17, latent_dim=4, **nets)
        return gan.make, cfg, data.load("digits")

    @functools.cache
    def folder(kind):
        kinds = {"points3": points3, "roll": roll, "text": text, "style": style}
        make, cfg, training = kinds[kind]()
        train.fit(
            make,
            cfg,
            train.Run(folder=str(root / kind), steps=2, batch_size=8, devices=1),
            training,
        )
        return root / kind

    return folder


def drawn(folder, n, seed=0):
    """What `sample` draws, by train.sample."""
    result = train.load(folder)
    return train.sample(result, jax.random.split(jax.random.key(seed), 4)[3], n=n)


def test_sample_and_compare_work_without_out(call, digits_run, folders):
    for _ in range(2):  # the second time it replaces its own samples
        code, said, _ = call("aigc_jax", "sample", digits_run)
        assert (
            code == 0 and f"{digits_run}/samples.png and, one by one, {digits_run}/samples" in said
        )
    assert sorted(p.name for p in (digits_run / "samples").iterdir()) == [
        f"{i:05}.png" for i in range(64)
    ]
    for other in (digits_run / "samples", digits_run):
        code, said, err = call("aigc_jax", "compare", folders / "real", other)
        assert code == 0 and "64 pictures a side" in said, err
    (digits_run / "samples" / "mine.txt").touch()
    code, _, err = call("aigc_jax", "sample", digits_run)
    assert code == 2 and "holds other files than earlier samples" in err
    shutil.rmtree(digits_run / "samples")
    code, _, err = call("aigc_jax", "compare", folders / "real", digits_run)
    assert (
        code == 2 and f"draw its samples first, with python -m aigc_jax sample {digits_run}" in err
    )


def test_single_pictures_are_the_samples_pixel_by_pixel(call, digits_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in ("new", "empty"):
        assert call("aigc_jax", "sample", digits_run, "--n", 3, "--seed", 5, "--out", out)[0] == 0
        assert len(list((tmp_path / out).iterdir())) == 3
    assert call("aigc_jax", "sample", digits_run, "--n", 3, "--seed", 5, "--out", "x.npy")[0] == 0
    samples = drawn(digits_run, 3, seed=5)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), samples)
    for i, sample in enumerate(samples):
        with Image.open(tmp_path / "new" / f"{i:05}.png") as picture:
            assert picture.mode == "L"
            np.testing.assert_allclose(
                np.asarray(picture)[..., None] / 255, sample, atol=0.5001 / 255
            )
    code, _, err = call("aigc_jax", "sample", digits_run, "--out", "new")
    assert (
        code == 2
        and "new holds other files" in err
        and len(list((tmp_path / "new").iterdir())) == 3
    )


@pytest.mark.parametrize("out", ["new", "x.png"])
def test_samples_are_written_whole_or_not_at_all(call, digits_run, tmp_path, monkeypatch, out):
    class Full:
        """A disk that takes one more file."""

        left = 1 if out == "new" else 0

        def save(self, image, path, *options, **more):
            if not self.left:
                raise OSError(28, "No space left on device")
            self.left -= 1
            Path(path).touch()

    disk = Full()
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: disk.save(*args, **options))
    code, said, err = call("aigc_jax", "sample", digits_run, "--n", 3, "--out", out)
    assert code == 2 and err == "error: [Errno 28] No space left on device\n" and not said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_no_picture_can_show_is_written_as_numbers(call, small_run, tmp_path):
    run = small_run("points3")
    assert call("aigc_jax", "sample", run, "--n", 4)[0] == 0
    np.testing.assert_array_equal(np.load(run / "samples.npy"), drawn(run, 4))
    assert call("aigc_jax", "sample", run, "--n", 4, "--out", "new")[0] == 0
    singles = np.stack([np.load(tmp_path / "new" / f"{i:05}.npy") for i in range(4)])
    np.testing.assert_array_equal(singles, drawn(run, 4))
    code, _, err = call("aigc_jax", "sample", run, "--out", "x.png")
    assert code == 2 and "--out must name a .npy file or a folder" in err


def test_the_form_of_samples_follows_from_their_kind_and_shape(tmp_path):
    for kind, shape, form in (
        ("image", (8, 8, 1), ".png"),
        ("image", (8, 8, 3), ".png"),
        ("image", (8, 8, 2), ".npy"),
        ("image", (8, 8), ".npy"),
        ("points", (2,), ".png"),
        ("points", (1,), ".npy"),
        ("roll", (6, 88), ".mid"),
        ("roll", (6, 108), ".npy"),  # MIDI has 128 notes
        ("text", (9,), ".npy"),
        ("video", (8, 8, 1), ".npy"),
    ):
        assert sample_command._forms(kind, shape)[0] == form
    points = np.random.default_rng(0).normal(size=(50, 2))
    sample_command._write_all(tmp_path / "x", ".png", points, "a caption")
    with Image.open(tmp_path / "x") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.slow
def test_music_is_written_as_midi(call, small_run, tmp_path):
    import mido

    code, said, _ = call("aigc_jax", "sample", small_run("roll"))
    assert code == 0 and "wrote 1 samples" in said and (small_run("roll") / "samples.mid").exists()
    assert call("aigc_jax", "sample", small_run("roll"), "--n", 2, "--out", "two.mid")[0] == 0
    two = drawn(small_run("roll"), 2)
    both = np.concatenate(
        [two[0], np.zeros((4, 88)), two[1]]
    )  # a rest of four frames between the pieces
    back, now, on = np.zeros((len(both) + 1, 88)), 0, {}
    for message in mido.MidiFile(tmp_path / "two.mid").tracks[0]:
        now += message.time
        if message.type == "note_on":
            on[message.note] = now
        elif message.type == "note_off":
            back[on[message.note] // 480 : now // 480, message.note - 21] = 1
    np.testing.assert_array_equal(back[: len(both)], both)
    assert both.sum() > 10


@pytest.mark.slow
def test_text_is_written_to_a_file_as_to_the_terminal(call, small_run, tmp_path):
    flags = ("sample", small_run("text"), "--text.prompt", "a line")
    code, said, _ = call("aigc_jax", *flags)
    assert (
        code == 0 and said.startswith("a line") and len(said) == len("a line") + 3 + 1
    )  # as far as the context goes
    assert call("aigc_jax", *flags, "--out", "x.txt")[0] == 0
    assert (tmp_path / "x.txt").read_text() == said
    code, _, err = call("aigc_jax", *flags[:2], "--out", "x.png")
    assert code == 2 and "makes text: --out must name a .txt or .npy file" in err
    assert call("aigc_jax", *flags[:2], "--n", 2, "--out", "x.npy")[0] == 0
    assert np.load(tmp_path / "x.npy").dtype == np.int32
    code, _, err = call("aigc_jax", *flags, "--text.prompt", "no such letters: Q", "--out", "y.txt")
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "y.txt").exists()


@pytest.mark.slow
def test_truncation_of_a_style_generator(call, small_run, tmp_path):
    """0: all pictures show the mean style. 1: as without the flag."""
    flags = ("sample", small_run("style"), "--n", 3)
    for name, more in (("a", ()), ("b", ("--truncation", 1)), ("c", ("--truncation", 0))):
        assert call("aigc_jax", *flags, *more, "--out", f"{name}.npy")[0] == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - a[:1]).max() > 1e-3
    np.testing.assert_allclose(c, np.tile(c[:1], (3, 1, 1, 1)), atol=0.02)  # noise inputs differ
    for value in ("3", "nan"):
        code, _, err = call("aigc_jax", *flags, "--truncation", value, "--out", "d.npy")
        assert code == 2 and f"truncation must lie in -2..2, got {float(value)}" in err
    assert not (tmp_path / "d.npy").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--truncation", "0.5"], "--truncation is for a GAN with model.gen.kind style"),
        (["--n", str(10**12)], "n must lie in 1..4194304 (1 GiB of samples), got 1000000000000"),
        (["--chunk", "0"], "at least 1, got n=None, chunk=0"),
        (["--seed", str(2**32)], "seed must lie in 0..2**32 - 1"),
        (["--label", "-1"], "takes no labels"),
        (["--out", "file"], "file is a file"),
        (["--out", "."], "holds other files"),
        (["--out", "a/b"], "in a folder that exists"),
        (["--out", "x.mid"], "makes image: --out must name a .png or .npy file"),
        (["--text.new", "3"], "--text.* is for language models"),
    ],
)
def test_mistakes_of_sample_are_one_line(call, digits_run, tmp_path, flags, words):
    (tmp_path / "file").touch()
    code, out, err = call("aigc_jax", "sample", digits_run, *flags)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_home_is_found_where_the_shell_does_not_see_it(call, digits_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(digits_run)
    assert call("aigc_jax", "sample", "~/run", "--n", 2, "--out=~/x.png")[0] == 0
    assert (tmp_path / "x.png").exists()
    args = [
        "--run.folder",
        "~/a",
        "--data.name=images:~/b",
        "--prompt",
        "~/c",
        "--data.folder=~",
        "--run.steps",
        "3",
    ]
    home = str(tmp_path)
    assert _cli.expanded(args) == [
        "--run.folder",
        f"{home}/a",
        f"--data.name=images:{home}/b",
        "--prompt",
        "~/c",
        f"--data.folder={home}",
        "--run.steps",
        "3",
    ]


# -------------------------------------------------------------------------------------------------- doors of both lines


def test_every_function_that_reads_or_writes_a_file_finds_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    images = np.zeros((2, 4, 4, 1))
    figures.save_images("~/grid.png", images)
    figures.save_image("~/one.png", images[0])
    figures.save_animation("~/moving.gif", [images, images + 1])
    figures.save(figures.figure(1, 1, size=(2, 2))[0], "~/figure.png", "caption")
    music.write_midi("~/notes.mid", np.zeros((3, 88)))
    made = Tokenizer.bpe("some text", 256)
    made.save("~/tokenizer.json")
    assert Tokenizer.load("~/tokenizer.json").content == Tokenizer.gpt2("~").content == made.content
    cfg, params = transformer.load_gpt2(Path(__file__).parent / "golden" / "gpt2")
    transformer.save_gpt2("~/gpt2", cfg, params)
    assert transformer.load_gpt2(Path("~/gpt2"))[0] == cfg
    shutil.copy(metrics.WEIGHTS / "digits.safetensors", tmp_path / "home" / "mine.safetensors")
    assert metrics.load_classifier("~/mine.safetensors").shape == (8, 8, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert {"grid.png", "one.png", "moving.gif", "figure.png", "notes.mid", "gpt2"} <= set(
        os.listdir("home")
    )


def test_a_folder_of_runs_names_them(call, tmp_path):
    for i in range(23):
        (tmp_path / "runs" / f"arm{i:02}" / "seed0").mkdir(parents=True)
        (tmp_path / "runs" / f"arm{i:02}" / "seed0" / "run.json").write_text("{}")
    for flags in (["sample"], ["info"], ["evaluate"], ["export"], ["replay"]):
        more = {"export": ["x.safetensors"], "replay": ["--step", 1]}.get(flags[0], [])
        code, out, err = call("aigc_jax", *flags, "runs", *more)
        assert code == 2 and not out and len(err.splitlines()) == 1
        assert (
            "there are runs inside" in err
            and "arm00/seed0, arm01/seed0" in err
            and "arm19/seed0 and 3 more" in err
        )
    assert "it is a file" in call("aigc_jax", "info", "runs/arm00/seed0/run.json")[2]
    assert "there is no such folder" in call("aigc_jax", "info", "nowhere")[2]


def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(call, digits_run, monkeypatch):
    def broken(*args, **options):
        raise KeyError("of ours")

    monkeypatch.setattr(train, "load", broken)
    code, out, err = call("aigc_jax", "sample", digits_run)
    assert code == 1 and not out and len(err.splitlines()) == 1
    assert err.startswith("error: KeyError: 'of ours' (its traceback is in ")
    file = Path(err.rpartition(" ")[2].strip().removesuffix(")"))
    assert "in broken" in file.read_text()
    file.unlink()


@pytest.mark.slow
def test_a_reader_who_leaves_is_no_error():
    """As in `... | head`: the pipe is closed from the start, so that every write meets it."""
    read, write = os.pipe()
    os.close(read)
    lines = (["aigc_jax", "--help"], ["experiments.vae_digits", "--help"], ["experiments"])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *line], stdout=write, stderr=subprocess.PIPE, text=True
        )
        for line in lines
    ]
    os.close(write)
    for process in started:
        assert process.communicate()[1] == "" and process.returncode == 141


@pytest.mark.parametrize("code, wanted", [(None, 2), (0, 2), (1, 1)])
def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys, code, wanted):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended, commands.quiet_pipe():
            print("a result")
            if code is not None:
                sys.exit(code)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == wanted and len(said) == (
        code != 1
    )  # what failed before has been said


def test_without_a_standard_output_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended, commands.quiet_pipe():
        raise AssertionError("nothing begins")
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and "closed" in said[0]


def test_what_is_compiled_is_kept_for_both_command_lines(call, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = jax.config.jax_compilation_cache_dir
    try:
        for line in (
            ["aigc_jax", "info", "nowhere"],
            ["experiments.vae_digits", "--run.folder", ""],
        ):
            jax.config.update("jax_compilation_cache_dir", None)
            call(*line)
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "aigc_jax")
        jax.config.update("jax_compilation_cache_dir", "mine")
        call("aigc_jax", "info", "nowhere")
        assert jax.config.jax_compilation_cache_dir == "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", old)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def test_long_loops_say_how_far_they_are(capsys, monkeypatch, digits_run):
    assert (
        list(progress.counted("measuring", [5, 6, 7])) == [5, 6, 7]
        and capsys.readouterr().err == ""
    )
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    result = train.load(digits_run)
    train.sample(result, jax.random.key(0), n=5, chunk=2)
    assert capsys.readouterr().err.splitlines() == [
        "sampling: 1/3",
        "sampling: 2/3",
        "sampling: 3/3",
    ]
    train.evaluate(result, data.load("digits", "test"), batch_size=200)
    assert capsys.readouterr().err.splitlines() == ["evaluating: 1/2", "evaluating: 2/2"]


def test_the_short_list_has_every_script_with_its_recorded_minutes(call):
    code, out, _ = call("experiments")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert code == 0 and set(experiments.names()) <= set(lines)
    for file in _cli.RESULTS.glob("*.json"):
        record = json.loads(file.read_text())
        taken = record["seconds"] / 60
        shown = ("under 1" if taken < 1 else f"{taken:.0f}") + "+" * record["continued"]
        if shown == "under 1+":  # it measured what earlier processes had trained
            shown = "-"
        assert f" {shown} " in lines[record["name"]]
        assert ("(paper)" in lines[record["name"]]) == (record["scale"] == "paper")
    assert "MNIST (12 MB)" in lines["vae_manifold"] and "--weights FOLDER" in lines["gpt2"]
    families = {
        name: line for line, name in enumerate(out.splitlines()) if name in ("vae", "gan", "ddpm")
    }
    assert families["vae"] < out.splitlines().index(lines["iwae_longer"]) < families["gan"]
    code, _, err = call("experiments", "vae_digitz")
    assert code == 2 and "did you mean vae_digits" in err and len(err.splitlines()) == 1
    code, _, err = call("experiments", "vae_digits", "--scale", "smoke")
    assert code == 2 and "runs as python -m experiments.vae_digits --scale smoke" in err


def test_help_shows_the_scale_among_the_flags(call):
    code, out, _ = call("experiments.vae_manifold", "--help")
    assert (
        code == 0
        and "--scale {smoke,cpu,paper}" in out
        and "(default: cpu)" in out
        and "--record" in out
    )
    code, _, err = call("experiments.vae_manifold", "--run.steps", 3, "--scale", "huge")
    assert (
        code == 2
        and "'huge'" in err
        and "('smoke', 'cpu', 'paper')" in " ".join(err.replace("│", " ").split())
    )


# ---------------------------------------------------------------------------------------- a script that fails, or forks


@dataclass(frozen=True)
class Toy:
    """Flags of the toy."""

    folder: str = "toy"
    size: int = 1


@pytest.fixture
def toy(monkeypatch, call):
    """toy(rows, *flags, **names) -> (exit code, stdout, stderr) of a script with these rows; rows.json in `toy`."""

    def run(rows, *flags, **names):
        module = ModuleType(
            "experiments.toy", "A toy\n\n    python -m experiments.toy    downloads nothing\n"
        )
        scales = {"smoke": _cli.Scale(Toy("toy-smoke")), "cpu": _cli.Scale(Toy())}
        module.__dict__.update(SCALES=scales, INVARIANTS={}, run=rows)
        module.__dict__.update({"CRITERIA": {"a": "< 2", "b": "> 0"}, **names})
        monkeypatch.setitem(sys.modules, "experiments.toy", module)
        return call("experiments.toy", *flags)

    return run


def begun(folder):
    """What fit leaves of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")


def verdicts(folder):
    return {
        row["quantity"]: row["verdict"]
        for row in json.loads((folder / "rows.json").read_text())["rows"]
    }


def test_a_row_that_cannot_be_measured_says_why_and_costs_no_other(toy, tmp_path):
    def rows(setup, folder):
        begun(folder)
        with _cli.costs("b", "toy.png"):
            raise ValueError("6-grams of 4533 tokens\ndo not fit")
        return [_cli.Row("a", 1.0), _cli.Row("c", None, reason="needs our classifier")]

    code, out, err = toy(rows)
    assert code == 0 and err == ""
    assert verdicts(tmp_path / "toy") == {
        "a": "met: < 2",
        "c": "not measured: needs our classifier",
        "b": "not measured: 6-grams of 4533 tokens do not fit",
        "toy.png": "not measured: 6-grams of 4533 tokens do not fit",
    }
    assert "needs our classifier" in out
    row = json.loads((tmp_path / "toy" / "rows.json").read_text())["rows"]
    assert row[1]["reason"] == "needs our classifier" and "reason" not in row[0]
    assert toy(rows, "--scale", "smoke")[0] == 1  # in CI nothing may be missing


def test_brackets_in_a_table_are_no_markup(toy, capfd, tmp_path):
    """Of rich's markup [/INST] would be an error and [red] a colour."""

    def rows(setup, folder):
        begun(folder)
        return [
            _cli.Row("a", 1.0),
            _cli.Row("b", 1),
            _cli.Row("[red]c", None, reason="the text has no [/INST]"),
        ]

    code, out, err = toy(rows)
    assert code == 0 and err == "" and "[red]c" in out and "[/INST]" in out
    assert verdicts(tmp_path / "toy")["[red]c"] == "not measured: the text has no [/INST]"
    compare_command._show_scores([{"recall": (1.0,)}], "a[red]/b against c[/x]", "pixels")
    assert "a[red]/b against c[/x]" in capfd.readouterr().out


def test_a_fault_in_a_measurement_keeps_its_traceback_in_the_folder(toy, tmp_path):
    def rows(setup, folder):
        begun(folder)

        @_cli.costs("toy.png")
        def draw():
            return {}["nothing"]

        draw()
        return [_cli.Row("a", 3.0), _cli.Row("b", 1)]

    code, out, err = toy(rows)
    assert code == 1 and "Traceback" not in out + err and f"is in toy{os.sep}error.txt" in err
    assert err.splitlines()[-1] == "error: KeyError: 'nothing'"
    assert "in draw" in (tmp_path / "toy" / "error.txt").read_text()
    assert verdicts(tmp_path / "toy") == {
        "a": "not met: < 2",
        "b": "met: > 0",
        "toy.png": "not measured: KeyError: 'nothing'",
    }


@pytest.mark.parametrize(
    "error, words",
    [
        (train.NonFinite("step 7: loss = nan"), "step 7: loss = nan"),
        (train.SaveFailed("the disk is full"), "the disk is full"),
        (train.Refused("no intact checkpoint"), "no intact checkpoint"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_what_ends_a_script_after_training_leaves_its_rows(toy, tmp_path, error, words):
    def rows(setup, folder):
        begun(folder / "arm1")
        found = _cli.kept()
        found += [_cli.Row("a", 1.0), _cli.Row("beside", 5)]
        with _cli.costs("beside", "lost"):
            raise ValueError("later")
        raise error

    code, out, err = toy(rows)
    assert code == 1 and "Traceback" not in out + err
    assert err.splitlines()[-1] == f"error: {words.strip()}"
    assert (tmp_path / "toy" / "error.txt").exists() == isinstance(
        error, ZeroDivisionError | MemoryError
    )
    found = verdicts(tmp_path / "toy")
    assert found == {
        "a": "met: < 2",
        "beside": "",
        "lost": "not measured: later",
        "b": f"not measured: {words.strip()}",
    }
    assert (
        len(json.loads((tmp_path / "toy" / "rows.json").read_text())["rows"]) == 4 and "lost" in out
    )


@pytest.mark.parametrize(
    "error, code",
    [
        (train.Refused("no"), 2),
        (FileNotFoundError(2, "no"), 2),
        (PermissionError(13, "no"), 2),
        (OSError("no"), 1),
        (TypeError("no"), 1),
    ],
)
def test_what_ends_a_script_before_training_leaves_nothing(toy, tmp_path, error, code):
    def rows(setup, folder):
        raise error

    began = tmp_path / "toy" / "old"
    begun(began)  # what an earlier start left is no training of this one
    assert toy(rows)[0] == code
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["old"]


def test_an_interrupted_script_writes_no_rows(toy, tmp_path):
    def rows(setup, folder):
        begun(folder)
        with _cli.costs("a"):
            raise SystemExit("stopped by SIGTERM at step 3")

    assert toy(rows)[0] == 1
    assert not (tmp_path / "toy" / "rows.json").exists()


def test_outside_of_main_nothing_is_caught():
    with pytest.raises(KeyError), _cli.costs("a"):
        raise KeyError("a")
    assert _cli.kept() == []


def test_a_figure_that_fails_costs_a_real_script_nothing_else(
    call, monkeypatch, digits_run, tmp_path
):
    def broken(*args, **options):
        raise ValueError("no such font")

    shutil.copytree(digits_run, tmp_path / "run")  # complete, so that only the measuring is left
    (tmp_path / "run" / "rows.json").unlink()
    monkeypatch.setattr(figures, "save", broken)
    code, _, err = call(
        "experiments.vae_digits", "--scale", "smoke", "--run.devices", 1, "--run.folder", "run"
    )
    found = verdicts(tmp_path / "run")
    assert code == 1 and "error" not in err  # in CI no row may be missing
    assert found.pop("vae_digits.png") == "not measured: no such font"
    assert len(found) == 3 and found[vae_digits.BOUND].startswith("met")


def test_the_scale_works_wherever_it_stands(toy, tmp_path):
    def rows(setup, folder):
        folder.mkdir(exist_ok=True)
        return [_cli.Row("a", setup.size), _cli.Row("b", 1)]

    for flags in (
        ["--scale", "smoke", "--size", "7"],
        ["--size", "7", "--scale", "smoke"],
        ["--size=7", "--scale=smoke"],
    ):
        assert toy(rows, *flags)[0] == 0
        result = json.loads((tmp_path / "toy-smoke" / "rows.json").read_text())
        assert result["scale"] == "smoke" and result["rows"][0]["ours"] == 7
        assert result["command"].startswith("python -m experiments.toy --scale smoke --size")
    assert toy(rows, "--scale")[0] == 2


def test_a_script_may_have_several_sets_of_scales(toy, tmp_path):
    """The convention of experiments.own_pictures: FIRST names a flag and its choices, scales(choice) its SCALES."""

    def rows(setup, folder):
        folder.mkdir(exist_ok=True)
        return [_cli.Row("a", setup.size), _cli.Row("b", 1)]

    def scales(family):
        size = {"vae": 10, "gan": 20}[family]
        return {"smoke": _cli.Scale(Toy("toy", size)), "cpu": _cli.Scale(Toy("toy", size + 1))}

    names = {"FIRST": {"family": ("vae", "gan")}, "scales": scales}
    for flags, size, command in (
        ([], 11, ""),
        (["--family", "gan"], 21, " --family=gan"),
        (["--scale", "smoke", "--family=gan"], 20, " --scale smoke --family=gan"),
        (["--size", "3", "--family", "vae"], 3, " --size 3"),
    ):
        assert toy(rows, *flags, **names)[0] == 0
        result = json.loads((tmp_path / "toy" / "rows.json").read_text())
        assert (
            result["rows"][0]["ours"] == size
            and result["command"] == f"python -m experiments.toy{command}"
        )
    code, out, _ = toy(rows, "--help", "--family", "gan", **names)
    assert code == 0 and "--family {vae,gan}" in out and "(default: 21)" in out
    code, _, err = toy(rows, "--family", "ddpm", **names)
    assert code == 2 and "('vae', 'gan')" in " ".join(err.replace("│", " ").split())
