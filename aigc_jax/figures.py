"""Figures: image grids, scatter plots, curves and pages of text, in one style.

A web page shows a figure at most 838 pixels wide. So every figure is made for that width: it is
WIDTH inches wide, a row holds at most MOST panels, and no text is smaller than LEAST pixels.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Num, Shaped

# Ten colours for ten classes. The first seven are those of Okabe & Ito 2008, for colour-blind
# readers and grey print. Lines differ in dash too.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#332288", "#A50026", "#BDB76B"),
)
DASHES = ("-", "--", "-.", ":")
PIXELS = 838  # the width at which a page shows a figure
WIDTH = 8.38  # inches of every figure, so that at PIXELS an inch is 100 pixels
MOST = 3  # panels in a row
PLAIN_WEIGHTS = (400, 500, "normal", "regular", "medium", "book")  # of fonts for other scripts
LEAST = 9  # pixels at PIXELS: no text is smaller
SMALLEST = f"smallest text at {PIXELS} px"  # the key of a PNG's metadata
STYLE = {
    "font.size": 9.5,  # points; an exponent has 0.7 of them, which are 9.2 pixels
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
WRAP = {"break_long_words": False, "break_on_hyphens": False}  # of titles and captions
DIGIT = 0.729  # the height of a digit in the font, over the font's size

Images = Num[Array | np.ndarray, "N H W C"]
Points = Num[Array | np.ndarray, "N 2"]
Labels = Shaped[Array | np.ndarray, " N"]


def _in_our_style(draw):
    """Applies STYLE during a call. Matplotlib reads its settings at each call; yours stay."""

    @functools.wraps(draw)
    def wrapped(*args, **options):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return wrapped


# ------------------------------------------------------------------------------------- image files


def tile(images: Images, columns: int | None = None, *, pad: int = 1) -> np.ndarray:
    """Returns images [N, H, W, C] in [0, 1] as one image [H', W', C], row by row.

    There are `pad` white pixels between them. `columns` makes the grid about square by default.

    Raises ValueError if the last axis does not have 1, 3 or 4 channels.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
        advice = ""
        if images.ndim == 3:
            advice = "; add the axis of a single channel: images[..., None]"
        elif images.shape[1:2] in ((1,), (3,), (4,)):
            advice = "; channels come last: images.transpose(0, 2, 3, 1)"
        got = f"{list(images.shape)}{advice}"
        raise ValueError(f"images must be [N, H, W, C] with 1, 3 or 4 channels, got {got}")
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    grid = np.ones((rows * (h + pad) + pad, columns * (w + pad) + pad, c), np.float32)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        grid[y : y + h, x : x + w] = image
    return grid


def save_images(
    path: str | Path,
    images: Images,
    columns: int | None = None,
    *,
    smallest: int = 512,
) -> None:
    """Writes a PNG of an image grid and nothing else.

    A small grid is enlarged by a whole factor, to about `smallest` pixels on its longer side.
    """
    _to_pillow(_enlarged_grid(images, columns, smallest)).save(os.path.expanduser(path), "PNG")


def save_image(path: str | Path, image: Num[Array | np.ndarray, "H W C"]) -> None:
    """Writes one image in [0, 1], with 1 or 3 channels, as a PNG of exactly its pixels."""
    _to_pillow(_to_uint8(np.asarray(image))).save(os.path.expanduser(path), "PNG")


def save_animation(
    path: str | Path,
    frames,
    columns: int | None = None,
    *,
    smallest: int = 512,
    ms: int = 80,
) -> None:
    """Writes a GIF of image grids [F, N, H, W, C] in [0, 1].

    Each frame is shown for `ms` milliseconds, the last one for two seconds.
    """
    grids = []
    for images in frames:
        pixels = _enlarged_grid(images, columns, smallest)
        # 32 colours per frame. Without dithering noise the enlarged pixels compress well.
        grids.append(_to_pillow(pixels).quantize(32))
    grids[0].save(
        os.path.expanduser(path),
        "GIF",
        save_all=True,
        append_images=grids[1:],
        duration=[ms] * (len(grids) - 1) + [2000],
        loop=0,
    )


def _enlarged_grid(images: Images, columns: int | None, smallest: int) -> np.ndarray:
    """Returns a grid as uint8 [H, W, C], enlarged by a whole factor."""
    pixels = _to_uint8(tile(images, columns))
    factor = max(1, smallest // max(pixels.shape[:2]))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _to_pillow(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


# ----------------------------------------------------------------------------------------- figures


@_in_our_style
def figure(rows: int, columns: int, *, size: tuple[float | int, float | int] | None = None):
    """Returns a figure that needs no display, and its axes [rows, columns].

    The figure is WIDTH inches wide. More than MOST columns are drawn in several rows of panels.
    `size` is the (width, height) of a figure without such breaks, of which only the shape of its
    panels counts. By default square pictures fill the panels, and a single panel is half as high
    as wide. `save` writes the figure.
    """
    from matplotlib.figure import Figure

    breaks = -(-columns // MOST)  # rows of panels per row of axes
    across = -(-columns // breaks)
    panel = WIDTH / across  # its height in inches
    if size is not None:
        panel *= size[1] / rows / (size[0] / columns)
    else:
        panel *= 0.9 if across > 1 else 0.5
        panel += 0.3  # for the title
    fig = Figure(figsize=(WIDTH, rows * breaks * panel), layout="constrained")
    grid = fig.add_gridspec(rows * breaks, across)
    axes = np.empty((rows, columns), object)
    for i, j in np.ndindex(rows, columns):
        axes[i, j] = fig.add_subplot(grid[i * breaks + j // across, j % across])
    return fig, axes


@_in_our_style
def images(ax, pictures: Images, columns: int | None = None, *, title: str = "") -> None:
    """Draws an image grid on an axis; 0 is black, 1 is white."""
    grid = tile(pictures, columns)
    grid = grid[..., 0] if grid.shape[-1] == 1 else grid
    ax.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title)
    ax.set_axis_off()


@_in_our_style
def points(
    ax,
    x: Points,
    label: Labels | None = None,
    *,
    title: str = "",
    axes=("x_1", "x_2"),
) -> None:
    """Draws points [N, 2]. With labels each point is drawn as the number of its class.

    So the classes can be told apart without colours.
    """
    if label is None:
        ax.scatter(x[:, 0], x[:, 1], s=3, color=COLOURS[0], linewidths=0)
    else:
        for i, c in enumerate(np.unique(label)):
            of_class = x[label == c]
            colour = COLOURS[i % len(COLOURS)]
            style = {"s": 26, "marker": f"${c}$", "color": colour, "linewidths": 0.2}
            ax.scatter(of_class[:, 0], of_class[:, 1], **style, gid="numbers")
    ax.set(title=title, xlabel=axes[0], ylabel=axes[1])


@_in_our_style
def curves(ax, lines: Mapping[str, Any], *, xlabel: str, ylabel: str, title: str = "") -> None:
    """Draws named curves {name: (x, y)}. The axis labels should state units."""
    for i, (name, (x, y)) in enumerate(lines.items()):
        ax.plot(
            x,
            y,
            DASHES[i % len(DASHES)],
            color=COLOURS[i % len(COLOURS)],
            label=name,
            linewidth=1.5,
            marker="o" if len(x) <= 12 else None,
            markersize=4,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    whole = all(np.asarray(x).dtype.kind in "iu" for x, _ in lines.values())
    if whole and ax.get_xscale() == "linear":
        ax.xaxis.get_major_locator().set_params(integer=True)
    if len(lines) > 1:
        ax.legend()


@_in_our_style
def share_legend(fig) -> None:
    """Replaces the legends of panels with the same curves by one legend above all panels."""
    panels = [ax for ax in fig.axes if ax.get_legend() is not None]
    for ax in panels:
        ax.get_legend().remove()
    if panels:
        handles, names = panels[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))


@_in_our_style
def level(ax, value: float, name: str, *, at: float = 0.02, dash: str = "-") -> None:
    """Draws a horizontal line with its name on it, such as a number to compare curves with.

    The name begins at the share `at` of the axis; above a half it ends there.
    """
    ax.axhline(value, color="0.5", linewidth=0.8, linestyle=dash, zorder=1)
    where = {"xycoords": ("axes fraction", "data"), "xytext": (0, 1), "va": "bottom"}
    side = "left" if at <= 0.5 else "right"
    ax.annotate(name, (at, value), textcoords="offset points", ha=side, fontsize=8, **where)


@_in_our_style
def page(
    ax,
    text: str,
    *,
    title: str = "",
    columns: int = 76,
    rows: int = 30,
    size: float | int = 7,
) -> None:
    """Draws a page of text on an axis, `columns` characters wide and at most `rows` lines long.

    East Asian characters take two columns. A $ does not begin a formula. A control character,
    such as NUL, is shown as a dot. `save` chooses fonts that have the characters.
    """
    from rich.cells import cell_len, chop_cells

    shown: list[str] = []
    for line in text.splitlines():
        line = line.expandtabs().translate(dict.fromkeys(range(32), "\u00b7"))
        if cell_len(line) > len(line):
            wrapped = chop_cells(line, columns)
        else:
            wrapped = textwrap.wrap(line, columns, drop_whitespace=False)
        shown += wrapped or [""]
    ax.set_axis_off()
    ax.text(
        0,
        1,
        "\n".join(shown[:rows]),
        family="monospace",
        fontsize=size,
        va="top",
        transform=ax.transAxes,
        parse_math=False,
    )
    ax.set_title(title, parse_math=False)


@_in_our_style
def save(fig, path: str | Path, caption: str, *, kind: str | None = None) -> None:
    """Writes the figure with its caption below, so that it can be judged without its page.

    kind: a file format of matplotlib; by default that of the suffix of `path`.

    Titles, labels and the caption are broken into lines where they are too long. Text below LEAST
    pixels at the width of a page is enlarged. A PNG says in its metadata how large its smallest
    text is.

    Characters that the figure's font lacks are drawn in other installed fonts. If no font has
    them they become boxes, and the caption says so.
    """
    _set_sizes(fig)
    label = fig.supxlabel(caption, fontsize=8, parse_math=False)
    if note := _choose_fonts(fig):
        label.set_text(f"{label.get_text()}\n{note}")
    fig.draw_without_rendering()  # the ticks now have their text
    for text in _texts(fig):
        if (pixels := _pixels(fig, text)) < LEAST:
            text.set_fontsize(text.get_fontsize() * 1.001 * LEAST / pixels)
    for artist in _numbers(fig):
        if (pixels := _number_pixels(fig, artist)) < LEAST:
            artist.set_sizes(artist.get_sizes() * (1.001 * LEAST / pixels) ** 2)
    fig.draw_without_rendering()
    _thin_ticks(fig)
    _break_lines(fig, label)
    path = os.path.expanduser(path)
    if not (kind or Path(path).suffix):
        path = f"{path}.png"
    kind = kind or Path(path).suffix[1:]
    if kind != "png":
        fig.savefig(path, format=kind)
        return
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    _write_png(path, drawn, smallest_text(fig))


def _set_sizes(fig) -> None:
    """Gives titles, labels, ticks and legends the sizes of our style, whoever made them."""
    for ax in fig.axes:
        ax.tick_params(labelsize=STYLE["font.size"])
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_fontsize(STYLE["axes.titlesize"])
        if (legend := ax.get_legend()) is not None:
            legend.set_frame_on(STYLE["legend.frameon"])
            for text in legend.get_texts():
                text.set_fontsize(STYLE["legend.fontsize"])


# -------------------------------------------------------------------------------------- text sizes


def smallest_text(fig) -> float:
    """Returns the size of a figure's smallest visible text, in pixels where the figure is PIXELS
    wide; inf for a figure without text.

    It is the size of the font, as web pages count it. The exponents of a formula count, and so do
    the class numbers of `points`. Ticks have their text only after the figure was drawn.
    """
    texts = [_pixels(fig, text) for text in _texts(fig)]
    return min([*texts, *(_number_pixels(fig, each) for each in _numbers(fig))], default=np.inf)


def _visible(artist):
    """Yields an artist and all artists in it that can be seen."""
    if not artist.get_visible():
        return
    yield artist
    hidden = [] if getattr(artist, "axison", True) else [artist.xaxis, artist.yaxis]
    for child in artist.get_children():
        if child not in hidden:
            yield from _visible(child)


def _texts(fig) -> list:
    from matplotlib.text import Text

    return [x for x in _visible(fig) if isinstance(x, Text) and x.get_text().strip()]


def _numbers(fig) -> list:
    """Returns the class numbers that `points` draws as markers."""
    return [artist for artist in _visible(fig) if artist.get_gid() == "numbers"]


def _pixels(fig, text) -> float:
    from matplotlib import cbook
    from matplotlib.mathtext import MathTextParser

    points = text.get_fontsize()
    if text.get_parse_math() and cbook.is_math_text(text.get_text()):
        glyphs = MathTextParser("path").parse(text.get_text(), 72, text.get_fontproperties()).glyphs
        points = min((size for _, size, *_ in glyphs), default=points)
    return points / 72 / fig.get_figwidth() * PIXELS


def _number_pixels(fig, markers) -> float:
    points = float(np.sqrt(markers.get_sizes()).min()) / DIGIT
    return points / 72 / fig.get_figwidth() * PIXELS


def _thin_ticks(fig) -> None:
    """Leaves out ticks of x axes whose labels would touch."""
    from matplotlib.ticker import AutoLocator

    for ax in fig.axes:
        locator = ax.xaxis.get_major_locator()
        if ax.axison and isinstance(locator, AutoLocator):
            labels = [text for text in ax.get_xticklabels() if text.get_text()]
            widest = max((text.get_window_extent().width for text in labels), default=0)
            fitting = int(ax.get_window_extent().width // (widest + 10))
            locator.set_params(nbins=max(1, min(fitting, ax.xaxis.get_tick_space(), 9)))


def _break_lines(fig, caption) -> None:
    """Breaks titles, axis labels and the caption where they are longer than their place.

    The figure grows by the new lines, so that the panels do not shrink.
    """
    edge = fig.bbox.width
    grown: dict[object, float] = {"caption": _break_line(caption, edge - 10)}
    for ax in fig.axes:
        box, spec = ax.get_window_extent(), ax.get_subplotspec()
        room, row = box.width, None
        if spec is not None:
            # A title is centred over its axes, which labels move away from the panel's centre.
            panel = edge / spec.get_gridspec().ncols
            centre = (spec.colspan.start + spec.colspan.stop) / 2 * panel
            off = abs((box.x0 + box.x1) / 2 - centre)
            room = max(room, len(spec.colspan) * panel - 2 * off - 16)
            row = spec.rowspan.start
        lines = _break_line(ax.title, room) + _break_line(ax.xaxis.label, room)
        _break_line(ax.yaxis.label, 1.1 * box.height, upright=True)
        grown[row] = max(grown.get(row, 0), lines)
    fig.set_figheight(fig.get_figheight() + sum(grown.values()) / fig.dpi)


def _break_line(text, room: float, *, upright: bool = False) -> float:
    """Breaks a text at its spaces into lines of at most `room` pixels; returns how much it grew."""
    content, height = text.get_text(), text.get_window_extent().height
    columns = max(map(len, content.splitlines()), default=0)
    while columns > 8:
        box = text.get_window_extent()
        if (box.height if upright else box.width) <= room:
            break
        columns -= 1 + columns // 20
        text.set_text(_wrapped(content, columns))
    if "\n" in text.get_text():  # no line much shorter than the others
        count = text.get_text().count("\n")
        while _wrapped(content, columns - 1).count("\n") == count and columns > 8:
            columns -= 1
        text.set_text(_wrapped(content, columns))
    return text.get_window_extent().height - height


def _wrapped(content: str, columns: int) -> str:
    lines = (textwrap.wrap(line, columns, **WRAP) or [""] for line in content.splitlines())
    return "\n".join(line for some in lines for line in some)


def _write_png(path: str, drawn: io.BytesIO, smallest: float) -> None:
    """Writes a drawn PNG, with 256 colours where that cannot be seen, and its metadata."""
    from PIL import Image, PngImagePlugin

    picture = Image.open(drawn).convert("RGB")
    few = picture.quantize(256, kmeans=3, dither=Image.Dither.NONE)
    error = np.abs(np.asarray(few.convert("RGB"), np.int16) - np.asarray(picture, np.int16))
    if (error > 20).mean() <= 1e-3 and error.mean() <= 0.5:  # of 255 levels
        picture = few
    about = PngImagePlugin.PngInfo()
    about.add_text(SMALLEST, f"{smallest:.2f}")
    picture.save(path, "PNG", optimize=True, pnginfo=about, dpi=(150, 150))


# ------------------------------------------------------------------------------------------- fonts


def _choose_fonts(fig) -> str:
    """Gives every text of a figure fonts that have its characters.

    Characters that no font has become boxes. Returns a note on how many there are, or "".
    """
    from matplotlib import cbook
    from matplotlib.text import Text

    without_font: set[str] = set()
    for text in fig.findobj(Text):
        content = text.get_text()
        is_formula = text.get_parse_math() and cbook.is_math_text(content)
        if content.isascii() or is_formula:
            continue
        families, missing = _fonts(text.get_fontfamily(), content)
        text.set_fontfamily(families)
        text.set_text(content.translate(dict.fromkeys(map(ord, missing), "\u25a1")))
        without_font |= {*missing}
    if not without_font:
        return ""
    count = len(without_font)
    return f"no font on this machine has {count} of these characters, shown as \u25a1"


def _fonts(families: list[str], text: str) -> tuple[list[str], str]:
    """Returns font families that together have the text's characters; characters without a font.

    The given families come first. The others are those that have most of what is missing.
    """
    from matplotlib import font_manager

    missing = set(map(ord, text)) - {10}
    for family in families:
        font = font_manager.FontProperties(family=[family])
        missing -= _code_points(str(font_manager.findfont(font)))
    if missing:
        _add_new_fonts()
    files = _plain_fonts()
    while missing:
        found = {name: len(missing & _code_points(file)) for name, file in sorted(files.items())}
        best = max(found, key=lambda name: (found[name], "Mono" in name), default=None)
        if best is None or not found[best]:
            break
        families, missing = [*families, best], missing - _code_points(files[best])
    return families, "".join(map(chr, sorted(missing)))


@functools.cache
def _add_new_fonts() -> None:
    """Adds fonts that were installed after Matplotlib had listed the machine's fonts."""
    from matplotlib import font_manager

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted({*font_manager.findSystemFonts()} - listed):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # damaged, or of another form
            font_manager.fontManager.addfont(path)


def _plain_fonts() -> dict[str, str]:
    """Returns {name: file} of the upright fonts of normal or medium weight.

    Matplotlib's last resort is left out, because it has a box for every character. So are TeX's
    fonts, whose code points stand for other characters.
    """
    from matplotlib import font_manager

    files = {}
    for font in font_manager.fontManager.ttflist:
        plain = font.style == font.stretch == "normal" and font.weight in PLAIN_WEIGHTS
        if plain and not font.name.startswith(("Last Resort", "cm", "STIX")):
            files[font.name] = font.fname
    return files


@functools.lru_cache(maxsize=256)
def _code_points(path: str) -> frozenset[int]:
    """Returns the characters of a font file; none for a bitmap font, which cannot be scaled."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):  # damaged, or removed since matplotlib listed it
        return frozenset()
