"""Pictures: image grids, maps of points, curves, one look for all of them."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Num, Shaped

# Okabe & Ito 2008: distinct to colour-blind eyes and in grey print; lines differ in dash as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
LOOK = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def _in_our_look(draw):
    """matplotlib reads its settings at each call; the user's own stay as they are."""

    @functools.wraps(draw)
    def wrapped(*args, **options):
        import matplotlib

        with matplotlib.rc_context(LOOK):
            return draw(*args, **options)

    return wrapped


Images = Num[Array | np.ndarray, "N H W C"]
Points = Num[Array | np.ndarray, "N 2"]
Labels = Shaped[Array | np.ndarray, " N"]


def tile(images: Images, columns: int | None = None, *, pad: int = 1) -> np.ndarray:
    """Images [N, H, W, C] in [0, 1] as one picture [H', W', C], row by row, white between them.

    Raises ValueError where the last axis is not 1, 3 or 4 channels.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
        advice = "; channels come last: images.transpose(0, 2, 3, 1)" if images.shape[1:2] in ((1,), (3,), (4,)) else ""
        advice = "; a single channel is an axis too: images[..., None]" if images.ndim == 3 else advice
        raise ValueError(f"images must be [N, H, W, C] with 1, 3 or 4 channels, got {list(images.shape)}{advice}")
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.ones((rows * (h + pad) + pad, columns * (w + pad) + pad, c), np.float32)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        sheet[y : y + h, x : x + w] = image
    return sheet


def save_images(path: str | Path, images: Images, columns: int | None = None, *, smallest: int = 512) -> None:
    """A PNG of the images and nothing else; small ones are enlarged by whole pixels to about `smallest` on a side."""
    from PIL import Image

    sheet = tile(images, columns)
    pixels = np.clip(sheet * 255 + 0.5, 0, 255).astype(np.uint8)
    times = max(1, smallest // max(pixels.shape[:2]))
    pixels = pixels.repeat(times, 0).repeat(times, 1)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(os.path.expanduser(path), "PNG")


def save_image(path: str | Path, image: Num[Array | np.ndarray, "H W C"]) -> None:
    """Writes one image in [0, 1], of 1 or 3 channels, as a PNG of exactly its pixels."""
    from PIL import Image

    pixels = np.clip(np.asarray(image) * 255 + 0.5, 0, 255).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(os.path.expanduser(path), "PNG")


def save_animation(path: str | Path, frames, columns: int | None = None, *, smallest: int = 512, ms: int = 80) -> None:
    """A GIF of image grids [F, N, H, W, C] in [0, 1], `ms` milliseconds a frame and two seconds the last."""
    from PIL import Image

    sheets = []
    for images in frames:
        pixels = np.clip(tile(images, columns) * 255 + 0.5, 0, 255).astype(np.uint8)
        times = max(1, smallest // max(pixels.shape[:2]))
        pixels = pixels.repeat(times, 0).repeat(times, 1)
        # 32 colours for each frame: whole pixels compress well, their noise does not.
        sheets.append(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).quantize(32))
    durations = [ms] * (len(sheets) - 1) + [2000]
    sheets[0].save(os.path.expanduser(path), "GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)


@_in_our_look
def figure(rows: int, columns: int, *, size: tuple[float | int, float | int]):
    """A figure without a display, and its axes [rows, columns]; finish it with `save`. Sizes in inches."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


@_in_our_look
def images(ax, pictures: Images, columns: int | None = None, *, title: str = "") -> None:
    """An image grid on an axis; 0 is black, 1 white."""
    sheet = tile(pictures, columns)
    ax.imshow(sheet[..., 0] if sheet.shape[-1] == 1 else sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title)
    ax.set_axis_off()


@_in_our_look
def points(ax, x: Points, label: Labels | None = None, *, title: str = "", axes=("x_1", "x_2")) -> None:
    """Points [N, 2]; with labels each class is drawn as its own number, which needs no colour to be read."""
    if label is None:
        ax.scatter(x[:, 0], x[:, 1], s=3, color=COLOURS[0], linewidths=0)
    else:
        for i, c in enumerate(np.unique(label)):
            at = label == c
            ax.scatter(x[at, 0], x[at, 1], s=22, marker=f"${c}$", color=COLOURS[i % len(COLOURS)], linewidths=0.2)
    ax.set(title=title, xlabel=axes[0], ylabel=axes[1])


@_in_our_look
def curves(ax, lines: Mapping[str, Any], *, xlabel: str, ylabel: str, title: str = "") -> None:
    """Named curves {name: (x, y)}; labels carry the units."""
    for i, (name, (x, y)) in enumerate(lines.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "label": name, "linewidth": 1.5}
        ax.plot(x, y, DASHES[i % len(DASHES)], marker="o" if len(x) <= 12 else None, markersize=4, **style)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(lines) > 1:
        ax.legend()


@_in_our_look
def page(ax, text: str, *, title: str = "", columns: int = 76, rows: int = 30, size: float | int = 7) -> None:
    """A page of text on an axis, `columns` narrow characters wide, of which East Asian ones take two; $ is no formula.

    `save` sees to the fonts. A control character, such as NUL, is shown as a dot.
    """
    from rich.cells import cell_len, chop_cells

    shown: list[str] = []
    for line in text.splitlines():
        line = line.expandtabs().translate(dict.fromkeys(range(32), "\u00b7"))
        wide = cell_len(line) > len(line)
        cut = chop_cells(line, columns) if wide else textwrap.wrap(line, columns, drop_whitespace=False)
        shown += cut or [""]
    ax.set_axis_off()
    ax.text(0, 1, "\n".join(shown[:rows]), family="monospace", fontsize=size, va="top", transform=ax.transAxes,
            parse_math=False)  # fmt: skip
    ax.set_title(title, parse_math=False)


@functools.lru_cache(maxsize=256)
def _glyphs(path: str) -> frozenset[int]:
    """The code points that a font has; none for one of bitmaps alone, which matplotlib cannot scale."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):  # removed since the list was made, or broken
        return frozenset()


def _fonts(families: list[str], text: str) -> tuple[list[str], str]:
    """Families of fonts that write the text, the given ones first, and the characters that none on this machine has."""
    from matplotlib import font_manager

    missing = set(map(ord, text)) - {10}
    for family in families:
        missing -= _glyphs(str(font_manager.findfont(font_manager.FontProperties(family=[family]))))
    # Plain faces alone; matplotlib's last resort has a box for each character, TeX's fonts have others in their places.
    plain = {
        font.name: font.fname for font in font_manager.fontManager.ttflist
        if (font.style, font.stretch, font.weight) in (("normal", "normal", 400), ("normal", "normal", "normal"))
        and not font.name.startswith(("Last Resort", "cm", "STIX"))
    }  # fmt: skip
    while missing:
        most = max(sorted(plain), key=lambda name: (len(missing & _glyphs(plain[name])), "Mono" in name), default=None)
        if most is None or not missing & _glyphs(plain[most]):
            break
        families, missing = [*families, most], missing - _glyphs(plain[most])
    return families, "".join(map(chr, sorted(missing)))


def _spell(fig) -> str:
    """Gives every text of a figure fonts that have its characters, and says which are left, shown as boxes."""
    from matplotlib import cbook
    from matplotlib.text import Text

    left: set[str] = set()
    for text in fig.findobj(Text):
        written = text.get_text()
        if written.isascii() or (text.get_parse_math() and cbook.is_math_text(written)):
            continue
        families, missing = _fonts(text.get_fontfamily(), written)
        text.set_fontfamily(families)
        text.set_text(written.translate(dict.fromkeys(map(ord, missing), "\u25a1")))
        left |= {*missing}
    return f"no font on this machine has {len(left)} of these characters, shown as \u25a1" if left else ""


@_in_our_look
def save(fig, path: str | Path, caption: str, *, kind: str | None = None) -> None:
    """Writes the figure with its setting under it, so that a picture that travels alone can still be judged.

    Characters that the figure's font lacks are taken from others that are installed. Where none has them they become
    boxes, and the caption says so.
    """
    said = fig.supxlabel(caption, fontsize=7, parse_math=False)
    if note := _spell(fig):
        said.set_text(f"{said.get_text()}\n{note}")
    fig.savefig(os.path.expanduser(path), format=kind)
