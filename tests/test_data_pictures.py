"""Pictures of one's own: folders of files, and sets that are read while training."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from aigc_jax import data, train, vae
from aigc_jax.data import images

from .trainee import CFG, fingerprint


def picture(i, mode="L", size=(6, 4)):
    rng = np.random.default_rng(i)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.fixture
def folder(tmp_path):
    """40 grey pictures in two classes."""
    for i in range(40):
        at = tmp_path / "pictures" / ("bee", "ant")[i % 2]
        at.mkdir(parents=True, exist_ok=True)
        picture(i).save(at / f"{i:02}.png")
    return tmp_path / "pictures"


def by_bytes(source):
    """{pixels: label} of every example."""
    arrays, _, _ = source.resident
    return {image.tobytes(): int(label) for image, label in zip(arrays["image"], arrays["label"], strict=True)}


def test_sub_folders_are_classes_in_alphabetical_order(folder):
    (folder / "ant" / "notes.txt").write_text("not a picture")
    (folder / "empty").mkdir()
    source = data.load(f"images:{folder}")
    assert (source.info.shape, source.info.levels, source.info.classes, source.info.examples) == ((4, 6, 1), 256, 2, 40)
    expected = {np.asarray(picture(i)).tobytes(): int(i % 2 == 0) for i in range(40)}
    assert by_bytes(source) == expected


def test_slices_cut_a_mixed_order_into_disjoint_parts(folder):
    parts = [by_bytes(data.load(f"images:{folder}", cut)) for cut in ("train[:75%]", "train[75%:]")]
    assert [len(p) for p in parts] == [30, 10] and not set(parts[0]) & set(parts[1])
    assert all(set(p.values()) == {0, 1} for p in parts)
    with pytest.raises(ValueError, match="no split 'test'; it has train, and slices"):
        data.load(f"images:{folder}", "test")


def test_train_and_test_folders_are_splits(folder, tmp_path):
    for part, names in (("train", range(8)), ("test", range(8, 12))):
        for i in names:
            at = tmp_path / "split" / part / ("a", "b")[i % 2]
            at.mkdir(parents=True, exist_ok=True)
            picture(i).save(at / f"{i}.png")
    name = f"images:{tmp_path / 'split'}"
    test = by_bytes(data.load(name, "test"))
    assert test == {np.asarray(picture(i)).tobytes(): i % 2 for i in range(8, 12)}
    assert data.load(name, "train+test").info.examples == 12
    (tmp_path / "split" / "test" / "a").rename(tmp_path / "split" / "test" / "c")
    with pytest.raises(ValueError, match="hold other classes: train: a, b; test: b, c"):
        data.load(name)
    (tmp_path / "split" / "test").rename(tmp_path / "split" / "val")
    with pytest.raises(ValueError, match="val lies beside .*train, which is read as a split"):
        data.load(name)
    (tmp_path / "split" / "val").rename(tmp_path / "val")
    assert data.load(name).info.classes == 2  # a train/ alone is a split, not a class


def test_channels_are_those_of_the_whole_folder(folder):
    picture(0, "RGB").save(folder / "ant" / "colour.png")
    shapes = {data.load(f"images:{folder}", cut).info.shape for cut in ("train[:50%]", "train[50%:]")}
    assert shapes == {(4, 6, 3)}


def test_pictures_without_sub_folders_have_no_labels(tmp_path):
    for i in range(3):
        picture(i, "RGB").save(tmp_path / f"{i}.png")
    info = data.load(f"images:{tmp_path}").info
    assert (
        info.classes is None
        and info.shape == (4, 6, 3)
        and "label" not in data.load(f"images:{tmp_path}").batch(0, 0, 2)
    )
    with pytest.raises(ValueError, match="no labels"):
        dataclasses.replace(CFG, shape=(4, 6, 3), levels=256, classes=2).check(info)


def test_colour_transparency_and_cameras_held_upright(tmp_path):
    picture(0, "RGB").save(tmp_path / "a.png")
    picture(1).save(tmp_path / "grey.png")
    clear = picture(2, "RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    picture(3, "RGB", size=(4, 6)).save(tmp_path / "turned.jpg", exif=exif)
    arrays, _, _ = data.load(f"images:{tmp_path}").resident
    found = {image.tobytes() for image in arrays["image"]}
    with Image.open(tmp_path / "turned.jpg") as stored:
        turned = np.rot90(stored, -1)
    expected = [np.asarray(picture(0, "RGB")), np.stack([picture(1)] * 3, -1),
                np.full((4, 6, 3), 255, np.uint8), turned]  # fmt: skip
    assert found == {np.ascontiguousarray(e).tobytes() for e in expected}


def test_mixed_sizes_are_refused_with_both_files_named(folder):
    picture(1, size=(6, 5)).save(folder / "ant" / "odd.png")
    with pytest.raises(ValueError) as e:
        data.load(f"images:{folder}")
    assert "odd.png" in str(e.value) and str(e.value).count(".png") == 2
    assert "6 x 5" in str(e.value) and "6 x 4" in str(e.value)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "ant" / "torn.png").write_bytes(b"no picture"), "torn.png cannot be read as a picture"),
        (lambda f: (f / "ant" / "half.png").write_bytes((f / "ant" / "01.png").read_bytes()[:60]), "half.png"),
        (lambda f: picture(0).save(f / "loose.png"), "loose.png lies beside the class folder"),
        (lambda f: Image.fromarray(np.zeros((4, 6), np.uint16)).save(f / "ant" / "deep.png"), "more than 8 bits"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder, spoil, words):
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        data.load(f"images:{folder}")


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        data.load(f"images:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load(f"images:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="name a folder"):
        data.load("images:")


def test_a_folder_that_moved_is_the_same_set_and_another_picture_is_not(folder):
    name = f"images:{folder}"
    before = data.load(name).info
    folder.rename(folder.with_name("moved"))
    assert data.load(name, folder=str(folder.with_name("moved"))).info == before
    picture(99).save(folder.with_name("moved") / "ant" / "01.png")
    assert data.load(name, folder=str(folder.with_name("moved"))).info.fingerprint != before.fingerprint


# ----------------------------------------------------------------------------------------------------------- streaming


def test_streamed_batches_are_the_resident_ones(folder, monkeypatch):
    held = data.load(f"images:{folder}")
    streamed = data.load(f"images:{folder}", stream=True)
    assert held.resident and streamed.resident is None
    assert streamed.info.source == {**held.info.source, "stream": True}
    assert dataclasses.replace(streamed.info, source=held.info.source) == held.info
    for i in range(5):
        ours, theirs = streamed.batch(3, i, 16), held.batch(3, i, 16)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
    monkeypatch.setattr(images, "RESIDENT_BYTES", 100)
    assert data.load(f"images:{folder}").resident is None


@pytest.mark.parametrize("k", [1, 3])
def test_streamed_training_ends_with_the_resident_bits(folder, tmp_path, k):
    """Read ahead in threads, stopped, resumed: the bits of an unbroken run, the parameters of one in memory."""
    cfg = dataclasses.replace(CFG, shape=(4, 6, 1), levels=256)
    held, streamed = (data.load(f"images:{folder}", stream=s) for s in (False, True))

    def run(steps, name):
        return train.Run(
            folder=str(tmp_path / name), steps=steps, batch_size=16, steps_per_call=k, save_every=5, eval_every=5
        )

    expected = train.fit(vae.make, cfg, run(17, "held"), held, valid=held).state
    unbroken = train.fit(vae.make, cfg, run(17, "unbroken"), streamed, valid=streamed).state
    train.fit(vae.make, cfg, run(8, "streamed"), streamed, valid=streamed)
    state = train.fit(vae.make, cfg, run(17, "streamed"), streamed, valid=streamed).state
    assert fingerprint(state) == fingerprint(unbroken)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, expected)
    scores = [train.metrics(tmp_path / name)[-1]["valid"]["nll_nats"] for name in ("held", "streamed")]
    np.testing.assert_allclose(*scores, rtol=1e-6)


@pytest.mark.parametrize("options", [{"devices": 8}, {"devices": 8, "pmap": True}])
def test_streamed_batches_reach_every_device(folder, options):
    cfg = dataclasses.replace(CFG, shape=(4, 6, 1), levels=256)
    a, b = (
        train.fit(
            vae.make, cfg, train.Run(steps=4, batch_size=16, **options), data.load(f"images:{folder}", stream=s)
        ).state
        for s in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), a, b)


class Source:
    """A random-access source that knows who read it."""

    def __init__(self, n=30, **fields):
        self.n, self.fields, self.readers = n, fields, set()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.readers.add(threading.current_thread().name)
        image = np.random.default_rng(i).integers(0, 17, (8, 8, 1), dtype=np.uint8)
        return {"image": image, "label": i % 3} | {name: f(i) for name, f in self.fields.items()}


def test_a_source_of_ones_own_is_read_in_the_order_of_arrays():
    source = Source()
    streamed = data.from_source(source, levels=17, classes=3)
    whole = {"image": np.stack([source[i]["image"] for i in range(30)]), "label": np.arange(30) % 3}
    held = data.from_arrays(whole, levels=17, classes=3)
    for i in (0, 5, 2):
        jax.tree.map(np.testing.assert_array_equal, streamed.batch(1, i, 8), held.batch(1, i, 8))
    source.readers.clear()
    train.fit(vae.make, CFG, train.Run(steps=5, batch_size=8), streamed)
    assert source.readers and threading.current_thread().name not in source.readers  # ahead of the training thread
    assert data.from_source(Source(31), levels=17, classes=3).info.fingerprint != streamed.info.fingerprint


@pytest.mark.parametrize(
    "source, options, words",
    [
        (Source(0), {"classes": 3}, "at least one example"),
        (Source(), {}, "how many classes"),
        (Source(), {"classes": 2}, "labels must lie in 0..1"),
        (Source(), {"classes": 3, "levels": 9}, "does not fit levels=9"),
        (Source(image=lambda i: np.zeros((8, 8 + (i == 29), 1), np.uint8)), {"classes": 3}, "image 29 is"),
        (Source(image=lambda i: np.zeros((8, 8, 1), np.float32)), {"classes": 3}, "image must be uint8"),
    ],
)
def test_sources_that_do_not_fit_are_refused(source, options, words):
    with pytest.raises(ValueError, match=words):
        data.from_source(source, **{"levels": 17, **options})


def test_a_read_that_fails_is_said_and_what_was_trained_is_kept(tmp_path):
    """Example 29 breaks at first; once it is mended the run goes on, and ends with the bits of an unbroken one."""

    def broken(i):
        if i == 29:
            raise OSError(5, "Input/output error", "29.png")
        return np.random.default_rng(i).integers(0, 17, (8, 8, 1), dtype=np.uint8)

    whole, torn = (
        data.from_source(Source(image=image) if image else Source(), levels=17, classes=3, fingerprint="x")
        for image in (None, broken)
    )
    run = train.Run(folder=str(tmp_path / "run"), steps=20, batch_size=4, devices=1)
    first = next(i for i in range(20) if 29 in data.order(30, 0, i, 4))
    with pytest.raises(train.ReadFailed, match=f"after step {first} the data cannot be read: .*29.png.*{first} stands"):
        train.fit(vae.make, CFG, run, torn)
    assert int(train.load(run.folder).state.step) == first > 0
    again = train.fit(vae.make, CFG, run, whole).state
    unbroken = train.fit(vae.make, CFG, dataclasses.replace(run, folder=""), whole).state
    assert fingerprint(again) == fingerprint(unbroken)


def test_a_validation_reads_no_further_than_its_end():
    source = Source()
    reads = []
    streamed = data.from_source(source, levels=17, classes=3)
    counted = streamed._replace(batch=lambda *at: (reads.append(at), streamed.batch(*at))[1])
    train.fit(
        vae.make, CFG, train.Run(steps=4, batch_size=8, eval_every=2, devices=1), data.load("digits"), valid=counted
    )
    assert sorted(reads) == sorted([(0, i, 8) for i in range(4)] * 2)


def test_a_missing_label_is_named():
    class Half(Source):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return example if i != 7 else {"image": example["image"]}

    with pytest.raises(ValueError, match="example 7 has no label"):
        data.from_source(Half(), levels=17, classes=3)
    with pytest.raises(ValueError, match="must hold 'image', got pixels"):
        data.from_source([{"pixels": np.zeros((2, 2, 1), np.uint8)}])
