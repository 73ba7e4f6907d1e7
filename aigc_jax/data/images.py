"""Image sets: scikit-learn's digits, and downloaded sets through TFDS builders that need no TensorFlow."""

from __future__ import annotations

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from . import Data, from_arrays, from_source
from .prepare import cuts, prepared

# Larger sets of pictures are read while training instead of being held.
RESIDENT_BYTES = 2**31
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


def digits(split: str) -> Data:
    """Scikit-learn's 8x8 digits, 17 grey levels: the first 1,437 are train, the last 360 test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    image, label = bunch.images.astype(np.uint8)[..., None], bunch.target
    splits = {
        "train": {"image": image[:1437], "label": label[:1437]},
        "test": {"image": image[1437:], "label": label[1437:]},
    }
    return _cut("digits", split, {name: len(part["label"]) for name, part in splits.items()}, splits.get, levels=17)


def mnist(split: str, *, folder: str | None = None) -> Data:
    """MNIST, 28x28, 60,000 train and 10,000 test images, in the official order."""
    return _tfds("mnist", split, folder)


def fashion_mnist(split: str, *, folder: str | None = None) -> Data:
    """Fashion-MNIST, 28x28, 60,000 train and 10,000 test images; Debian's dataset-fashion-mnist is found by itself."""
    return _tfds("fashion_mnist", split, folder)


def cifar10(split: str, *, folder: str | None = None) -> Data:
    """CIFAR-10, 32x32 in colour, 50,000 train and 10,000 test images, in the official order."""
    return _tfds("cifar10", split, folder)


def pictures(name: str, split: str, *, folder: str | None = None, stream: bool | None = None) -> Data:
    """images:FOLDER, your own pictures of one size; sub-folders are classes, in alphabetical order of their names.

    FOLDER holds the classes; or the pictures themselves, which then have no labels; or train/, validation/ and test/,
    as many as there are, each with the one or the other in it. Without these there is one split, train, in an order
    that depends on nothing but the files' names, so that its slices ("train[:90%]", "train[90%:]") hold all classes.
    Where all pictures are grey they have one channel, else three; what is transparent is put on white.

    stream: read pictures while training; by default where they would take more than 2 GiB. Each load reads every file
        once, to know the set again.
    """
    if not (folder or name.removeprefix("images:")):
        raise ValueError("images: name a folder, as in images:FOLDER")
    root = Path(folder or name.removeprefix("images:"))
    if not root.is_dir():
        raise FileNotFoundError(f"images: there is no folder {root}")
    splits = {part: root / part for part in ("train", "validation", "test") if (root / part).is_dir()}
    beside = [p for p in sorted(root.iterdir()) if p.name not in splits and (_is_picture(p) or _below(p))]
    if splits and beside:
        raise ValueError(f"images: {beside[0]} lies beside {next(iter(splits.values()))}, which is read as a split")
    found = {part: _listed(at) for part, at in (splits or {"train": root}).items()}
    if len({names for _, names in found.values()}) > 1:
        said = "; ".join(f"{part}: {', '.join(names) or 'none'}" for part, (_, names) in found.items())
        raise ValueError(f"images: the splits of {root} hold other classes: {said}")
    chosen_cuts = cuts(name, split, {part: len(files) for part, (files, _) in found.items()})
    chosen = [found[part][0][i] for part, start, stop in chosen_cuts for i in range(start, stop)]
    if not chosen:
        raise ValueError(f"{name}: the split {split!r} is empty")
    names = next(iter(found.values()))[1]
    source = _Pictures(root, [file for files, _ in found.values() for file in files], chosen, names)
    options = {} if stream is None else {"stream": stream}
    info = {
        "classes": len(names) or None,
        "source": {"name": name, "split": split, **options},
        "fingerprint": source.fingerprint,
    }
    if stream if stream is not None else len(chosen) * np.prod(source.shape) > RESIDENT_BYTES:
        return from_source(source, **info)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = list(pool.map(source.__getitem__, range(len(source))))
    return from_arrays({key: np.stack([e[key] for e in examples]) for key in examples[0]}, **info)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()


def _below(folder: Path) -> list[Path]:
    return sorted(filter(_is_picture, folder.rglob("*"))) if folder.is_dir() else []


def _listed(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The pictures under a folder in their order for ever, and the names of the classes."""
    classes = {p.name: files for p in sorted(root.iterdir()) if (files := _below(p))}
    loose = sorted(filter(_is_picture, root.iterdir()))
    if loose and classes:
        raise ValueError(
            f"images: {loose[0]} lies beside the class folder {root / next(iter(classes))}: move one of them"
        )
    files = loose or [file for found in classes.values() for file in found]
    if not files:
        raise ValueError(f"images: {root} holds no pictures ({', '.join(PICTURES)})")
    bits = np.random.Philox(key=[0, 0]).random_raw(len(files))
    return [files[i] for i in np.argsort(bits, kind="stable")], tuple(classes)


class _Pictures:
    """The chosen picture files as a random-access source; refuses what is no picture or has another size, by name.

    Size and channels are those of the whole folder, so that every slice of it has the same.
    """

    def __init__(self, root: Path, every: list[Path], chosen: list[Path], classes: tuple[str, ...]):
        self.root, self.files, self.classes = root, chosen, classes
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = list(pool.map(self._look, every))
            digests = list(pool.map(self._digest, chosen))
        width, height = looks[0][0]
        for file, (size, _) in zip(every, looks, strict=True):
            if size != (width, height):
                raise ValueError(
                    f"images: {file} has {size[0]} x {size[1]} pixels, {every[0]} has {width} x {height}: "
                    "bring all to one size"
                )
        self.shape = (height, width, 1 if all(grey for _, grey in looks) else 3)
        self.fingerprint = hashlib.sha256(repr((self.shape, classes)).encode() + b"".join(digests)).hexdigest()

    def _look(self, file: Path) -> tuple[tuple[int, int], bool]:
        """Its size as one looks at it, and whether it is grey; from the header alone."""
        with self._open(file) as image:
            size = image.size
            if file.suffix.lower() in (".jpg", ".jpeg") and image.getexif().get(0x0112, 1) >= 5:
                size = size[::-1]  # the camera was held upright
            return size, image.mode in ("1", "L")

    def _digest(self, file: Path) -> bytes:
        label = self._label(file) if self.classes else 0
        return hashlib.sha256(label.to_bytes(4, "little") + file.read_bytes()).digest()

    def _label(self, file: Path) -> int:
        parts = file.relative_to(self.root).parts
        return next(self.classes.index(part) for part in parts[:2] if part in self.classes)

    def _open(self, file: Path):
        from PIL import Image

        try:
            image = Image.open(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise ValueError(f"images: {file} cannot be read as a picture") from e
        if image.mode.startswith("I") or image.mode == "F":
            image.close()
            raise ValueError(f"images: {file} has more than 8 bits a channel (mode {image.mode}): convert it")
        return image

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict:
        from PIL import Image, ImageOps

        file = self.files[i]
        with self._open(file) as image:
            try:
                if file.suffix.lower() in (".jpg", ".jpeg"):
                    image = ImageOps.exif_transpose(image)
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                pixels = np.asarray(image.convert("L" if self.shape[-1] == 1 else "RGB"))
            except (OSError, ValueError, SyntaxError) as e:
                raise ValueError(f"images: {file} is damaged") from e
        example = {"image": pixels.reshape(*pixels.shape[:2], self.shape[-1])}
        return example | ({"label": np.int32(self._label(file))} if self.classes else {})


def _cut(name: str, split: str, sizes: dict[str, int], read, *, levels: int) -> Data:
    """The examples that `split` names, out of whole splits."""
    pieces = [{key: a[start:stop] for key, a in read(s).items()} for s, start, stop in cuts(name, split, sizes)]
    arrays = {key: np.concatenate([p[key] for p in pieces]) for key in pieces[0]}
    if not len(arrays["image"]):
        raise ValueError(f"{name}: the split {split!r} is empty")
    return from_arrays(arrays, levels=levels, classes=10, source={"name": name, "split": split})


def _tfds(name: str, split: str, folder: str | None) -> Data:
    builder = prepared(name, folder)
    sizes = {s: info.num_examples for s, info in builder.info.splits.items()}
    return _cut(name, split, sizes, functools.partial(_read, str(builder.data_path)), levels=256)


@functools.lru_cache(maxsize=4)  # train and its validation slice come out of one reading
def _read(path: str, split: str) -> dict:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(path).as_data_source(split)
    examples = source.__getitems__(range(len(source)))
    return {
        "image": np.stack([e["image"] for e in examples]),
        "label": np.array([e["label"] for e in examples], np.int32),
    }
