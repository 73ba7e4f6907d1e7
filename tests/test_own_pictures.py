"""Own pictures through the scripts: how they are cut, what is taken from them, what is refused before training."""

import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from aigc_jax import data, figures, metrics, train
from experiments import _cli, _pictures, own_pictures, vdm_invariance
from experiments._cli import Source


def write(folder, n, size=(12, 12), mode="L"):
    """n pictures of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        rng = np.random.default_rng([i, len(folder.name), ord(folder.name[0])])
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """200 pictures without classes."""
    return f"images:{write(tmp_path_factory.mktemp('flat') / 'all', 200)}"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """200 pictures in three classes, in colour."""
    root = tmp_path_factory.mktemp("classes")
    for name, n in (("a", 66), ("b", 67), ("c", 67)):
        write(root / name, n, mode="RGB")
    return f"images:{root}"


# --------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    "splits, watched, expected",
    [
        ("train", True, ["train[:80%]", "train[80%:90%]", "train[90%:]"]),
        ("train", False, ["train[:90%]", "train[90%:]"]),
        ("train test", True, ["train[:90%]", "train[90%:]", "test"]),
        ("train test", False, ["train", "test"]),
        ("train validation", True, ["train[:90%]", "train[90%:]", "validation"]),
        ("train validation", False, ["train", "validation"]),
        ("train validation test", True, ["train", "validation", "test"]),
        ("train validation test", False, ["train", "test"]),
    ],
)
def test_own_pictures_are_cut_by_shares(splits, watched, expected):
    sizes = dict.fromkeys(splits.split(), 100)
    assert _pictures.shares("x", sizes, watched=watched) == expected


@pytest.mark.parametrize(
    "splits, expected",
    [
        ("train", ["train[:60]", "train[60:80]", "train[80:]"]),
        ("train test", ["train[:60]", "train[60:]", "test"]),
        ("train validation test", ["train[:60]", "validation", "test"]),
    ],
)
def test_a_number_to_train_on_is_kept(splits, expected):
    sizes = dict.fromkeys(splits.split(), 100)
    assert _pictures.shares("x", sizes, watched=True, training=60) == expected


def test_a_number_to_train_on_leaves_something():
    for training in (0, -5, 100, 1237):
        with pytest.raises(ValueError, match=f"training must lie in 1..99 .* got {training}"):
            _pictures.shares("x", {"train": 100}, watched=True, training=training)


def test_parts_share_no_picture_and_hold_all(flat, capfd):
    found = _pictures.parts(Source(flat), "train[:7]", "train[7:]", "test")
    pictures = [{x.tobytes() for x in part.resident[0]["image"]} for part in found]
    assert [len(p) for p in pictures] == [160, 20, 20] and len(set.union(*pictures)) == 200
    [line] = capfd.readouterr().err.splitlines()
    assert line.endswith("train[:80%] (160), train[80%:90%] (20), train[90%:] (20)")


class Told(Source):
    """What a script asks a named set for."""

    def load(self, split, **options):
        return split


@pytest.mark.parametrize(
    "name, n", [("digits", 1237), ("mnist", 50_000), ("fashion_mnist", 50_000)]
)
def test_named_sets_keep_their_slices(name, n):
    assert _pictures.three(Told(name), None, 50_000) == [f"train[:{n}]", f"train[{n}:]", "test"]
    assert _pictures.three(Told(name), 600, 50_000) == ["train[:600]", "train[600:]", "test"]
    assert (
        _pictures.parts(Told(name), "train[:55000]", "train[55000:]", "test")[1] == "train[55000:]"
    )


def test_sets_too_small_to_measure_are_refused(tmp_path):
    for n, words in (
        (60, "60 pictures, 6 of them in train.80%:90%.: at least 10"),
        (1, "empty|at least 10"),
    ):
        write(tmp_path / str(n), n)
        with pytest.raises(ValueError, match=words):
            _pictures.parts(Source(f"images:{tmp_path / str(n)}"), "a", "b", "test")
    write(tmp_path / "only" / "test", 20)
    with pytest.raises(ValueError, match="has the splits test and no train"):
        _pictures.parts(Source(f"images:{tmp_path / 'only'}"), "a", "b", "test")


def test_sets_that_stay_on_disk_are_refused(flat, monkeypatch):
    monkeypatch.setattr(data.pictures, "RESIDENT_BYTES", 100)
    with pytest.raises(ValueError, match="takes more than 2 GiB: make it smaller with --data.size"):
        _pictures.parts(Source(flat), "train", "test")


# ------------------------------------------------------------------------------------------------------- every script


class Reached(Exception):
    """What a script was about to train."""


def reach(name, source, tmp_path, monkeypatch, **change):
    """(make, config, training, valid) that the script hands to `fit`, which does not train."""
    script = importlib.import_module(f"experiments.{name}")

    def fit(make, cfg, run, training, **options):
        raise Reached(make, cfg, training, options.get("valid"))

    monkeypatch.setattr(train, "fit", fit)
    setup = replace(script.SCALES["smoke"].setup, data=source, **change)
    with pytest.raises(Reached) as e:
        script.run(setup, tmp_path)
    return e.value.args


UNCONDITIONAL = (
    "vae_digits",
    "vae_manifold",
    "vae_samples",
    "vae_elbo_curves",
    "iwae_table",
    "gan_mnist",
    "ddpm_cifar10",
    "own_pictures",
)
CONDITIONAL = ("gan_digits", "cgan_mnist", "ddpm_digits", "ddpm_fashion", "unet_or_dit")


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_a_folder_of_pictures_gives_shape_and_splits(name, flat, tmp_path, monkeypatch):
    _, cfg, training, valid = reach(name, Source(flat), tmp_path, monkeypatch)
    assert (cfg.shape, cfg.levels, cfg.classes) == ((12, 12, 1), 256, 0)
    assert training.info.source["split"] in ("train[:80%]", "train[:90%]")
    assert training.info.examples in (160, 180) and (valid is None or valid.info.examples >= 20)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_class_folders_give_the_classes(name, classes, tmp_path, monkeypatch):
    _, cfg, training, valid = reach(name, Source(classes), tmp_path, monkeypatch)
    assert (cfg.shape, cfg.levels, cfg.classes) == ((12, 12, 3), 256, 3)
    assert (training.info.examples, valid.info.examples) == (160, 20)


@pytest.mark.parametrize("name", ["vae_samples", "gan_mnist", "ddpm_cifar10", "own_pictures"])
def test_a_size_reaches_the_data(name, classes, tmp_path, monkeypatch):
    _, cfg, training, _ = reach(name, Source(classes, size=8), tmp_path, monkeypatch)
    assert cfg.shape == (8, 8, 3) and cfg.classes == 0 and training.info.source["size"] == 8


def test_the_script_that_measures_first_has_its_pictures_before(flat, tmp_path, monkeypatch):
    """vdm_invariance trains before minutes of other work, so that what fit would refuse is said at once."""

    def fit(*args, **options):
        raise Reached

    monkeypatch.setattr(train, "fit", fit)
    setup = vdm_invariance.SCALES["smoke"].setup
    with pytest.raises(Reached):
        vdm_invariance.run(replace(setup, data=Source(flat)), tmp_path)
    with pytest.raises(ValueError):
        vdm_invariance.run(
            replace(setup, data=Source(flat), model=replace(setup.model, shape=(9, 9, 1))), tmp_path
        )


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call(script, flags...) -> (exit code, stderr as one line, tyro's box taken away); nothing may be trained."""
    monkeypatch.chdir(tmp_path)

    def fit(*args, **options):
        raise AssertionError("it began to train")

    monkeypatch.setattr(train, "fit", fit)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        with pytest.raises(SystemExit) as e:
            _cli.main(name)
        return e.value.code, " ".join(capfd.readouterr().err.replace("│", " ").split())

    return run


@pytest.mark.parametrize("name", CONDITIONAL)
def test_pictures_without_classes_are_refused_by_models_that_are_given_one(name, flat, call):
    code, line = call(name, "--data.name", flat)
    assert (
        code == 2
        and "error: " in line
        and "has no classes" in line
        and "experiments.own_pictures" in line
    )


@pytest.mark.parametrize(
    "name",
    ["parzen_table", "progressive", "guidance", "ddim_steps", "schedules", "ddpm_objectives"],
)
def test_scripts_about_one_set_refuse_own_pictures_and_say_what_takes_them(name, flat, call):
    code, line = call(name, "--data.name", flat)
    assert code == 2 and "for own pictures: python -m experiments.own_pictures" in line


@pytest.mark.parametrize(
    "name, flags, words",
    [
        (
            "ddpm_cifar10",
            ["--data.size", "10"],
            "halve H and W 2 times.*--data.size 8 makes them 8 x 8",
        ),
        ("ddpm_cifar10", ["--data.size", "63"], "--data.size 64 makes them"),
        ("vae_digits", ["--data.size", "0"], "size must be a whole number of at least 1"),
        (
            "vae_digits",
            ["--model.shape", "9", "9", "1"],
            r"model.shape is \(9, 9, 1\), the images are \(12, 12, 1\)",
        ),
        (
            "vae_digits",
            ["--model.channels", "16", "16", "16"],
            "halve H and W 3 times.*--data.size 8 makes",
        ),
        (
            "own_pictures",
            ["--family", "gan", "--model.classes", "3"],
            "the images have no labels",
        ),
        ("own_pictures", ["--samples", "3"], "samples must be at least 10, got 3"),
        ("gan_digits", ["--training", "0"], "training must be at least 1, got 0"),
        ("ddpm_digits", ["--training", "-5"], "training must be at least 1, got -5"),
        ("own_pictures", ["--family", "ddpm", "--data.folder", "nowhere"], "there is no folder"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(name, flags, words, flat, call):
    code, line = call(name, "--data.name", flat, *flags)
    assert code == 2
    with pytest.raises(ValueError, match=words):
        raise ValueError(line)


def test_a_set_without_sizes_takes_none(call):
    code, line = call("vae_digits", "--data.size", "32")
    assert code == 2 and "digits has no option 'size'" in line


@pytest.mark.parametrize("name", ["vae_digits", "own_pictures"])
def test_other_kinds_of_data_are_refused(name, call):
    code, line = call(name, "--data.name", "ring")
    assert code == 2 and line.startswith("error: ")  # and nothing before it


# --------------------------------------------------------------------------------------------------------- own_pictures


@pytest.mark.parametrize("family", own_pictures.FIRST["family"])
@pytest.mark.parametrize("channels", [1, 3])
def test_nets_fit_pictures_of_every_size(family, channels):
    """From 1 x 1 on, odd ones and oblong ones: the model is built, its nets named by the user stay."""
    setup = own_pictures.SETUPS[family]
    for shape in [(side, side) for side in range(1, 70)] + [
        (48, 64),
        (7, 30),
        (128, 96),
        (256, 256),
    ]:
        info = data.Info("image", (*shape, channels), 256)
        model = own_pictures.sized(setup, info).model
        assert model.shape == info.shape
    name = {"vae": "channels", "gan": "gen", "ddpm": "net"}[family]
    usual = getattr(setup.model, name)
    own = {name: (8,) if family == "vae" else replace(usual, widths=(8,) * len(usual.widths))}
    changed = replace(setup, model=replace(setup.model, **own))
    kept = own_pictures.sized(changed, data.Info("image", (32, 32, 3), 256)).model
    assert all(getattr(kept, name) == value for name, value in own.items())


def test_halvings():
    sides = {1: 0, 5: 0, 6: 1, 7: 0, 8: 1, 12: 2, 16: 2, 28: 2, 32: 3, 50: 1, 64: 4}
    assert {side: own_pictures.halvings((side, side, 3)) for side in sides} == sides
    assert own_pictures.halvings((32, 33, 1)) == 0 and own_pictures.halvings((16, 64, 1)) == 2


def smallest(family, source, tmp_path, **change):
    setup = own_pictures.scales(family)["smoke"].setup
    run = replace(
        setup.run, folder=str(tmp_path / "run"), steps=4, eval_every=5, batch_size=8, devices=1
    )
    return own_pictures.run(replace(setup, run=run, data=source, samples=12, **change), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "vae",
        pytest.param("gan", marks=pytest.mark.soak),
        pytest.param("ddpm", marks=pytest.mark.soak),
    ],
)
def test_own_pictures_are_trained_drawn_and_measured(family, classes, tmp_path):
    # Dense layers compile in a third of the time.
    small = (
        {"model": replace(own_pictures.VAE, channels=(), hidden=(8,), ema=0.0)}
        if family == "vae"
        else {}
    )
    found = smallest(family, Source(classes, size=8), tmp_path, **small)
    assert all(np.isfinite(row.ours) for row in found)
    measured = [row for row in found if "of pixels" in row.quantity]
    assert len(measured) == 4 and all(0 <= row.oracle <= 2 for row in measured)
    assert all(", n = 12;" in row.quantity for row in measured)  # of the 64 that are drawn
    with Image.open(tmp_path / "own_pictures.png") as picture:
        assert picture.size[0] > 1000 and np.asarray(picture.convert("L")).std() > 10
    result = train.load(tmp_path / "run")
    assert result.info.shape == (8, 8, 3) and result.info.source["size"] == 8
    again = dict(result.info.source)
    assert (
        data.load(again.pop("name"), again.pop("split"), **again).info.fingerprint
        == result.info.fingerprint
    )


def test_the_family_is_a_first_flag_and_part_of_the_record(flat, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        own_pictures, "run", lambda setup, folder: (folder.mkdir(), [_cli.Row("x", 1.0)])[1]
    )
    flags = [
        "--run.folder",
        "run",
        "--family",
        "ddpm",
        "--model.T",
        "9",
        "--data.name",
        flat,
        "--scale",
        "smoke",
    ]
    monkeypatch.setattr(sys, "argv", ["own_pictures", *flags])
    _cli.main("own_pictures")
    record = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert "--family=ddpm --model.T 9" in record["command"]
    assert [row["quantity"] for row in record["rows"]] == [
        "x"
    ]  # no criteria: these are of the script's own set
    monkeypatch.setattr(sys, "argv", ["own_pictures", "--family", "flow"])
    with pytest.raises(SystemExit) as e:
        _cli.main("own_pictures")
    assert e.value.code == 2 and "--family" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------- measures


def test_pixels_of_the_training_set_score_as_their_floor(capfd):
    """Samples from the set itself are as good as training images; noise is not."""
    rng = np.random.default_rng(0)
    centres = rng.random((5, 4, 4, 1))

    def draw(n):
        return (centres[rng.integers(5, size=n)] + 0.05 * rng.standard_normal((n, 4, 4, 1))).astype(
            np.float32
        )

    real, seen, fake = draw(300), draw(300), draw(300)
    for row in _pictures.distances("images:x", fake, real, seen):
        assert abs(row.ours - row.oracle) < 0.15 and "of pixels, n = 300" in row.quantity
    assert "no classifier of ours knows these pictures" in capfd.readouterr().err
    noise = {
        row.quantity: row.ours
        for row in _pictures.in_pixels(rng.random((300, 4, 4, 1)), real, seen)
    }
    assert all(value < 0.05 for name, value in noise.items() if not name.startswith("recall"))


def test_classes_by_rows():
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) / 10
    rows = _pictures.by_class(images, np.array([0, 2, 0, 2, 2]), 2)
    np.testing.assert_allclose(rows.ravel(), [0, 0.2, 1, 1, 0.1, 0.3])
    assert len(_pictures.by_class(images, np.array([0, 50, 0, 2, 2]), 2)) == 40


# ------------------------------------------------------------------------------------------------------ other layouts


@pytest.mark.parametrize(
    "shape, words",
    [
        ((4, 3, 32, 32), r"got \[4, 3, 32, 32\]; channels come last: images.transpose"),
        ((4, 1, 8, 8), "channels come last"),
        ((4, 28, 28), r"images\[..., None\]"),
        ((4, 8, 8, 2), "1, 3 or 4 channels"),
        ((0, 8, 8, 1), r"got \[0, 8, 8, 1\]"),
    ],
)
def test_images_of_another_layout_are_not_drawn(shape, words, tmp_path):
    images = np.zeros(shape, np.float32)
    if len(shape) == 4:  # the rank is jaxtyping's to refuse in tests
        with pytest.raises(ValueError, match=words):
            figures.save_images(tmp_path / "a.png", images)
        assert not (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match=words):
        figures.tile.__wrapped__(images) if len(shape) == 3 else figures.tile(images)


def test_the_classifier_says_how_to_transpose():
    with pytest.raises(
        ValueError, match=r"got \(2, 1, 8, 8\); channels come last: images.transpose"
    ):
        metrics.load_classifier("digits").apply(np.zeros((2, 1, 8, 8), np.float32))
