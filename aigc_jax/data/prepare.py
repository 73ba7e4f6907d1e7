"""Sets that are downloaded: found on this disk or fetched, checked, prepared by TFDS builders without TensorFlow."""

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

# Debian ships the official Fashion-MNIST with another gzip header. With the original time stamp and file name put back
# the bytes, and so the checksums, are the official ones.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_TIMES = {"train": 1504176606, "t10k": 1504176627}


def cuts(name: str, split: str, sizes: dict[str, int], *, unit: str = "examples") -> list[tuple[str, int, int]]:
    """(split, start, stop) of what `split` names: a whole split, or TFDS's slices of some, joined.

    Raises ValueError with the splits' sizes, counted in `unit`, for an unknown split, a slice that reaches beyond what
    there is, and an empty one.
    """
    there = f"in {unit}: " + ", ".join(f"{part} has {size:,}" for part, size in sizes.items())
    found = [(split, 0, sizes[split])] if split in sizes else _slices(name, split, sizes, there)
    if not any(stop > start for _, start, stop in found):
        raise ValueError(f"{name}: {split!r} is empty ({there})")
    return found


def _slices(name: str, split: str, sizes: dict[str, int], there: str) -> list[tuple[str, int, int]]:
    import tensorflow_datasets as tfds

    def absolute(sizes):
        known = {s: tfds.core.SplitInfo(name=s, shard_lengths=[n], num_bytes=0) for s, n in sizes.items()}
        return tfds.core.ReadInstruction.from_spec(split).to_absolute(known)

    try:
        parsed = absolute(sizes)
    except (ValueError, AssertionError, KeyError) as e:
        try:
            absolute(dict.fromkeys(sizes, 1 << 62))
        except (ValueError, AssertionError, KeyError):
            slices = [f"{next(iter(sizes))}[:50%]", *["+".join(sizes)] * (len(sizes) > 1)]
            raise ValueError(
                f"{name} has no split {split!r}; it has {', '.join(sizes)}, and slices such as {', '.join(slices)} "
                f"({there})"
            ) from e
        example = f"{next(s for s in reversed(sizes) if s in split)}[:50%]"
        raise ValueError(
            f"{name}: {split!r} asks for more than there is ({there}): take a smaller slice, or a share like {example}"
        ) from e
    return [(c.splitname, c.from_ or 0, sizes[c.splitname] if c.to is None else c.to) for c in parsed]


def prepared(name: str, folder: str | None):
    """A TFDS builder of the set whose array_record files lie on this disk; prepared now where they did not yet.

    Tried in order: `folder`, AIGC_DATA/<name>, what TFDS's data folder holds already, Debian's package, the network.
    Raises FileNotFoundError where there is nothing, ValueError for a file of another checksum.
    """
    with _quiet():
        return _find_or_prepare(name, folder)


@contextlib.contextmanager
def _quiet():
    """TFDS reports on stdout and through absl what one line of ours says better."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _find_or_prepare(name: str, folder: str | None):
    import tensorflow_datasets as tfds

    builder_class = importlib.import_module(f"aigc_jax.data.builders.{name}.{name}_dataset_builder").Builder
    wanted = {info.filename: (url, info.checksum, info.size) for url, info in builder_class.url_infos.items()}
    builder = builder_class(file_format="array_record")

    given = Path(os.path.expanduser(folder)) if folder is not None else None
    if given is None and "AIGC_DATA" in os.environ:
        given = Path(os.path.expanduser(os.environ["AIGC_DATA"])) / name
        if not given.is_dir():
            given = None
    files = _find(name, given, wanted) if given is not None else None
    if builder.is_prepared():
        return builder
    if official := _official(name, builder.data_path.parent):
        return official
    if files is None and name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        files = _debian_fashion_mnist(wanted)
    if files is None:
        _look_for_network(name, wanted)

    size = sum(size for _, _, size in wanted.values()) / 1e6
    print(f"preparing {name} ({size:.0f} MB, once) in {builder.data_path}", file=sys.stderr)
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as manual:
        for filename, content in (files or {}).items():
            if isinstance(content, bytes):
                (Path(manual) / filename).write_bytes(content)
            else:
                (Path(manual) / filename).symlink_to(content.resolve())
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        )
    return builder


def _official(name: str, folder):
    """The set as someone prepared it with TFDS's own builder, if they did so as array_record."""
    import tensorflow_datasets as tfds

    for path in sorted(Path(folder).glob("*/"), reverse=True):
        if not (path / "dataset_info.json").is_file():  # what a preparation left that was killed
            continue
        if list(path.glob(f"{name}-train.array_record*")) and list(path.glob(f"{name}-test.array_record*")):
            return tfds.builder_from_directory(path)
    return None


def _find(name: str, folder: Path, wanted: dict) -> dict:
    """{official file name: path}, known by checksum: files keep whatever names they have."""
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
                f"{name}: {folder / wrong[0]} is not the official file (its sha256 should be {wanted[wrong[0]][1]}); "
                "copy or download it again"
            )
        raise FileNotFoundError(f"{name}: {folder} lacks {', '.join(missing)} (known by checksum, under any name)")
    return found


def _debian_fashion_mnist(wanted: dict) -> dict:
    files = {}
    for filename, (_, checksum, _) in wanted.items():
        content = (DEBIAN_FASHION_MNIST / filename).read_bytes()
        time = _FASHION_MNIST_TIMES[filename.split("-")[0]]
        header = (
            b"\x1f\x8b\x08\x08"
            + time.to_bytes(4, "little")
            + b"\x00\x03"
            + filename.removesuffix(".gz").encode()
            + b"\x00"
        )
        files[filename] = header + content[10:]
        if hashlib.sha256(files[filename]).hexdigest() != checksum:
            raise ValueError(
                f"fashion_mnist: {DEBIAN_FASHION_MNIST / filename} is not the official file; pass a folder"
            )
    return files


def _look_for_network(name: str, wanted: dict) -> None:
    """One request with a short limit: without a network TFDS would try for minutes."""
    url = next(iter(wanted.values()))[0]
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except OSError as e:
        debian = "install Debian's dataset-fashion-mnist, or " if name == "fashion_mnist" else ""
        root = os.environ.get("AIGC_DATA")
        where = f"there is no folder {Path(root) / name} (AIGC_DATA)" if root else f"{name} is not on this machine"
        raise FileNotFoundError(
            f"{where}, and {url} cannot be reached ({getattr(e, 'reason', e)}): {debian}copy {', '.join(wanted)} "
            f"into a folder and pass it as --data.folder FOLDER, or set AIGC_DATA to a root that holds it as {name}/"
        ) from e
