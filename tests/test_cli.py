"""The command lines: what works, and one line with exit code 2 for a user's mistake."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from aigc_jax import __main__ as commands
from aigc_jax import data, ddpm, metrics, train, vae
from aigc_jax.core import Optim
from aigc_jax.data import prepare
from experiments import __main__ as experiments
from experiments import _cli


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


def test_smoke_run_draws_and_measures(digits_run):
    result = json.loads((digits_run / "rows.json").read_text())
    bound, marginal = result["rows"][:2]
    assert bound["verdict"].startswith("holds") and bound["ours"] < marginal["ours"]
    assert abs(marginal["ours"] - 26.8) < 0.1
    assert result["scale"] == "smoke" and result["command"].endswith("--scale smoke --run.devices 1")
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
    values = {name: float(value) for name, value in (line.split() for line in said.splitlines()[1:])}
    assert code == 0 and "digits train[1237:], 200 examples" in said
    assert abs(values["nll_nats"] - min(line["nll_nats"] for line in lines)) < 0.5  # other noise, the best checkpoint
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


def test_export_takes_the_average_and_sample_takes_a_label(call, tmp_path):
    from safetensors.numpy import load_file

    cfg = vae.Config(shape=(8, 8, 1), levels=17, classes=10, latent_dim=2, hidden=(5,), ema=0.5)
    folder = tmp_path / "run"
    state = train.fit(vae.make, cfg, train.Run(folder=str(folder), steps=3, batch_size=8), data.load("digits")).state
    assert call("aigc_jax", "export", folder, tmp_path / "x.safetensors")[0] == 0
    weights = load_file(tmp_path / "x.safetensors")
    kernel = "encoder.params.Gaussian_0.Dense_0.kernel"
    np.testing.assert_array_equal(weights[kernel], state.ema["encoder"]["params"]["Gaussian_0"]["Dense_0"]["kernel"])
    assert (weights[kernel] != state.params["encoder"]["params"]["Gaussian_0"]["Dense_0"]["kernel"]).any()
    assert call("aigc_jax", "sample", folder, "--n", 4, "--label", 3, "--out", tmp_path / "x.png")[0] == 0
    code, _, err = call("aigc_jax", "sample", folder, "--label", 10, "--out", tmp_path / "y.png")
    assert code == 2 and "labels lie in 0..9, got 10" in err


def test_a_diffusion_model_is_sampled_as_asked(call, digits_run, tmp_path):
    net = ddpm.Net("mlp", (8,), dropout=0.0)
    cfg = ddpm.Config(shape=(8, 8, 1), levels=17, classes=10, T=30, net=net, ema=0.0, optim=Optim(lr=0.05))
    run = train.Run(folder=str(tmp_path / "run"), steps=30, batch_size=64)
    result = train.fit(ddpm.make, cfg, run, data.load("digits"))
    out, seen = tmp_path / "x.png", []
    for flags in ([], ["--diffusion.sampler", "ddim", "--diffusion.steps", 5], ["--diffusion.w", 2.0]):
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
        (["evaluate", "{run}", "--batch-size", "0"], "batch_size must be at least 1"),
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
        ("vae_digits", ["--model.optim.lr", "-1"], "lr must not be negative"),
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
def test_mistakes_of_an_experiment_are_said_and_leave_nothing(call, monkeypatch, tmp_path, name, flags, words):
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
    code, _, err = call("experiments.vae_digits", "--scale", "smoke", "--run.devices", 1, "--model.optim.name", "sgd",
                        "--model.optim.lr", "1e30")  # fmt: skip
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
    assert _cli.verdict(row, {"a": ("< 4", lambda v: v < 4)}) == "holds: < 4"
    assert _cli.verdict(row, {"a": ("< 2", lambda v: v < 2)}) == "FAILS: < 2"
    assert _cli.verdict(row, {}) == ""
    missed = row._replace(ours=_cli.NOT_REACHED)
    assert _cli.verdict(missed, {"a": ("< 2", lambda v: v < 2)}) == "FAILS: < 2"
    assert _cli.verdict(row._replace(ours=None), {"a": ("< 2", lambda v: v < 2)}) == "not measured: < 2"
    mean, error = _cli.mean_and_error([1.0, 2.0, 4.0])
    np.testing.assert_allclose((mean, error), (7 / 3, np.std([1, 2, 4], ddof=1) / 3**0.5))
    assert _cli.mean_and_error([5.0]) == (5.0, None)
    flags = ["--data.name", "fashion_mnist", "--model.hidden", "200", "100", "--seeds=3", "--run.steps", "9"]
    kept = ["--model.hidden", "200", "100", "--run.steps", "9"]
    assert _cli.without(flags, "--data.name", "--seeds") == kept
    assert _cli.command("x", "paper", ["--run.folder", "/a", "--seeds", "3", "--folder=/b"]) == (
        "python -m experiments.x --scale paper --seeds 3"
    )


# -------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of 8x8 pictures: real ones, others of them sorted into splits and classes, noise, few, large."""
    root = tmp_path_factory.mktemp("pictures")
    image, label = (data.load("digits", "train[:500]").resident[0][name] for name in ("image", "label"))
    noise = np.random.default_rng(0).integers(0, 17, (60, 8, 8, 1))

    def write(name, pictures, places):
        for i, (picture, place) in enumerate(zip(pictures, places, strict=True)):
            path = root / name / place / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(picture[..., 0] / 16 * 255)).save(path)

    write("real", image[:300], [""] * 300)
    write("sorted", image[300:], [f"{('train', 'test')[i % 2]}/{min(y, 3)}" for i, y in enumerate(label[300:])])
    write("noise", noise, [""] * 60)
    write("few", image[:49], [""] * 49)
    write("large", image[:60].repeat(2, 1).repeat(2, 2), [""] * 60)
    return root


def table_of(said):
    """{quantity: [value, floor]} of what `compare` prints."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    return {name: [float(cell.split(" +- ")[0]) for cell in cells] for name, *cells in lines}


def test_compare_reads_every_picture_and_shows_the_floor(call, folders):
    code, said, err = call("aigc_jax", "compare", folders / "real", folders / "sorted", "--features", "digits")
    assert code == 0, err
    digest = metrics.load_classifier("digits").sha256[:12]
    assert f"150 pictures a side, 64 features: classifier digits, sha256 {digest}" in said
    assert "fewer than 640 pictures" in said
    found = table_of(said)
    assert len(found) == 7 and 0 < found["fid_digits"][0] < 4 * found["fid_digits"][1]
    assert min(found["precision (k = 3)"] + found["recall (k = 3)"] + found["coverage (k = 5)"]) > 0.6
    code, said, _ = call("aigc_jax", "compare", folders / "sorted", folders / "real", "--n", 100)
    assert code == 0 and "100 pictures a side, 64 features: pixels in [0, 1]" in said  # both splits: 200 pictures
    assert (
        call("aigc_jax", "compare", folders / "sorted", folders / "real")[1].splitlines()[1:] == said.splitlines()[1:]
    )
    assert call("aigc_jax", "compare", folders / "sorted", folders / "real", "--seed", 1)[1] != said


def test_compare_tells_noise_from_digits(call, folders):
    code, said, err = call("aigc_jax", "compare", folders / "real", folders / "noise")
    assert code == 0, err
    assert "60 pictures a side" in said
    found = table_of(said)
    assert found["precision (k = 3)"][0] == found["coverage (k = 5)"][0] == 0 < 0.6 < found["precision (k = 3)"][1]
    assert found["Frechet distance"][0] > 10 * found["Frechet distance"][1]
    assert found["kernel distance"][0] > 0.1 > abs(found["kernel distance"][1])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["real", "nowhere"], "there is no folder"),
        (["real", "few"], "holds 300 pictures, {root}/few 49: at least 100 and 50 are needed"),
        (["noise", "real"], "at least 100 and 50 are needed"),
        (["real", "large"], "{root}/real has 8 x 8 x 1, {root}/large 16 x 16 x 1"),
        (["real", "sorted", "--features", "mnist"], "mnist takes pictures of 28 x 28 x 1, these are 8 x 8 x 1"),
        (["real", "real"], "hold the same pictures"),
        (["real", "sorted", "--n", "151"], "n must lie in 50..150, got 151"),
        (["real", "sorted", "--n", "49"], "n must lie in 50..150, got 49"),
        (["real", "sorted", "--seed", "-1"], "seed must lie in 0..2**32 - 1, got -1"),
    ],
)
def test_mistakes_of_compare_are_one_line(call, folders, flags, words):
    code, out, err = call("aigc_jax", "compare", *(folders / name for name in flags[:2]), *flags[2:])
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and words.format(root=folders) in err
