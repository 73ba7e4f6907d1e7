"""CIFAR-10's archive in the official layout, made tiny; nothing here needs a network."""

import hashlib
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from aigc_jax import data
from aigc_jax.data import images, prepare

SHARED = (
    Path(__file__).parent.parent.parent
    / "shared"
    / "data"
    / "cifar10"
    / "cifar10_train_first4000.bin.xz"
)
BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
RECORDS = 3


def batch(image, label):
    """Records by the site's words: "<1 x label><3072 x pixel>", red, green, blue, each row by row."""
    out = bytearray()
    for pixels, y in zip(image, label, strict=True):
        out.append(y)
        for channel in range(3):
            for row in range(32):
                out += bytes(pixels[row, column, channel] for column in range(32))
    return bytes(out)


def archive(files):
    """A gzipped tar as the site's, with its other files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        others = {"batches.meta.txt": b"airplane\n", "readme.html": b"<html>"}
        for name, content in {**files, **others}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """official(files, records) -> a folder with their archive, which passes for the official one."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("AIGC_DATA", raising=False)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    from aigc_jax.data.builders.cifar10.cifar10_dataset_builder import Builder

    def no_network(*args, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)

    def make(files, records=RECORDS):
        raw = archive(files)
        folder = tmp_path / "cifar10"
        folder.mkdir()
        (folder / "renamed").write_bytes(raw)
        url = "https://example.invalid/cifar-10-binary.tar.gz"
        info = tfds.core.download.checksums.UrlInfo(
            size=len(raw),
            checksum=hashlib.sha256(raw).hexdigest(),
            filename="cifar-10-binary.tar.gz",
        )
        monkeypatch.setattr(Builder, "url_infos", {url: info})
        monkeypatch.setattr(Builder, "RECORDS", records)
        return folder

    images._read.cache_clear()
    yield make
    images._read.cache_clear()


def drawn():
    """(images [18, 32, 32, 3], labels [18], {file: its three records})."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6 * RECORDS, 32, 32, 3), dtype=np.uint8)
    label = np.append(rng.integers(0, 10, 6 * RECORDS - 1), 9)
    rows = [slice(i * RECORDS, (i + 1) * RECORDS) for i in range(6)]
    return (
        image,
        label,
        {name: batch(image[r], label[r]) for name, r in zip(BATCHES, rows, strict=True)},
    )


def test_the_archive_is_read_in_its_order_whatever_its_name(official, monkeypatch, capfd):
    image, label, files = drawn()
    folder = official(dict(reversed(files.items())))  # members in another order
    train = data.load("cifar10", folder=str(folder))
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "preparing cifar10" in said.err
    info, arrays = train.info, train.resident[0]
    assert (info.kind, info.shape, info.levels, info.classes, info.examples) == (
        "image",
        (32, 32, 3),
        256,
        10,
        15,
    )
    assert arrays["image"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["image"], image[:15])
    np.testing.assert_array_equal(arrays["label"], label[:15])
    (folder / "renamed").unlink()  # prepared now
    test = data.load("cifar10", "train[14:]+test").resident[0]
    np.testing.assert_array_equal(test["image"], image[14:])
    np.testing.assert_array_equal(test["label"], label[14:])
    assert capfd.readouterr() == ("", "")


def test_environment_names_the_root(official, monkeypatch):
    folder = official(drawn()[2])
    monkeypatch.setenv("AIGC_DATA", str(folder.parent))
    assert data.load("cifar10", "test").info.examples == 3


def test_what_is_not_there_or_not_official_is_said_at_once(official, tmp_path):
    folder = official(drawn()[2])
    with pytest.raises(
        FileNotFoundError,
        match="no network in this test.*copy cifar-10-binary.tar.gz.*--data.folder",
    ):
        data.load("cifar10")
    raw = bytearray((folder / "renamed").read_bytes())
    raw[-1] ^= 1
    (folder / "renamed").write_bytes(bytes(raw))
    with pytest.raises(FileNotFoundError, match="lacks cifar-10-binary.tar.gz"):
        data.load("cifar10", folder=str(folder))
    (folder / "renamed").rename(folder / "cifar-10-binary.tar.gz")
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz is not the official file"):
        data.load("cifar10", folder=str(folder))
    assert not (tmp_path / "tfds").exists()


def damaged(how, files):
    name = "data_batch_4.bin"
    content = {
        "a byte short": files[name][:-1],
        "a record short": files[name][:-3073],
        "a record more": files[name] + files[name][-3073:],
        "empty": b"",
        "a wrong label": files[name][:3073] + b"\x0a" + files[name][3074:],
    }
    if how == "missing":
        return {other: raw for other, raw in files.items() if other != name}
    return {**files, name: content[how]}


@pytest.mark.parametrize(
    "how, said",
    [
        ("a byte short", "data_batch_4.bin holds 9,218 bytes, 3 records of 3,073 are 9,219"),
        ("a record short", "data_batch_4.bin holds 6,146 bytes"),
        ("a record more", "data_batch_4.bin holds 12,292 bytes"),
        ("empty", "data_batch_4.bin holds 0 bytes"),
        ("a wrong label", "data_batch_4.bin holds the label 10, which is not in 0..9"),
        ("missing", "lacks cifar-10-batches-bin/data_batch_4.bin"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(official, tmp_path, how, said):
    folder = official(damaged(how, drawn()[2]))
    with pytest.raises(ValueError, match=said) as refused:
        data.load("cifar10", folder=str(folder))
    assert len(str(refused.value).splitlines()) == 1
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))


@pytest.mark.parametrize("cut", [5, 200, 20_000])
def test_a_damaged_archive_is_refused_in_one_line(tmp_path, cut):
    from aigc_jax.data.builders.cifar10.cifar10_dataset_builder import read_batches

    raw = archive(drawn()[2])
    damage = {
        "short": raw[:cut],
        "other": b"no archive",
        "flipped": raw[:99] + b"\xff\x00" + raw[101:],
    }
    for name, content in damage.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)) as refused:
            read_batches(path, RECORDS)
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.skipif(
    not SHARED.is_file(),
    reason="no images of CIFAR-10 beside this checkout (../shared/data/cifar10)",
)
def test_real_images(official):
    """Means and deviations by channel are those of the whole file; pixels are like their neighbours."""
    raw, n = lzma.decompress(SHARED.read_bytes()), 666
    size = n * 3073
    files = {name: raw[i * size : (i + 1) * size] for i, name in enumerate(BATCHES)}
    folder = official(files, n)
    arrays = data.load("cifar10", "train+test", folder=str(folder)).resident[0]
    image, label = arrays["image"], arrays["label"]
    assert image.shape == (3996, 32, 32, 3) and label[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]
    assert (
        np.abs(np.bincount(label) - [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]).sum() == 4
    )
    pixels = image.astype(np.float32)
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), [125.4, 122.8, 113.4], atol=0.15)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), [63.0, 62.2, 66.9], atol=0.15)
    for axis in (1, 2):
        assert np.abs(np.diff(pixels, axis=axis)).mean() < 16
