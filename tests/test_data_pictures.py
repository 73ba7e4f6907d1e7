"""Pictures of one's own: folders of files, and sets that are read while training."""

import dataclasses
import os
import struct
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from aigc_jax import data, train, vae
from aigc_jax.data import picture_folder, pictures

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
    return {
        image.tobytes(): int(label)
        for image, label in zip(arrays["image"], arrays["label"], strict=True)
    }


def test_sub_folders_are_classes_in_alphabetical_order(folder):
    (folder / "ant" / "notes.txt").write_text("not a picture")
    (folder / "empty").mkdir()
    source = data.load(f"images:{folder}")
    assert (source.info.shape, source.info.levels, source.info.classes, source.info.examples) == (
        (4, 6, 1),
        256,
        2,
        40,
    )
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
    with pytest.raises(ValueError, match="hold different classes: train: a, b; test: b, c"):
        data.load(name)
    (tmp_path / "split" / "test").rename(tmp_path / "split" / "more")
    with pytest.raises(ValueError, match="more lies beside .*train, which is read as a split"):
        data.load(name)
    (tmp_path / "split" / "more").rename(tmp_path / "more")
    assert data.load(name).info.classes == 2  # a train/ alone is a split, not a class


def test_channels_are_those_of_the_whole_folder(folder):
    picture(0, "RGB").save(folder / "ant" / "colour.png")
    shapes = {
        data.load(f"images:{folder}", cut).info.shape for cut in ("train[:50%]", "train[50%:]")
    }
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
    expected = [
        np.asarray(picture(0, "RGB")),
        np.stack([picture(1)] * 3, -1),
        np.full((4, 6, 3), 255, np.uint8),
        turned,
    ]
    assert found == {np.ascontiguousarray(e).tobytes() for e in expected}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_says_how_a_picture_is_looked_at(tmp_path, turn, suffix):
    """By Pillow's own exif_transpose, in every format that carries EXIF; with sizes as one looks at them."""
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(3, "RGB", size=(8, 4)).save(tmp_path / f"a{suffix}", exif=exif)
    with Image.open(tmp_path / f"a{suffix}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    source = data.load(f"images:{tmp_path}")
    np.testing.assert_array_equal(source.resident[0]["image"][0], expected)
    assert source.info.shape == ((4, 8, 3) if turn < 5 else (8, 4, 3))


# ------------------------------------------------------------------------------------------------------ sizes and crops


def test_a_size_resizes_the_short_side_and_keeps_the_middle(tmp_path):
    """Squares of one colour beside each other: what is kept is the middle one, at every scale and either way up."""
    colours = ([255, 0, 0], [0, 255, 0], [0, 0, 255])
    for i, (side, upright) in enumerate(
        [(16, False), (16, True), (64, False), (8, False), (4, True)]
    ):
        strip = np.repeat(np.array(colours, np.uint8)[None], side, 0).repeat(side, 1)
        Image.fromarray(strip.swapaxes(0, 1) if upright else strip).save(tmp_path / f"{i}.png")
    source = data.load(f"images:{tmp_path}", size=8)
    assert source.info.shape == (8, 8, 3) and source.info.source["size"] == 8
    away = np.abs(
        source.resident[0]["image"].astype(int) - [0, 255, 0]
    )  # the edges see their neighbours
    assert away.max() < 80 and away[:, 2:6, 2:6].max() < 16


def test_resizing_takes_means_and_not_single_pixels(tmp_path):
    """A chessboard of single pixels becomes grey; taken pixel by pixel it would be black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    [image] = data.load(f"images:{tmp_path}", size=8).resident[0]["image"]
    assert abs(image.astype(float) - 127.5).max() < 12


def test_a_picture_of_the_size_itself_is_not_touched(folder):
    for file in sorted(folder.rglob("*.png")):
        with Image.open(file) as image:
            square = image.crop((0, 0, 4, 4))
        square.save(file)
    as_it_is, sized = (data.load(f"images:{folder}", **options) for options in ({}, {"size": 4}))
    np.testing.assert_array_equal(sized.resident[0]["image"], as_it_is.resident[0]["image"])
    others = {data.load(f"images:{folder}", size=size).info.fingerprint for size in (2, 3, 5)}
    assert len(others | {as_it_is.info.fingerprint}) == 4


def test_turned_then_cut(tmp_path):
    """The middle of what one looks at, not of what is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((8, 24, 3), np.uint8)
    stored[:4, 8:16] = 255  # upper half of the middle: the right half once it is turned
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    [image] = data.load(f"images:{tmp_path}", size=8).resident[0]["image"]
    np.testing.assert_array_equal(image[:, 5:], 255)
    np.testing.assert_array_equal(image[:, :3], 0)


def test_what_is_transparent_is_white_before_it_is_resized(tmp_path):
    """Black under full transparency must not darken an edge."""
    Image.fromarray(np.zeros((16, 16, 4), np.uint8), "RGBA").save(tmp_path / "a.png")
    [image] = data.load(f"images:{tmp_path}", size=4).resident[0]["image"]
    np.testing.assert_array_equal(image, 255)


@pytest.mark.parametrize("size", [0, -3, True])
def test_sizes_that_are_none(folder, size):
    with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
        data.load(f"images:{folder}", size=size)


def test_a_sized_set_streams_and_comes_back_by_its_source(folder):
    picture(50, size=(9, 5)).save(folder / "ant" / "large.png")
    held, streamed = (data.load(f"images:{folder}", size=3, stream=s) for s in (False, True))
    jax.tree.map(np.testing.assert_array_equal, held.batch(0, 0, 12), streamed.batch(0, 0, 12))
    source = dict(held.info.source)
    again = data.load(source.pop("name"), source.pop("split"), **source)
    assert again.info == held.info


def test_mixed_sizes_are_refused_with_both_files_named(folder):
    picture(1, size=(6, 5)).save(folder / "ant" / "odd.png")
    with pytest.raises(ValueError) as e:
        data.load(f"images:{folder}")
    assert "odd.png" in str(e.value) and str(e.value).count(".png") == 2
    assert "6 x 5" in str(e.value) and "6 x 4" in str(e.value) and "--data.size" in str(e.value)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda f: (f / "ant" / "torn.png").write_bytes(b"no picture"),
            "torn.png cannot be read as a picture",
        ),
        (
            lambda f: (f / "ant" / "half.png").write_bytes(
                (f / "ant" / "01.png").read_bytes()[:60]
            ),
            "half.png",
        ),
        (lambda f: picture(0).save(f / "loose.png"), "loose.png lies beside the class folder"),
        (
            lambda f: Image.fromarray(np.zeros((4, 6), np.uint16)).save(f / "ant" / "deep.png"),
            "more than 8 bits",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(folder, spoil, words):
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        data.load(f"images:{folder}")


def said(capfd, folder, **options):
    """The set and what loading it said, which is one line or none."""
    picture_folder.print_once.cache_clear()
    capfd.readouterr()
    source = data.load(f"images:{folder}", **options)
    out = capfd.readouterr()
    assert out.out == "" and len(out.err.splitlines()) <= 1
    return source, out.err.strip()


def test_nothing_left_out_is_nothing_said(folder, capfd):
    assert said(capfd, folder)[1] == ""


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints",
        "__MACOSX",
        "@eaDir",
        "lost+found",
        "$RECYCLE.BIN",
        ".git",
        "#snapshot",
        "@tmp",
        "RECYCLER",
        "FOUND.000",
        "found.017",
        "_gsdata_",
        "Network Trash Folder",
        "Temporary Items",
        "Thumbnails",
        "System Volume Information",
    ],
)
def test_folders_of_the_system_are_no_classes(folder, capfd, name):
    before = data.load(f"images:{folder}").info
    for at in (folder / name, folder / "ant" / name):
        at.mkdir()
        picture(0).save(at / "01-checkpoint.png")
    source, line = said(capfd, folder)
    assert source.info == before
    assert f"left out hidden or system files (2: {name}, ant/{name})" in line
    assert "the classes are 0 ant, 1 bee" in line


def test_a_picture_whose_name_begins_with_a_hash_is_one(folder, capfd):
    for name in ("#1.png", "@2.png"):
        picture(90).save(folder / "ant" / name)
    assert said(capfd, folder)[0].info.examples == 42


def test_what_is_no_picture_is_counted_by_its_reason(folder, capfd):
    before = data.load(f"images:{folder}").info
    for name in (
        "Thumbs.db",
        ".DS_Store",
        "._01.png",
        "notes.txt",
        "labels.csv",
        "a.heic",
        "b.heic",
        "suffixless",
    ):
        (folder / "bee" / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "ant" / "pipe.png")
    source, line = said(capfd, folder)
    assert source.info == before
    assert "hidden or system files (3: bee/.DS_Store, bee/._01.png, bee/Thumbs.db)" in line
    assert "files without a picture suffix (5: bee/a.heic, bee/b.heic, bee/labels.csv, ...)" in line
    assert "broken links (1: gone.png)" in line and "special files (1: ant/pipe.png)" in line
    assert said(capfd, folder)[1] == line
    data.load(f"images:{folder}", "train[:50%]")
    assert capfd.readouterr().err == ""  # once


def test_an_empty_class_is_named_with_the_numbers_of_the_others(folder, capfd):
    (folder / "ass").mkdir()
    (folder / "bat").mkdir()
    (folder / "bat" / "notes.txt").write_text("no picture")
    source, line = said(capfd, folder)
    assert source.info.classes == 2
    assert (
        "folders without pictures (2: ass, bat)" in line and "the classes are 0 ant, 1 bee" in line
    )


def test_linked_folders_are_read_and_loops_end(folder, tmp_path, capfd):
    before = by_bytes(data.load(f"images:{folder}"))
    (tmp_path / "elsewhere").mkdir()
    (folder / "bee").rename(tmp_path / "elsewhere" / "bees")
    (folder / "bee").symlink_to(tmp_path / "elsewhere" / "bees")
    source, line = said(capfd, folder)
    assert by_bytes(source) == before and line == ""
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "ant" / "self").symlink_to(folder / "ant" / "self")
    (tmp_path / "elsewhere" / "bees" / "back").symlink_to(folder / "ant")
    source, line = said(capfd, folder)
    assert by_bytes(source) == before
    assert "links to folders that are read anyway (2: ant/up, bee/back)" in line
    assert "broken links (1: ant/self)" in line
    for i in range(12):  # every folder linked to every other: their paths are 12!
        (folder / "ant" / f"d{i}").mkdir()
    for i in range(12):
        for j in range(12):
            (folder / "ant" / f"d{i}" / f"l{j}").symlink_to(folder / "ant" / f"d{j}")
    assert by_bytes(data.load(f"images:{folder}")) == before


def test_a_class_linked_twice_is_read_once(folder, capfd):
    (folder / "aaa").symlink_to(folder / "bee")
    source, line = said(capfd, folder)
    assert source.info.classes == 2 and "links to folders that are read anyway (1: aaa)" in line
    assert "folders without" not in line and "the classes are 0 ant, 1 bee" in line
    (folder / "aaa").rename(folder / "ant" / "aaa")
    assert "the classes" not in said(capfd, folder)[1]  # no class is missing


def tiff(*entries):
    """An EXIF block of (tag, type, count, value) whose values lie in the entries themselves."""
    body = b"".join(
        struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0")
        for tag, kind, count, value in entries
    )
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + b"\0\0\0\0"


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, in what the test itself reads
@pytest.mark.parametrize(
    "block, turned",
    [
        (b"Exif\0\0no TIFF at all", False),
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", False),
        (tiff((0x0112, 3, 1, b"\0\x09")), False),  # of 1..8
        (tiff((0x0112, 2, 4, b"six")), False),
        (tiff((0x0112, 5, 1, b"\0\0\0\xff")), False),
        (tiff((0x0112, 3, 2, b"\0\x06\0\x06")), True),
        (tiff((0x0112, 4, 1, b"\0\0\0\x06")), True),
        (
            tiff((0x0112, 3, 1, b"\0\x06"), (0x011A, 1, 1, b"\x48")),
            True,
        ),  # Pillow's exif_transpose: TypeError
    ],
)
def test_odd_exif_stops_nothing(tmp_path, capfd, block, turned):
    picture(70, size=(6, 6)).save(tmp_path / "odd.jpg", exif=block)
    with Image.open(tmp_path / "odd.jpg") as stored:
        expected = np.asarray(stored)
    source, line = said(capfd, tmp_path)
    np.testing.assert_array_equal(
        source.resident[0]["image"][0, ..., 0], np.rot90(expected, -1) if turned else expected
    )
    assert line == ""


def test_first_frames_copies_and_enlarged_pictures_are_said(folder, capfd):
    frames = [picture(i, size=(6, 4)) for i in (80, 81)]
    frames[0].save(folder / "ant" / "moves.gif", save_all=True, append_images=frames[1:])
    (folder / "bee" / "again.png").write_bytes((folder / "ant" / "01.png").read_bytes())
    source, line = said(capfd, folder)
    assert source.info.examples == 42
    assert "pictures with several frames, of which the first is used (1: ant/moves.gif)" in line
    assert (
        "copies of other files, which are kept (1: bee/again.png)" in line
        and "left out" not in line
    )
    assert "enlarged pictures (42: ant/01.png, " in said(capfd, folder, size=8)[1]


def test_modes_suffixes_and_names_of_all_kinds(tmp_path, capfd):
    """Read by what is in them: a JPEG called .PNG, CMYK, palettes, bits, grey with alpha; names with line ends."""
    grey = picture(0)
    grey.save(tmp_path / "a.png")
    grey.save(tmp_path / "UPPER.JPG")
    grey.convert("P").save(tmp_path / "palette.gif")
    grey.convert("1").save(tmp_path / "bits.tiff")
    grey.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpeg")
    grey.save(tmp_path / "wrong.png.bmp", format="PNG")
    (tmp_path / "a.png").rename(tmp_path / "line\nend \u732b.png")
    (tmp_path / os.fsdecode(b"latin\xe9.png")).write_bytes(
        (tmp_path / "wrong.png.bmp").read_bytes()
    )
    source, line = said(capfd, tmp_path)
    assert source.info.examples == 7 and source.info.shape == (4, 6, 3)
    assert "copies of other files, which are kept (2: " in line
    (tmp_path / "bad\nname.png").write_bytes(b"")
    with pytest.raises(ValueError, match="bad.*it is empty") as e:
        data.load(f"images:{tmp_path}")
    assert len(str(e.value).splitlines()) == 1


def test_grey_with_alpha_is_grey(tmp_path):
    picture(0, "LA").save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    assert data.load(f"images:{tmp_path}").info.shape == (4, 6, 1)


def test_every_file_that_cannot_be_used_is_counted(folder):
    for i in range(5):
        (folder / "ant" / f"torn{i}.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError,
        match="torn0.png cannot be .*; 4 more cannot be used: .*torn3.png, ...|torn4.png",
    ):
        data.load(f"images:{folder}")
    for file in folder.glob("ant/torn*"):
        file.write_bytes((folder / "ant" / "01.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="torn.*is damaged: .*; so are 4 more"):
        data.load(f"images:{folder}")


def test_a_picture_too_large_for_pillow_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # a warning from 10 on, an error from 20
    with pytest.raises(ValueError, match="01.png cannot be read as a picture .*exceeds limit"):
        data.load(f"images:{folder}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert data.load(f"images:{folder}").info.examples == 40


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "val"), ("train", "valid")]
)
def test_splits_by_their_usual_names(tmp_path, names):
    for part, numbers in zip(names, (range(6), range(6, 9)), strict=True):
        (tmp_path / part).mkdir()
        for i in numbers:
            picture(i).save(tmp_path / part / f"{i}.png")
    sizes = pictures.picture_splits(f"images:{tmp_path}")
    assert list(sizes.values()) == [6, 3] and set(sizes) in (
        {"train", "test"},
        {"train", "validation"},
    )
    assert data.load(f"images:{tmp_path}", "+".join(sizes)).info.examples == 9


def test_splits_that_cannot_be_told_apart(tmp_path, capfd):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for i in range(3):
            picture(i).save(tmp_path / part / f"{i}.png")
    (tmp_path / "test").mkdir()  # no pictures: said, and no split
    source, line = said(capfd, tmp_path)
    assert "folders without pictures (1: test)" in line and source.info.examples == 3
    (tmp_path / "val").rename(tmp_path / "Valid")
    (tmp_path / "validation").mkdir()
    picture(9).save(tmp_path / "validation" / "9.png")
    with pytest.raises(
        ValueError, match="Valid and .*validation are both read as the split validation"
    ):
        data.load(f"images:{tmp_path}")


@pytest.mark.parametrize("inner", ["pets/train", "pets/Test", "train/train"])
def test_a_split_that_lies_deeper_is_no_class(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True)
    picture(0).save(tmp_path / inner / "0.png")
    above = tmp_path / inner.split("/")[0]
    with pytest.raises(
        ValueError, match=f"holds nothing but .*name the folder above it, as images:{above}$"
    ):
        data.load(f"images:{tmp_path}")


@pytest.mark.parametrize("above", ["PetImages", "zip/PetImages"])
def test_classes_that_lie_deeper_are_not_one_class(tmp_path, above):
    for i in range(4):
        at = tmp_path / "top" / above / ("Cat", "Dog")[i % 2]
        at.mkdir(parents=True, exist_ok=True)
        picture(i).save(at / f"{i}.png")
    with pytest.raises(ValueError) as refused:
        data.load(f"images:{tmp_path / 'top'}")
    line = str(refused.value)
    assert (
        f"holds nothing but {above}/, whose folders Cat, Dog would be one class" in line
        and "\n" not in line
    )
    named = line.split()[-1]
    assert named == f"images:{tmp_path / 'top' / above}" and data.load(named).info.classes == 2
    (tmp_path / "top" / above / "Dog").rename(
        tmp_path / "dogs"
    )  # a single class may lie at any depth
    assert data.load(f"images:{tmp_path / 'top'}").info.classes == 1


def test_slices_take_the_other_names_of_a_split(tmp_path):
    for part, numbers in (("training", range(6)), ("val", range(6, 9))):
        (tmp_path / part).mkdir()
        for i in numbers:
            picture(i).save(tmp_path / part / f"{i}.png")
    name = f"images:{tmp_path}"
    for said, own in (
        ("val", "validation"),
        ("Valid[:2]", "validation[:2]"),
        ("training[:50%]+val[1:]", "train[:50%]+validation[1:]"),
    ):
        assert data.load(name, said).info.fingerprint == data.load(name, own).info.fingerprint
    with pytest.raises(
        ValueError, match=r"'validation\[:9\]' asks for more .* a share like validation\[:50%\]"
    ):
        data.load(name, "val[:9]")
    with pytest.raises(
        ValueError, match=r"no split 'testing'; it has train, validation, .*train\+validation \("
    ):
        data.load(name, "testing")
    with pytest.raises(
        ValueError, match=r"slices such as train\[:50%\] \(in examples: train has 6\)$"
    ):
        data.load(f"{name}/training", "val")


def test_a_class_named_as_a_split_keeps_its_label(tmp_path):
    """Vehicles: within train/ and test/ the class train is one like others."""
    for i in range(6):
        at = tmp_path / ("train", "test")[i // 3] / ("bus", "car", "train")[i % 3]
        at.mkdir(parents=True)
        picture(i).save(at / f"{i}.png")
    expected = {np.asarray(picture(i)).tobytes(): i % 3 for i in range(6)}
    assert by_bytes(data.load(f"images:{tmp_path}", "train+test")) == expected


def test_the_order_is_that_of_the_names_bytes(tmp_path, monkeypatch):
    """However the file system lists them."""
    for i, name in enumerate(("b", "B", "a", "\u00e9", "z", "10", "9")):
        picture(i).save(tmp_path / f"{name}.png")
    expected = data.load(f"images:{tmp_path}").resident[0]["image"]
    files = picture_folder.walk(tmp_path)[0]
    assert [file.stem for file in files] == ["10", "9", "B", "a", "b", "z", "\u00e9"]
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listed(self))))
    np.testing.assert_array_equal(data.load(f"images:{tmp_path}").resident[0]["image"], expected)


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    here = data.load("images:~/pictures")
    assert here.info.source["name"] == "images:~/pictures"
    assert here.info.fingerprint == data.load("images:x", folder="~/pictures").info.fingerprint
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load("images:~nobody-of-this-name/pictures")


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        data.load(f"images:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load(f"images:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="name a folder"):
        data.load("images:")
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="no pictures .*left out files without a picture suffix .1: a.heic"
    ):
        data.load(f"images:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="a.heic is a file, not a folder"):
        data.load(f"images:{tmp_path / 'a.heic'}")


def test_a_folder_that_moved_is_the_same_set_and_another_picture_is_not(folder):
    name = f"images:{folder}"
    before = data.load(name).info
    folder.rename(folder.with_name("moved"))
    assert data.load(name, folder=str(folder.with_name("moved"))).info == before
    picture(99).save(folder.with_name("moved") / "ant" / "01.png")
    assert (
        data.load(name, folder=str(folder.with_name("moved"))).info.fingerprint
        != before.fingerprint
    )


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
    monkeypatch.setattr(pictures, "RESIDENT_BYTES", 100)
    assert data.load(f"images:{folder}").resident is None


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_streamed_training_ends_with_the_resident_bits(folder, tmp_path, k):
    """Read ahead in threads, stopped, resumed: the bits of an unbroken run, the parameters of one in memory."""
    cfg = dataclasses.replace(CFG, shape=(4, 6, 1), levels=256)
    held, streamed = (data.load(f"images:{folder}", stream=s) for s in (False, True))

    def run(steps, name):
        return train.Run(
            folder=str(tmp_path / name),
            steps=steps,
            batch_size=16,
            steps_per_call=k,
            save_every=5,
            eval_every=5,
        )

    expected = train.fit(vae.make, cfg, run(17, "held"), held, valid=held).state
    unbroken = train.fit(vae.make, cfg, run(17, "unbroken"), streamed, valid=streamed).state
    train.fit(vae.make, cfg, run(8, "streamed"), streamed, valid=streamed)
    state = train.fit(vae.make, cfg, run(17, "streamed"), streamed, valid=streamed).state
    assert fingerprint(state) == fingerprint(unbroken)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, expected)
    scores = [
        train.metrics(tmp_path / name)[-1]["valid"]["nll_nats"] for name in ("held", "streamed")
    ]
    np.testing.assert_allclose(*scores, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"devices": 8}, {"devices": 8, "pmap": True}])
def test_streamed_batches_reach_every_device(folder, options):
    cfg = dataclasses.replace(CFG, shape=(4, 6, 1), levels=256)
    a, b = (
        train.fit(
            vae.make,
            cfg,
            train.Run(steps=4, batch_size=16, **options),
            data.load(f"images:{folder}", stream=s),
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


@pytest.mark.slow
def test_a_source_of_ones_own_is_read_in_the_order_of_arrays():
    source = Source()
    streamed = data.from_source(source, levels=17, classes=3)
    whole = {"image": np.stack([source[i]["image"] for i in range(30)]), "label": np.arange(30) % 3}
    held = data.from_arrays(whole, levels=17, classes=3)
    for i in (0, 5, 2):
        jax.tree.map(np.testing.assert_array_equal, streamed.batch(1, i, 8), held.batch(1, i, 8))
    source.readers.clear()
    train.fit(vae.make, CFG, train.Run(steps=5, batch_size=8), streamed)
    assert (
        source.readers and threading.current_thread().name not in source.readers
    )  # ahead of the training thread
    assert (
        data.from_source(Source(31), levels=17, classes=3).info.fingerprint
        != streamed.info.fingerprint
    )


@pytest.mark.parametrize(
    "source, options, words",
    [
        (Source(0), {"classes": 3}, "at least one example"),
        (Source(), {}, "how many classes"),
        (Source(), {"classes": 2}, "labels must lie in 0..1"),
        (Source(), {"classes": 3, "levels": 9}, "does not fit levels=9"),
        (
            Source(image=lambda i: np.zeros((8, 8 + (i == 29), 1), np.uint8)),
            {"classes": 3},
            "image 29 is",
        ),
        (
            Source(image=lambda i: np.zeros((8, 8, 1), np.float32)),
            {"classes": 3},
            "image must be uint8",
        ),
    ],
)
def test_sources_that_do_not_fit_are_refused(source, options, words):
    with pytest.raises(ValueError, match=words):
        data.from_source(source, **{"levels": 17, **options})


@pytest.mark.slow
def test_a_read_that_fails_is_said_and_what_was_trained_is_kept(tmp_path):
    """Example 29 breaks at first; once it is mended the run goes on, and ends with the bits of an unbroken one."""

    def broken(i):
        if i == 29:
            raise OSError(5, "Input/output error", "29.png")
        return np.random.default_rng(i).integers(0, 17, (8, 8, 1), dtype=np.uint8)

    whole, torn = (
        data.from_source(
            Source(image=image) if image else Source(), levels=17, classes=3, fingerprint="x"
        )
        for image in (None, broken)
    )
    run = train.Run(folder=str(tmp_path / "run"), steps=20, batch_size=4, devices=1)
    first = next(i for i in range(20) if 29 in data.order(30, 0, i, 4))
    with pytest.raises(
        train.ReadFailed,
        match=f"after step {first} the data cannot be read: .*29.png.*{first} stands",
    ):
        train.fit(vae.make, CFG, run, torn)
    assert int(train.load(run.folder).state.step) == first > 0
    again = train.fit(vae.make, CFG, run, whole).state
    unbroken = train.fit(vae.make, CFG, dataclasses.replace(run, folder=""), whole).state
    assert fingerprint(again) == fingerprint(unbroken)


@pytest.mark.slow
def test_a_validation_reads_no_further_than_its_end():
    source = Source()
    reads = []
    streamed = data.from_source(source, levels=17, classes=3)
    counted = streamed._replace(batch=lambda *at: (reads.append(at), streamed.batch(*at))[1])
    train.fit(
        vae.make,
        CFG,
        train.Run(steps=4, batch_size=8, eval_every=2, devices=1),
        data.load("digits"),
        valid=counted,
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
