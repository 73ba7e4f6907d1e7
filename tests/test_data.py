"""Data: order, official formats, local files; nothing here needs a network."""

import gzip
import hashlib
import http.server
import struct
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from aigc_jax import data
from aigc_jax.data import images, music, points, prepare

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def arrays(n=10):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (n, 2, 3, 1), dtype=np.uint8),
        "label": rng.integers(0, 4, n),
    }


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("n, size", [(10, 3), (10, 10), (10, 25), (7, 1)])
def test_epochs_see_every_example_once_and_no_batch_is_short(n, size):
    stream = np.concatenate([data.order(n, 5, i, size) for i in range(4 * n)])
    assert stream.dtype == np.int32 and len(stream) == 4 * n * size
    for epoch in range(len(stream) // n):
        np.testing.assert_array_equal(np.sort(stream[epoch * n : (epoch + 1) * n]), np.arange(n))
    assert (stream[:n] != stream[n : 2 * n]).any()  # each epoch has an order of its own


def test_a_batch_is_a_pure_function_of_seed_and_number():
    a = data.from_arrays(arrays())
    for i in (0, 7, 3):
        for name, value in a.batch(2, i, 4).items():
            np.testing.assert_array_equal(value, data.from_arrays(arrays()).batch(2, i, 4)[name])
    assert (data.order(100, 0, 0, 100) != data.order(100, 1, 0, 100)).any()


def test_order_does_not_depend_on_the_version_of_numpy():
    """Philox bits are fixed for all versions: this permutation was computed once and must never change."""
    bits = [int(b) for b in np.random.Philox(key=[3, 0]).random_raw(6)]
    assert (
        data.order(6, 3, 0, 6).tolist()
        == sorted(range(6), key=lambda j: bits[j])
        == [1, 5, 2, 4, 3, 0]
    )


def test_resident_path_equals_host_path():
    for source in (
        data.from_arrays(arrays()),
        data.load("digits"),
        data.load("ring", "test", examples=50),
    ):
        on_device, rows, take = source.resident
        got = jax.jit(take)(jax.device_put(on_device), rows(1, 3, 8))
        expected = source.batch(1, 3, 8)
        assert got.keys() == expected.keys()
        for name in got:
            assert got[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(got[name], expected[name])


def test_index_names_the_example():
    a = arrays()
    batch = data.from_arrays(a).batch(0, 0, 10)
    np.testing.assert_array_equal(a["image"][batch["index"]], batch["image"])


# --------------------------------------------------------------------------------------------------------- from_arrays


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({"image": np.zeros((3, 2, 2), np.uint8)}, {}, r"uint8 \[N, H, W, C\]"),
        ({"image": np.zeros((3, 2, 2, 1))}, {}, "float64"),
        ({"label": np.zeros(9, int)}, {}, r"label must be whole numbers \[10\]"),
        ({"label": np.full(10, 4)}, {"classes": 4}, r"0\.\.3"),
        ({}, {"levels": 17}, "does not fit levels=17"),
        ({"other": np.zeros(10)}, {}, "other"),
        (
            {"points": np.zeros((10, 2))},
            {},
            "must hold one of image, points, tokens, roll, got image, label, points",
        ),
        (
            {"image": np.zeros((0, 2, 2, 1), np.uint8), "label": np.zeros(0, int)},
            {},
            "at least one",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, options, words):
    with pytest.raises(ValueError, match=words):
        data.from_arrays({**arrays(), **change}, **options)


def test_points_must_be_finite():
    with pytest.raises(ValueError, match="not finite"):
        data.from_arrays({"points": np.array([[0.0, np.nan]])})


def test_fingerprint_sees_every_bit():
    a = arrays()
    b = {**a, "image": a["image"].copy()}
    b["image"][0, 0, 0, 0] ^= 1
    assert data.from_arrays(a).info.fingerprint == data.from_arrays(arrays()).info.fingerprint
    assert data.from_arrays(a).info.fingerprint != data.from_arrays(b).info.fingerprint


# ---------------------------------------------------------------------------------------------------------------- sets


def test_digits():
    train, test = data.load("digits"), data.load("digits", "test")
    assert (train.info.examples, test.info.examples) == (1437, 360)
    assert train.info.shape == (8, 8, 1) and train.info.levels == 17 and train.info.classes == 10
    assert train.resident[0]["image"].max() == 16
    both = data.load("digits", "train[1400:]+test[:50%]")
    assert both.info.examples == 37 + 180
    np.testing.assert_array_equal(both.resident[0]["image"][37:], test.resident[0]["image"][:180])
    assert both.info.source == {"name": "digits", "split": "train[1400:]+test[:50%]"}


@pytest.mark.parametrize(
    "name, split, options, words",
    [
        ("cifar11", "train", {}, "unknown data set 'cifar11'"),
        ("digits", "training", {}, "no split 'training'"),
        ("digits", "train[9:", {}, "no split"),
        ("digits", "train[5:5]", {}, "empty"),
        ("digits", "train", {"folder": "/x"}, "takes no folder"),
        ("digits", "train", {"std": 1.0}, "no option 'std'"),
        (
            "ring",
            "train",
            {"sigma": 1.0},
            "no option 'sigma'; it takes modes, radius, std, examples",
        ),
        ("ring", "train", {"std": -1.0}, "std must be at least 0"),
        ("ring", "train", {"modes": 0}, "modes must be at least 1"),
        ("ppca", "train", {"dim": 3, "latents": 4}, "latents"),
    ],
)
def test_what_does_not_exist_is_refused(name, split, options, words):
    with pytest.raises(ValueError, match=words):
        data.load(name, split, **options)


@pytest.mark.parametrize("name", ["ring", "grid", "swiss_roll", "ppca"])
def test_synthetic_sets_draw_afresh_yet_repeatably(name):
    train = data.load(name)
    first = train.batch(0, 0, 100)["points"]
    assert first.dtype == np.float32 and train.info.examples is None and train.resident is None
    np.testing.assert_array_equal(first, data.load(name).batch(0, 0, 100)["points"])
    for other in (
        train.batch(0, 1, 100),
        train.batch(1, 0, 100),
        data.load(name, "test").batch(0, 0, 100),
    ):
        assert not np.isin(first, other["points"]).any()
    finite = data.load(name, "test", examples=40)
    assert finite.info.examples == 40
    assert np.isin(finite.batch(0, 0, 40)["points"], finite.batch(9, 5, 40)["points"]).all()


def test_ring_and_grid_have_equal_gaussians_on_their_modes():
    for name, centres, std in (
        ("ring", points.ring_modes(), 0.01),
        ("grid", points.grid_modes(), 0.05),
    ):
        assert len(np.unique(centres.round(9), axis=0)) == len(centres)
        x = data.load(name).batch(0, 0, 40_000)["points"].astype(np.float64)
        away = x[:, None] - centres
        nearest = (away**2).sum(-1).argmin(1)
        offset = away[np.arange(len(x)), nearest]
        inside = np.linalg.norm(offset, axis=1) < 3 * std
        assert abs(inside.mean() - (1 - np.exp(-4.5))) < 4 * np.sqrt(0.011 / len(x))
        assert stats.chisquare(np.bincount(nearest, minlength=len(centres))).pvalue > 1e-3
        np.testing.assert_allclose(offset.std(0), std, rtol=0.02)


def test_ppca_has_its_covariance():
    w, b = points.ppca_parameters(6, 2)
    np.testing.assert_allclose(
        w.T @ w, np.diag(np.diag(w.T @ w)), atol=1e-12
    )  # orthogonal loadings
    x = (
        data.load("ppca", dim=6, latents=2, std=0.5)
        .batch(0, 0, 200_000)["points"]
        .astype(np.float64)
    )
    np.testing.assert_allclose(np.cov(x.T), w @ w.T + 0.25 * np.eye(6), atol=0.04)
    np.testing.assert_allclose(x.mean(0), b, atol=0.02)


# ------------------------------------------------------------------------------------------------------ official files


def idx(array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Seven training and three test images in the official format, registered in place of the real checksums."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("AIGC_DATA", raising=False)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    from aigc_jax.data.builders.mnist.mnist_dataset_builder import Builder

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    rng = np.random.default_rng(0)
    content, known = {}, {}
    for stem, n in (("train", 7), ("t10k", 3)):
        content[f"{stem}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (n, 28, 28))
        content[f"{stem}-labels-idx1-ubyte.gz"] = rng.integers(0, 10, n)
    folder = tmp_path / "files"
    folder.mkdir()
    for i, (filename, array) in enumerate(content.items()):
        raw = idx(array)
        (folder / f"renamed-{i}").write_bytes(raw)
        known[f"https://example.invalid/{filename}"] = tfds.core.download.checksums.UrlInfo(
            size=len(raw), checksum=hashlib.sha256(raw).hexdigest(), filename=filename
        )
    monkeypatch.setattr(Builder, "url_infos", known)
    images._read.cache_clear()
    yield folder, content
    images._read.cache_clear()


def no_network(*args, **options):
    raise OSError("no network in this test")


def test_official_files_are_read_whatever_their_names(tiny, monkeypatch, capfd):
    folder, content = tiny
    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    train = data.load("mnist", "train", folder=str(folder))
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "preparing mnist" in said.err
    assert train.info.examples == 7 and train.info.shape == (28, 28, 1) and train.info.classes == 10
    np.testing.assert_array_equal(
        train.resident[0]["image"][..., 0], content["train-images-idx3-ubyte.gz"]
    )  # their order
    np.testing.assert_array_equal(train.resident[0]["label"], content["train-labels-idx1-ubyte.gz"])
    test = data.load("mnist", "train[5:]+test")  # prepared now: neither folder nor network
    np.testing.assert_array_equal(
        test.resident[0]["label"][2:], content["t10k-labels-idx1-ubyte.gz"]
    )
    assert capfd.readouterr() == ("", "")


def test_environment_names_the_root_of_local_files(tiny, monkeypatch):
    folder, _ = tiny
    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    folder.rename(folder.parent / "mnist")
    monkeypatch.setenv("AIGC_DATA", str(folder.parent))
    assert data.load("mnist", "test").info.examples == 3


def test_missing_files_without_a_network_are_said_at_once(tiny, monkeypatch, tmp_path):
    folder, _ = tiny
    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match="no network in this test.*--data.folder FOLDER"):
        data.load("mnist")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        data.load("mnist", folder=str(tmp_path / "nowhere"))
    (folder / "renamed-0").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-images-idx3-ubyte.gz"):
        data.load("mnist", folder=str(folder))
    assert not (tmp_path / "tfds").exists()  # nothing half-written


def test_wrong_checksum_is_refused(tiny, monkeypatch, tmp_path):
    folder, _ = tiny
    raw = bytearray((folder / "renamed-0").read_bytes())
    raw[-1] ^= 1
    (folder / "renamed-0").unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is not the official file"):
        data.load("mnist", folder=str(folder))
    assert not (tmp_path / "tfds").exists()


class _Portal(http.server.BaseHTTPRequestHandler):
    """Answers every address with a page, or with 404 to GET if `lost`."""

    lost = False

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        self.send_response(404 if self.lost else 200)
        self.end_headers()
        self.wfile.write(b"<html>please log in</html>")

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("lost, words", [(True, "404"), (False, "NonMatchingChecksumError")])
def test_a_failed_download_is_one_line(tiny, monkeypatch, tmp_path, lost, words):
    """A page in place of a file, and a file that is gone."""
    from aigc_jax.data.builders.mnist.mnist_dataset_builder import Builder

    handler = type("Handler", (_Portal,), {"lost": lost})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    known = {
        url.replace("https://example.invalid", here): i for url, i in Builder.url_infos.items()
    }
    monkeypatch.setattr(Builder, "url_infos", known)
    try:
        with pytest.raises(
            FileNotFoundError, match=f"mnist cannot be downloaded.*{words}"
        ) as error:
            data.load("mnist")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(error.value) and "--data.folder FOLDER" in str(error.value)
    assert not list(tmp_path.glob("tfds/**/dataset_info.json"))


def test_given_files_come_before_a_copy_of_tfds(tiny, monkeypatch):
    folder, _ = tiny
    monkeypatch.setattr(prepare, "_official", lambda *args: pytest.fail("files were given"))
    assert data.load("mnist", "test", folder=str(folder)).info.examples == 3


def test_a_broken_idx_file_is_no_array(tmp_path):
    from aigc_jax.data.builders.idx import read_idx

    good = gzip.decompress(idx(np.zeros((3, 2))))
    for name, raw in (
        ("short", good[:-1]),
        ("long", good + b"x"),
        ("other", b"\x00\x00\x0d" + good[3:]),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw))
        with pytest.raises(ValueError, match=str(path)):
            read_idx(path)


def test_debian_header_gives_the_official_bytes(tmp_path, monkeypatch):
    """The package differs from the official files in the gzip header alone."""
    official = (
        b"\x1f\x8b\x08\x08"
        + struct.pack("<I", 1504176606)
        + b"\x00\x03train-labels-idx1-ubyte\x00"
        + b"deflated"
    )
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        b"\x1f\x8b\x08\x00" + b"time" + b"\x00\x03" + b"deflated"
    )
    monkeypatch.setattr(prepare, "DEBIAN_FASHION_MNIST", tmp_path)
    wanted = {
        "train-labels-idx1-ubyte.gz": ("", hashlib.sha256(official).hexdigest(), len(official))
    }
    assert prepare._debian_fashion_mnist(wanted) == {"train-labels-idx1-ubyte.gz": official}
    wanted = {"train-labels-idx1-ubyte.gz": ("", "0" * 64, len(official))}
    with pytest.raises(ValueError, match="not the official file"):
        prepare._debian_fashion_mnist(wanted)


@pytest.mark.skipif(
    not prepare.DEBIAN_FASHION_MNIST.is_dir(),
    reason="Debian's dataset-fashion-mnist is not installed",
)
def test_debian_fashion_mnist_is_official():
    from aigc_jax.data.builders.fashion_mnist.fashion_mnist_dataset_builder import Builder

    wanted = {
        info.filename: (url, info.checksum, info.size) for url, info in Builder.url_infos.items()
    }
    assert len(prepare._debian_fashion_mnist(wanted)) == 4


@pytest.mark.skipif(
    not (SHARED / "mnist").is_dir(),
    reason="no copy of MNIST beside this checkout (../shared/data/mnist)",
)
def test_mnist_itself(tmp_path, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    train, test = (
        data.load("mnist", split, folder=str(SHARED / "mnist")) for split in ("train", "test")
    )
    images._read.cache_clear()
    count = np.bincount(train.resident[0]["label"])
    assert count.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.resident[0]["label"]).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert train.resident[0]["label"][:8].tolist() == [
        5,
        0,
        4,
        1,
        9,
        2,
        1,
        3,
    ]  # the order of the original files


@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 6),
        (4, 8, 5),
        (3, 3, 3),
        (1, 1, 1),
        (3, 8, 3),
        (1, 5, 3),
        (3, 5, 1),
        (4, 4, 4),
        (8, 8, 4),
        (2, 2, 1),
    ],
)
def test_small_images_with_channels_last_are_taken(shape):
    assert data.from_arrays({"image": np.zeros((5, *shape), np.uint8)}).info.shape == shape


@pytest.mark.parametrize(
    "image, words",
    [
        (
            np.zeros((3, 3, 32, 32), np.uint8),
            r"got uint8 .*, 3, 32, 32\]; channels come last: x.transpose",
        ),
        (np.zeros((3, 1, 28, 28), np.uint8), "channels come last"),
        (np.zeros((3, 4, 8, 8), np.uint8), "channels come last"),
        (np.zeros((5, 3, 4, 4), np.uint8), "channels come last"),
        (np.zeros((5, 1, 2, 2), np.uint8), "channels come last"),
        (np.zeros((5, 1, 3, 3), np.uint8), "channels come last"),
        (np.zeros((5, 3, 1, 1), np.uint8), "channels come last"),
        (np.zeros((3, 3, 32, 32), np.float32), r"channels come last.*\(x \* 255\).round\(\)"),
        (np.zeros((3, 28, 28), np.uint8), r"x\[..., None\]"),
        (np.zeros((3, 28, 28, 1), np.float16), r"got float16 .*, 28, 28, 1\]; convert floats"),
    ],
)
def test_images_of_another_layout_are_told_what_to_do(image, words):
    with pytest.raises(ValueError, match=words):
        data.from_arrays({"image": image})
    with pytest.raises(ValueError, match=words):
        data.from_source([{"image": x} for x in image])


@pytest.mark.parametrize(
    "shape", [(3, 32, 32, 3), (3, 3, 4, 3), (3, 1, 1, 1), (3, 4, 4, 4), (3, 1, 5, 3)]
)
def test_no_picture_with_its_channels_last_is_taken_for_another(shape):
    assert data.from_arrays({"image": np.zeros(shape, np.uint8)}).info.shape == shape[1:]


def test_home_is_expanded_where_files_lie(tiny, monkeypatch):
    folder, _ = tiny
    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    monkeypatch.setenv("HOME", str(folder.parent))
    folder.rename(folder.parent / "mnist")
    with pytest.raises(FileNotFoundError, match=f"there is no folder {folder.parent}/nowhere"):
        data.load("mnist", folder="~/nowhere")
    monkeypatch.setenv("AIGC_DATA", "~")
    assert data.load("mnist", "test").info.examples == 3


def test_pieces_may_be_joined_without_a_rest():
    rolls = np.arange(12).reshape(2, 3, 2)
    np.testing.assert_array_equal(music.joined(rolls, rest=0), rolls.reshape(6, 2))
    assert music.joined(rolls, rest=4).shape == (10, 2)
