"""Downloaded sets: found on this disk or fetched, verified, and prepared without TensorFlow.

The builders are TFDS builders, in the package `builders`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

# Debian ships the official Fashion-MNIST with other gzip headers. With the original time stamp and
# file name in the header, the bytes and so the checksums are the official ones.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_TIMES = {"train": 1504176606, "t10k": 1504176627}


# ------------------------------------------------------------------------------------------ slices


def cuts(
    name: str,
    split: str,
    sizes: dict[str, int],
    *,
    unit: str = "examples",
) -> list[tuple[str, int, int]]:
    """Returns [(split, start, stop), ...] for `split`: a whole split, or TFDS's slices joined by +.

    sizes: {split: how many there are}, counted in `unit`.

    Raises ValueError with the sizes for an unknown split, a slice that reaches beyond the end,
    and an empty one.
    """
    each = ", ".join(f"{part} has {size:,}" for part, size in sizes.items())
    counts = f"in {unit}: {each}"
    found = [(split, 0, sizes[split])] if split in sizes else _slices(name, split, sizes, counts)
    if not any(stop > start for _, start, stop in found):
        raise ValueError(f"{name}: {split!r} is empty ({counts})")
    return found


def _slices(
    name: str,
    split: str,
    sizes: dict[str, int],
    counts: str,
) -> list[tuple[str, int, int]]:
    import tensorflow_datasets as tfds

    def absolute(sizes):
        infos = {}
        for part, n in sizes.items():
            infos[part] = tfds.core.SplitInfo(name=part, shard_lengths=[n], num_bytes=0)
        return tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)

    try:
        parsed = absolute(sizes)
    except (ValueError, AssertionError, KeyError) as e:
        try:  # does it fit splits that are long enough?
            absolute(dict.fromkeys(sizes, 1 << 62))
        except (ValueError, AssertionError, KeyError):
            examples = [f"{next(iter(sizes))}[:50%]", *["+".join(sizes)] * (len(sizes) > 1)]
            there = f"it has {', '.join(sizes)}, and slices such as {', '.join(examples)}"
            raise ValueError(f"{name} has no split {split!r}; {there} ({counts})") from e
        example = f"{next(part for part in reversed(sizes) if part in split)}[:50%]"
        advice = f"take a smaller slice, or a share like {example}"
        raise ValueError(
            f"{name}: {split!r} asks for more than there is ({counts}): {advice}",
        ) from e
    found = []
    for cut in parsed:
        stop = sizes[cut.splitname] if cut.to is None else cut.to
        found.append((cut.splitname, cut.from_ or 0, stop))
    return found


# --------------------------------------------------------------------------------------- preparing


def prepared(name: str, folder: str | None):
    """Returns a TFDS builder of the set with its array_record files on this disk.

    It prepares the set if that has not been done. It looks for the original files in this order:
    `folder`, AIGC_DATA/<name>, TFDS's data folder (already prepared), Debian's package, the
    network.

    Raises FileNotFoundError if there are no files, and ValueError for a file with a wrong
    checksum.
    """
    with _quiet():
        return _find_or_prepare(name, folder)


@contextlib.contextmanager
def _quiet():
    """Silences TFDS, which reports on stdout and through absl. We print one line instead."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _find_or_prepare(name: str, folder: str | None):
    module = importlib.import_module(f"aigc_jax.data.builders.{name}.{name}_dataset_builder")
    infos = module.Builder.url_infos
    wanted = {info.filename: (url, info.checksum, info.size) for url, info in infos.items()}
    builder = module.Builder(file_format="array_record")

    given = _given_folder(name, folder)
    files = _find(name, given, wanted) if given is not None else None
    if builder.is_prepared():
        return builder
    if files is None and (official := _official(name, builder.data_path.parent)):
        return official
    if files is None and name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        files = _debian_fashion_mnist(wanted)
    if files is None:
        _check_network(name, wanted)
    megabytes = sum(size for _, _, size in wanted.values()) / 1e6
    place = f"({megabytes:.0f} MB, once) in {builder.data_path}"
    print(f"preparing {name} {place}", file=sys.stderr)
    _prepare(builder, files or {})
    return builder


def _given_folder(name: str, folder: str | None) -> Path | None:
    """Returns `folder`, or AIGC_DATA/<name> if there is such a folder."""
    if folder is not None:
        return Path(os.path.expanduser(folder))
    if "AIGC_DATA" in os.environ:
        path = Path(os.path.expanduser(os.environ["AIGC_DATA"])) / name
        return path if path.is_dir() else None
    return None


def _prepare(builder, files: dict[str, Path | bytes]) -> None:
    """Prepares a set from its original files, or from the network if there are none."""
    import requests
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as manual:
        for filename, content in files.items():
            if isinstance(content, bytes):
                (Path(manual) / filename).write_bytes(content)
            else:
                (Path(manual) / filename).symlink_to(content.resolve())
        config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        wrong_file = tfds.download.download_manager.NonMatchingChecksumError
        try:
            builder.download_and_prepare(download_config=config)
        except (tfds.download.DownloadError, wrong_file, requests.RequestException) as e:
            cause = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            raise FileNotFoundError(
                f"{builder.name} cannot be downloaded ({cause}): try again, or copy "
                "its files into a folder and pass it as --data.folder FOLDER"
            ) from e


def _official(name: str, folder):
    """Returns a builder if TFDS's own builder has prepared the set as array_record, else None."""
    import tensorflow_datasets as tfds

    for path in sorted(Path(folder).glob("*/"), reverse=True):
        if not (path / "dataset_info.json").is_file():  # an interrupted preparation
            continue
        splits = (list(path.glob(f"{name}-{part}.array_record*")) for part in ("train", "test"))
        if all(splits):
            return tfds.builder_from_directory(path)
    return None


def _find(name: str, folder: Path, wanted: dict) -> dict[str, Path]:
    """Returns {official file name: path}. Files are recognised by checksum, under any name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}")
    by_size: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            by_size.setdefault(path.stat().st_size, []).append(path)
    found = {}
    for filename, (_, checksum, size) in wanted.items():
        for path in by_size.get(size, []):
            if hashlib.sha256(path.read_bytes()).hexdigest() == checksum:
                found[filename] = path
    if missing := [filename for filename in wanted if filename not in found]:
        wrong = [filename for filename in missing if (folder / filename).is_file()]
        if wrong:
            raise ValueError(
                f"{name}: {folder / wrong[0]} is not the official file (its sha256 should be "
                f"{wanted[wrong[0]][1]}); copy or download it again",
            )
        names = f"{', '.join(missing)} (recognised by checksum, under any name)"
        raise FileNotFoundError(f"{name}: {folder} lacks {names}")
    return found


def _debian_fashion_mnist(wanted: dict) -> dict[str, bytes]:
    """Returns {official file name: content}, with the official gzip headers."""
    files = {}
    for filename, (_, checksum, _) in wanted.items():
        content = (DEBIAN_FASHION_MNIST / filename).read_bytes()
        time = _FASHION_MNIST_TIMES[filename.split("-")[0]].to_bytes(4, "little")
        original = filename.removesuffix(".gz").encode()
        header = b"\x1f\x8b\x08\x08" + time + b"\x00\x03" + original + b"\x00"
        files[filename] = header + content[10:]
        if hashlib.sha256(files[filename]).hexdigest() != checksum:
            path = DEBIAN_FASHION_MNIST / filename
            raise ValueError(f"fashion_mnist: {path} is not the official file; pass a folder")
    return files


def _check_network(name: str, wanted: dict) -> None:
    """Makes one request with a short time limit: without a network TFDS would try for minutes."""
    url = next(iter(wanted.values()))[0]
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except OSError as e:
        where = f"{name} is not on this machine"
        if root := os.environ.get("AIGC_DATA"):
            where = f"there is no folder {Path(root) / name} (AIGC_DATA)"
        debian = "install Debian's dataset-fashion-mnist, or " if name == "fashion_mnist" else ""
        raise FileNotFoundError(
            f"{where}, and {url} cannot be reached ({getattr(e, 'reason', e)}): "
            f"{debian}copy {', '.join(wanted)} into a folder and pass it as --data.folder FOLDER, "
            f"or set AIGC_DATA to a root that holds it as {name}/",
        ) from e
