"""Pictures with captions of one's own: text files beside pictures, or one captions.tsv."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from PIL import Image

from aigc_jax import data, train, vae
from aigc_jax.commands import runs
from aigc_jax.data import captions, pairs, picture_folder

from .trainee import CFG

TEXTS = ("a red cat", "two dogs, asleep", "A cat on a dog", "the sun", "a dog", "no cat")


def picture(i, size=(6, 4)):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0]), dtype=np.uint8))


def fill(folder, texts=TEXTS, form="txt", first=0):
    """Writes pictures with captions, in one of the two forms."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + len(texts)):
        picture(i).save(folder / f"{i}.png")
        if form == "txt":
            (folder / f"{i}.txt").write_text(f"{texts[i - first]}\n")
    if form == "tsv":
        lines = [f"{i}.png\t{text}\n" for i, text in enumerate(texts, first)]
        (folder / "captions.tsv").write_text("".join(lines))
    return folder


@pytest.fixture(params=["txt", "tsv"])
def folder(request, tmp_path):
    return fill(tmp_path / "pairs", form=request.param)


def said(capfd, folder, split="train", **options):
    """The set and what loading it said, which is one line or none."""
    picture_folder.print_once.cache_clear()
    capfd.readouterr()
    source = data.load(f"pairs:{folder}", split, **options)
    out = capfd.readouterr()
    assert out.out == "" and len(out.err.splitlines()) <= 1
    return source, out.err.strip()


def texts_of(source):
    """{pixels: caption} of every example, as its tokens say it."""
    arrays = source.resident[0]
    texts = captions.decode(source.info.tokenizer, arrays["tokens"])
    return {image.tobytes(): text for image, text in zip(arrays["image"], texts, strict=True)}


def expected(texts=TEXTS, rows=None):
    rows = range(len(texts)) if rows is None else rows
    return {np.asarray(picture(i)).tobytes(): texts[i].lower() for i in rows}


def test_each_picture_has_its_caption(folder, capfd):
    source, line = said(capfd, folder)
    assert texts_of(source) == expected() and line == ""
    info = source.info
    assert (info.kind, info.shape, info.classes, info.examples) == ("image", (4, 6, 1), None, 6)
    assert info.caption_length == 32 and info.class_names == ()
    words = data.text.Tokenizer(info.tokenizer).vocabulary
    assert words == tuple(sorted({w for t in TEXTS for w in t.lower().replace(",", " ,").split()}))
    assert info.caption_vocab == len(words) + 1
    tokens = source.batch(0, 0, 4)["tokens"]
    assert tokens.dtype == np.int32 and tokens.shape == (4, 32)


def test_both_forms_are_the_same_set(tmp_path):
    one, two = (fill(tmp_path / form, form=form) for form in ("txt", "tsv"))
    infos = [data.load(f"pairs:{tmp_path}", folder=str(at)).info for at in (one, two)]
    assert infos[0] == infos[1]


def test_fingerprint_sees_captions_words_and_length(folder):
    before = data.load(f"pairs:{folder}").info
    found = {before.fingerprint, data.load(f"pairs:{folder}", length=9).info.fingerprint}
    for path in (folder / "3.txt", folder / "captions.tsv"):
        if path.is_file():
            path.write_text(path.read_text().replace("the sun", "sun the"))
    found.add(data.load(f"pairs:{folder}").info.fingerprint)
    assert len(found) == 3
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert data.load("pairs:x", folder=str(moved)).info.fingerprint in found


def test_a_set_comes_back_by_its_source(folder):
    info = data.load(f"pairs:{folder}", size=3, length=5, labels=False, stream=True).info
    source = dict(info.source)
    assert data.load(source.pop("name"), source.pop("split"), **source).info == info


def test_streamed_batches_are_the_resident_ones(folder):
    held, streamed = (data.load(f"pairs:{folder}", stream=stream) for stream in (False, True))
    assert held.resident and streamed.resident is None
    assert held.info == dataclasses.replace(streamed.info, source=held.info.source)
    for i in range(3):
        ours, theirs = streamed.batch(1, i, 4), held.batch(1, i, 4)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert {name: a.dtype for name, a in ours.items()} == {
            name: a.dtype for name, a in theirs.items()
        }


# ----------------------------------------------------------------------------- splits and classes


@pytest.mark.parametrize("form", ["txt", "tsv"])
def test_splits_and_classes_are_those_of_images(tmp_path, form, capfd):
    lines = ["file\tcaption\n"]
    for i in range(12):
        at = tmp_path / ("train", "val")[i // 8] / ("ant", "bee")[i % 2]
        at.mkdir(parents=True, exist_ok=True)
        picture(i).save(at / f"{i}.png")
        text = f"picture {i} is {'new' if i > 10 else 'old'}"
        lines.append(f"{at.relative_to(tmp_path)}/{i}.png\t{text}\n")
        if form == "txt":
            (at / f"{i}.TXT").write_text(text)
    if form == "tsv":
        (tmp_path / "captions.tsv").write_text("".join(lines))
    training, line = said(capfd, tmp_path)
    assert (training.info.examples, training.info.classes) == (8, 2)
    assert training.info.class_names == ("ant", "bee") and line == ""
    images = data.load(f"images:{tmp_path}")
    assert images.info.class_names == ("ant", "bee")
    for name in ("image", "label"):
        np.testing.assert_array_equal(images.resident[0][name], training.resident[0][name])
    valid, line = said(capfd, tmp_path, "val")
    assert valid.info.tokenizer == training.info.tokenizer
    assert "words that the vocabulary does not have, which are left out (5: " in line
    assert "new" in line
    assert set(texts_of(valid).values()) == {"picture is old", "picture is"}
    assert data.load(f"pairs:{tmp_path}", "train+validation[:1]").info.examples == 9
    every = data.load(f"pairs:{tmp_path}", labels=False)
    assert every.info.examples == 12 and every.info.classes is None
    assert "new" in data.text.Tokenizer(every.info.tokenizer).vocabulary


def test_slices_share_their_words(folder):
    first, rest = (data.load(f"pairs:{folder}", cut) for cut in ("train[:2]", "train[2:]"))
    assert first.info.tokenizer == rest.info.tokenizer
    assert texts_of(first) | texts_of(rest) == expected()
    with pytest.raises(ValueError, match=r"pairs:.* has no split 'test'; it has train"):
        data.load(f"pairs:{folder}", "test")


def test_a_folder_without_train_has_the_words_of_all(tmp_path):
    fill(tmp_path / "test")
    assert texts_of(data.load(f"pairs:{tmp_path}", "test")) == expected()


def test_the_words_of_another_run(folder, tmp_path, capfd):
    file = tmp_path / "tokenizer.json"
    data.text.Tokenizer.words(["a cat", "a dog"]).save(file)
    source, line = said(capfd, folder, tokenizer=str(file))
    assert source.info.caption_vocab == 4 and source.info.source["tokenizer"] == str(file)
    assert set(texts_of(source).values()) == {"a cat", "", "a cat a dog", "a dog", "cat"}
    assert "which are left out (9: " in line
    data.text.Tokenizer.characters("abc").save(file)
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer of words"):
        data.load(f"pairs:{folder}", tokenizer=str(file))
    with pytest.raises(FileNotFoundError, match="there is no tokenizer"):
        data.load(f"pairs:{folder}", tokenizer="nowhere.json")


# --------------------------------------------------------------------------- what has no partner


def test_pictures_and_captions_without_partner_are_counted_and_named(folder, capfd):
    for i in (6, 7):
        picture(i).save(folder / f"{i}.png")
    if (folder / "captions.tsv").is_file():
        with open(folder / "captions.tsv", "a") as file:
            file.write("sub/gone.png\tgone\n/etc/passwd\tx\n../0.png\tx\n7.png\t \n")
        lone = "captions without a picture (3: sub/gone.png, /etc/passwd, ../0.png)"
    else:
        (folder / "gone.txt").write_text("gone")
        (folder / "7.txt").write_text(" \n\t\n")
        lone = "captions without a picture (1: gone.txt)"
    source, line = said(capfd, folder)
    assert texts_of(source) == expected()
    assert line.startswith(f"pairs: {folder}: left out ")
    assert "pictures without a caption (1: 6.png)" in line
    assert "pictures with an empty caption (1: 7.png)" in line and lone in line
    for path in folder.glob("[67].*"):
        path.unlink()
    assert data.load(f"pairs:{folder}").info.fingerprint == source.info.fingerprint


def test_nothing_has_a_caption(tmp_path):
    picture(0).save(tmp_path / "a.png")
    for content in (None, "", "file\tcaption\n", "b.png\tx\n", "a.png\t\n"):
        if content is not None:
            (tmp_path / "captions.tsv").write_text(content)
        with pytest.raises(ValueError, match="^pairs: none of the 1 pictures has a caption"):
            data.load(f"pairs:{tmp_path}")
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="^pairs: .* holds no pictures"):
        data.load(f"pairs:{tmp_path}")
    with pytest.raises(ValueError, match="^pairs: name a folder, as in pairs:FOLDER"):
        data.load("pairs:")
    with pytest.raises(FileNotFoundError, match="^pairs: there is no folder"):
        data.load(f"pairs:{tmp_path / 'nowhere'}")


def test_both_forms_at_once_are_refused(folder):
    (folder / "captions.tsv").write_text("0.png\tx\n")
    (folder / "0.txt").write_text("x")
    with pytest.raises(
        ValueError, match="has captions in captions.tsv and in .txt files, such as 0"
    ):
        data.load(f"pairs:{folder}")


def test_other_text_files_may_lie_beside_a_table(tmp_path, capfd):
    fill(tmp_path, form="tsv")
    (tmp_path / "readme.txt").write_text("about")
    source, line = said(capfd, tmp_path)
    assert texts_of(source) == expected()
    assert "files without a picture suffix (1: readme.txt)" in line


def test_hidden_files_are_no_captions(folder, capfd):
    for name in ("._0.txt", ".1.txt", ".captions.tsv"):
        (folder / name).write_bytes(b"\0\xff")
    source, line = said(capfd, folder)
    assert texts_of(source) == expected() and "hidden or system files (3: " in line


@pytest.mark.parametrize("name", ["a.jpg", "a.PNG"])
def test_two_pictures_of_one_name(tmp_path, name):
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / name, format="PNG")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="^pairs: .*a.* and a.* share a.txt: rename one"):
        data.load(f"pairs:{tmp_path}")
    (tmp_path / "a.txt").rename(tmp_path / "captions.tsv")
    (tmp_path / "captions.tsv").write_text(f"a.png\tone\n{name}\ttwo\n")  # a table tells them apart
    assert set(texts_of(data.load(f"pairs:{tmp_path}")).values()) == {"one", "two"}


def test_two_text_files_of_one_name(tmp_path):
    fill(tmp_path)
    (tmp_path / "0.TXT").write_text("x")
    with pytest.raises(ValueError, match="0.* and 0.* name one picture"):
        data.load(f"pairs:{tmp_path}")


# ------------------------------------------------------------------------------ captions as text


def test_long_captions_are_cut_and_counted(folder, capfd):
    source, line = said(capfd, folder, length=3)
    assert source.info.caption_length == 3
    cut = {"a red cat", "two dogs,", "a cat on", "the sun", "a dog", "no cat"}
    assert set(texts_of(source).values()) == cut
    assert "captions of more than 3 words, which are cut (2: " in line
    assert said(capfd, folder, length=5)[1] == ""
    for length in (0, -1, True):
        with pytest.raises(ValueError, match="pairs: length must be a whole number of at least 1"):
            data.load(f"pairs:{folder}", length=length)


@pytest.mark.parametrize(
    "content, caption",
    [
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"a\r\ncat\r\n", "a cat"),
        (b"a\rcat", "a cat"),
        (b"\n\n  a\t\tcat \n", "a cat"),
        ("A \u00c9clair \u732b".encode(), "a \u00e9clair \u732b"),
        (b'"a cat"', '" a cat "'),
        (b"__import__('os').abort()", None),
        (b"\x80\x04\x95.", "is not UTF-8"),
        ("a caf\u00e9 noir pour le chat".encode("latin-1"), "iconv -f CP1252"),
        ("a cat".encode("utf-16"), "iconv -f UTF-16LE"),
        ("a cat".encode("utf-16-be"), "iconv -f UTF-16BE"),
    ],
)
@pytest.mark.parametrize("form", ["txt", "tsv"])
def test_encodings_and_line_ends(tmp_path, content, caption, form):
    picture(0).save(tmp_path / "a.png")
    if form == "txt":
        (tmp_path / "a.txt").write_bytes(content)
    elif b"\0" in content:
        encoding = "utf-16" if content.startswith(b"\xff\xfe") else "utf-16-be"
        (tmp_path / "captions.tsv").write_bytes("a.png\ta cat\n".encode(encoding))
    else:
        mark, text = (content[:3], content[3:]) if content.startswith(b"\xef") else (b"", content)
        text = b" ".join(text.split())
        (tmp_path / "captions.tsv").write_bytes(mark + b"a.png\t" + text + b"\r\n\r\n")
    name = f"pairs:{tmp_path}"
    if caption and ("iconv" in caption or "UTF-8" in caption):
        with pytest.raises(ValueError, match=f"^pairs: .*{caption}") as refused:
            data.load(name)
        assert "\n" not in str(refused.value)
        return
    [text] = texts_of(data.load(name)).values()
    assert text == caption or caption is None


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("header", ["", "file\tcaption", "FileName\tText", "image\tcaption"])
def test_tables(tmp_path, ends, header):
    fill(tmp_path)
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    lines = [header] * bool(header) + [f"./{i}.png\t{text}" for i, text in enumerate(TEXTS)]
    (tmp_path / "captions.tsv").write_bytes(("\ufeff" + ends.join(lines)).encode())
    assert texts_of(data.load(f"pairs:{tmp_path}")) == expected()


def test_names_in_tables(tmp_path):
    """Sub-folders, spaces, backslashes, accents in either form, a tab in a caption."""
    names = ("sub/a b.png", "sub/b.png", "sub/e\u0301.png", "sub/x\u00e9.png")
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        picture(i).save(tmp_path / name)
    written = (" sub/a b.png ", "sub\\b.png", "sub/\u00e9.png", "sub//xe\u0301.png")
    texts = ("one", "two\tor three", "four", "five")
    lines = [f"{name}\t{text}\n" for name, text in zip(written, texts, strict=True)]
    (tmp_path / "captions.tsv").write_text("".join(lines))
    found = texts_of(data.load(f"pairs:{tmp_path}", labels=False))
    assert found == expected([text.replace("\t", " ") for text in texts])


@pytest.mark.parametrize(
    "table, words",
    [
        ("0.png a cat\n", "captions.tsv line 1 has no tab: write the file, a tab, the caption"),
        ("file\tcaption\n\n0.png\n", "captions.tsv line 3 has no tab"),
        ("0.png\tx\n1.png\ty\n./0.png\tz\n", "line 3 names '0.png' again, after line 1"),
        ("file\tcaption\tauthor\n0.png\tx\tme\n", "has the columns file, caption, author: keep"),
        ("file\n0.png\tx\n", "has the columns file: keep file and caption"),
    ],
)
def test_tables_that_are_none(tmp_path, table, words):
    fill(tmp_path, form="tsv")
    (tmp_path / "captions.tsv").write_text(table)
    with pytest.raises(ValueError, match=words):
        data.load(f"pairs:{tmp_path}")


def test_unreadable_pictures_are_refused_as_for_images(folder):
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="^pairs: .*0.png cannot be read as a picture"):
        data.load(f"pairs:{folder}")
    picture(0, size=(5, 5)).save(folder / "0.png")
    with pytest.raises(ValueError, match="^pairs: .* pixels, .* holds 2 sizes. Pass .*--data.size"):
        data.load(f"pairs:{folder}")
    assert data.load(f"pairs:{folder}", size=4).info.shape == (4, 4, 1)
    with pytest.raises(ValueError, match="^pairs: size must be a whole number"):
        data.load(f"pairs:{folder}", size=0)


def test_a_caption_that_is_no_file_is_none(tmp_path, capfd):
    fill(tmp_path)
    (tmp_path / "0.txt").unlink()
    os.mkfifo(tmp_path / "0.txt")  # reading it would wait for ever
    (tmp_path / "1.txt").unlink()
    (tmp_path / "1.txt").mkdir()
    source, line = said(capfd, tmp_path)
    assert source.info.examples == 4 and "special files (1: 0.txt)" in line
    assert "pictures without a caption (2: 0.png, 1.png)" in line


def test_the_name_of_the_set_is_known():
    with pytest.raises(ValueError, match="images:FOLDER, pairs:FOLDER and text:FILE"):
        data.load("pair:x")
    with pytest.raises(ValueError, match="takes size, stream, labels, length, tokenizer"):
        data.load("pairs:x", stride=3)
    assert pairs.TABLE == "captions.tsv"


@pytest.mark.slow
def test_a_run_on_pairs_keeps_its_words(folder, tmp_path):
    cfg = dataclasses.replace(CFG, shape=(4, 6, 1), levels=256)
    training = data.load(f"pairs:{folder}", "train[:4]")
    run = train.Run(folder=str(tmp_path / "run"), steps=2, batch_size=4, devices=1)
    train.fit(vae.make, cfg, run, training, valid=data.load(f"pairs:{folder}", "train[4:]"))
    assert train.load(run.folder).info == training.info
    words = str(tmp_path / "run" / "tokenizer.json")
    again = data.load(f"pairs:{folder}", "train[:4]", tokenizer=words)
    assert again.info.fingerprint == training.info.fingerprint


@pytest.mark.slow
def test_commands_read_pairs_in_the_words_of_the_run(tmp_path, capsys):
    """Captions that came after training change the default vocabulary, not that of the run."""
    root, folder = tmp_path / "pairs", tmp_path / "run"
    fill(root / "train"), fill(root / "test", texts=("a cat", "two dogs"), first=10)
    cfg = dataclasses.replace(CFG, shape=(4, 6, 1), levels=256)
    run = train.Run(folder=str(folder), steps=2, batch_size=4, devices=1)
    result = train.fit(vae.make, cfg, run, data.load(f"pairs:{root}"))
    fill(root / "train", texts=("an unknown animal",), first=20)
    assert data.load(f"pairs:{root}", "test").info.tokenizer != result.info.tokenizer
    runs.evaluate(folder, split="test")
    assert "2 examples" in capsys.readouterr().out
    with pytest.raises(train.Refused, match="its fingerprint is"):  # train itself has changed
        runs.replay(folder, step=1)
    (root / "train" / "20.png").unlink(), (root / "train" / "20.txt").unlink()
    runs.replay(folder, step=1)
    assert "equal to metrics.jsonl in every bit" in capsys.readouterr().out
