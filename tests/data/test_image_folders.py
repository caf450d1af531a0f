"""Folders of images as they are found: what counts, what is left out with a word, and how a file becomes pixels."""

import logging
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dit_fast.cli import main
from dit_fast.data import Conversion, open_images
from dit_fast.data import image_files as listing
from dit_fast.data.decode import center_crop, read_header, read_image
from dit_fast.data.encode import list_images
from dit_fast.data.image_files import find_images
from dit_fast.errors import ConfigError, DataError
from dit_fast.evaluation import open_source
from dit_fast.sampling import draw_grid, save_grid

WHITE = Conversion()
TURNS = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, 1),
}  # fmt: skip
"""What shows an image with an EXIF orientation as it was meant to be seen, of (H, W, ...)."""


@pytest.fixture(autouse=True)
def _every_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    listing._warn_once.cache_clear()
    monkeypatch.delenv("RANK", raising=False)


def noise(size: tuple[int, int] = (8, 8), channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, channels), or (H, W) of one."""
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put_array(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


def put(path: Path, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed=seed)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images."""
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            put(tmp_path / "set" / name / f"{number}.png", seed=3 * label + number)
    return tmp_path / "set"


def counts(folder: Path) -> tuple[int, int, int]:
    """Images that training, evaluation and encoding see."""
    return (
        len(open_images(folder, 8).train),
        open_source(folder, 8).num,
        len(list_images(folder, 4, None).paths),
    )


def pixels(path: Path, channels: int = 3, how: Conversion = WHITE) -> np.ndarray:
    """Of a file at its own size, uint8 (H, W, channels), or (H, W) of one."""
    header = read_header(path, how)
    image = read_image(path, (header.height, header.width), channels, how).permute(1, 2, 0).numpy()
    return image[..., 0] if channels == 1 else image


# What counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/a-checkpoint.png", ".Trash-1000/files/a.png", "deep/.git/x/a.png", "._0.png", ".hidden.png",
        "__MACOSX/a.png", "@eaDir/a.png/SYNOPHOTO.jpg", "sub/@EADIR/x.png", "#recycle/a.png", "lost+found/a.png",
    ],
)  # fmt: skip
def test_what_is_hidden_or_left_by_systems_is_no_data(folder, name, caplog):
    put(folder / "cat" / name)
    if not name.startswith(("deep", "sub")):
        put(folder / name)
    assert counts(folder) == (6, 6, 6)
    assert not caplog.text


def test_a_folder_in_a_hidden_folder_is_read(tmp_path):
    put(tmp_path / ".cache" / "set" / "a" / "1.png")
    put(tmp_path / ".cache" / "set" / "b" / "1.png")
    assert len(open_images(tmp_path / ".cache" / "set").train) == 2


@pytest.mark.parametrize(
    "suffix",
    [".webp", ".bmp", ".dib", ".tif", ".TIFF", ".jpe", ".jfif", ".JPEG", ".JpG", ".Png", ".pjpeg", ".apng"],
)
def test_every_spelling_of_the_formats_is_read(folder, suffix):
    kinds = {".w": "WEBP", ".b": "BMP", ".d": "BMP", ".t": "TIFF", ".j": "JPEG", ".p": "PNG", ".a": "PNG"}
    put(folder / "cat" / f"more{suffix}", format="JPEG" if "jp" in suffix else kinds[suffix[:2].lower()])
    assert counts(folder) == (7, 7, 7)


def test_what_looks_like_an_image_and_is_not_read_is_counted_and_named_once(folder, caplog):
    for name in ("cat/a.gif", "cat/b.HEIC", "dog/c.svg", "dog/d.cr2", "cat/e.avif"):
        (folder / name).write_bytes(b"of a format that is not read")
    put(folder / "cat" / "photo.jpg_large", format="JPEG")
    put(folder / "dog" / "without", format="WEBP")
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "cat" / "data").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        assert counts(folder) == (6, 6, 6)
    (record,) = caplog.records
    message = record.getMessage()
    assert "7 files look like images and are not read" in message
    assert "1 .gif, 1 .heic, 1 .jpg_large, 1 .svg, 1 no suffix" in message
    assert "cat/a.gif" in message
    assert "2 more" in message
    assert "\n" not in message


def test_only_the_first_rank_warns(folder, caplog, monkeypatch):
    (folder / "cat" / "a.gif").write_bytes(b"GIF89a")
    monkeypatch.setenv("RANK", "1")
    open_images(folder, 8)
    assert not caplog.records


def test_names_of_images_that_are_no_files_are_named(folder, caplog):
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "cat" / "self.png").symlink_to(folder / "cat" / "self.png")
    os.mkfifo(folder / "dog" / "pipe.png")
    (folder / "dog" / "folder.png").mkdir()
    assert counts(folder) == (6, 6, 6)
    assert "3 image names are not files (such as broken links): cat/gone.png, cat/self.png" in caplog.text


def test_images_beside_the_class_folders_are_named(folder, caplog):
    put(folder / "loose.png")
    assert len(open_images(folder, 8).train) == 6
    assert "1 images outside the class sub-folders are ignored: loose.png" in caplog.text


def test_links_to_files_and_folders_count_each_time(folder, tmp_path):
    put(tmp_path / "elsewhere" / "deep" / "1.png")
    put(tmp_path / "elsewhere" / "2.png")
    for link in ("cat/one", "cat/two", "owl"):
        (folder / link).symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "file.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    assert counts(folder) == (13, 13, 13)
    assert open_images(folder, 8).class_names == ("cat", "dog", "owl")
    (tmp_path / "link").symlink_to(folder)
    assert counts(tmp_path / "link") == (13, 13, 13)


def test_loops_end_and_are_named(folder, tmp_path, caplog):
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "dog" / "parent").symlink_to(tmp_path)
    (folder / "dog" / "here").symlink_to(".")
    (folder / "self").symlink_to("self")
    # Two folders that lead to each other: each is seen from the other, once.
    (folder / "cat" / "dogs").symlink_to(folder / "dog")
    (folder / "dog" / "cats").symlink_to(folder / "cat")
    found = find_images(folder)
    assert len(found.paths) == 12
    assert [path.relative_to(folder).as_posix() for path in found.loops] == [
        "cat/dogs/cats", "cat/dogs/here", "cat/dogs/parent", "cat/up",
        "dog/cats/dogs", "dog/cats/up", "dog/here", "dog/parent",
    ]  # fmt: skip
    open_images(folder, 8)
    assert "8 links lead to a parent folder and are not followed: cat/dogs/cats" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"dog cannot be listed: Permission denied$"):
        open_images(folder, 8)


def test_the_order_is_that_of_the_names_parts(tmp_path):
    names = ["b/1.png", "a/x/2.png", "a/x-1.png", "a/10.png", "a/9.png", "a/X.png", "b/a/b/c.png"]
    for number, name in enumerate(names):
        put(tmp_path / name, seed=number)
    expected = sorted(path for path in tmp_path.rglob("*.png"))
    assert list(find_images(tmp_path).paths) == expected
    assert list(list_images(tmp_path, 4, None).paths) == expected
    data = open_images(tmp_path, 8, memory_limit=0)
    assert list(data.train.source.paths) == expected
    assert data.train.labels.tolist() == [0] * 5 + [1] * 2


def test_names_that_are_not_utf8(tmp_path, caplog):
    """Latin-1 on a file system of bytes: class, file, held-out split, encoding's names, messages."""
    name = os.fsdecode(b"caf\xe9")
    for label in (name, "b"):
        for number in range(4):
            put(tmp_path / "set" / label / f"{name}-{number}.png", seed=number)
    data = open_images(tmp_path / "set", holdout=0.25)
    assert data.class_names == ("b", name)
    assert (len(data.train), len(data.heldout)) == (6, 2)
    listed = list_images(tmp_path / "set", 4, None)
    assert len(listed.digest(range(8))) == 64
    (tmp_path / "set" / name / f"{name}-0.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        open_images(tmp_path / "set")
    str(caught.value).encode(errors="backslashreplace")


@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("Training", "TEST"), ("train", "valid")])
def test_parts_of_a_data_set_are_not_classes(tmp_path, one, other, caplog):
    for part in (one, other):
        put(tmp_path / part / "cat" / "1.png")
        put(tmp_path / part / "dog" / "1.png")
    for refused in (
        lambda: open_images(tmp_path, 8),
        lambda: open_images(tmp_path, 8, num_classes=0),
        lambda: list_images(tmp_path, 4, None),
    ):
        with pytest.raises(DataError) as caught:
            refused()
        assert (
            f"contains {one}/ and {other}/, splits of a data set, not classes: give {tmp_path / one}"
            in str(caught.value)
        )
    assert len(open_images(tmp_path / one, 8).train) == 2
    # All images of both are a fair reference, but worth a word.
    assert open_source(tmp_path, 8).num == 4
    assert f"{one} and {other} are scored together" in caplog.text


def test_a_folder_within_a_folder_is_pointed_to(folder):
    with pytest.raises(DataError, match=r"one class, set; .* \(are they in .*/set\?\)"):
        open_images(folder.parent)


def test_images_without_classes(folder, tmp_path):
    """--num-classes 0: flat folders, mixed ones and one class; those of classes are listed as they were."""
    flat = open_images(folder / "cat", num_classes=0)
    assert (len(flat.train), flat.class_names, flat.train.labels.tolist()) == (3, ("images",), [0] * 3)
    assert torch.equal(flat.train.batch(torch.arange(3)), open_images(folder).train.batch(torch.arange(3)))
    labelled, unlabelled = open_images(folder, holdout=0.4), open_images(folder, holdout=0.4, num_classes=0)
    assert unlabelled.describe() == labelled.describe()
    put(folder / "loose.png")
    assert len(open_images(folder, num_classes=0).train) == 7
    assert len(open_images(tmp_path, num_classes=0).train) == 7
    with pytest.raises(DataError, match="or train without classes: --num-classes 0"):
        open_images(folder / "cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no readable image"):
        open_images(tmp_path / "empty", num_classes=0)


# Pixels --------------------------------------------------------------------------------------------------------------


def composited(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """RGBA (H, W, 4) on a background, in exact arithmetic, rounded."""
    alpha = image[..., 3:].astype(float) / 255
    return image[..., :3] * alpha + np.array(background) * (1 - alpha)


@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_transparent_images_lie_on_the_background(tmp_path, suffix, background, colour):
    image = noise(channels=4)
    image[0, :, 3], image[1, :, 3] = 0, 255
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(image).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    made = pixels(path, how=Conversion(background))
    # Two roundings of at most half a level: of the product and of the sum.
    assert np.abs(made - composited(image, colour)).max() <= 1.0
    assert (made[0] == colour).all()
    assert (made[1] == image[1, :, :3]).all()
    raw = pixels(path, how=Conversion(background, raw=True))
    assert (raw == image[..., :3]).all()


def test_every_kind_of_transparency(tmp_path):
    white = (255, 255, 255)
    grey = noise(channels=1)
    alpha = noise(channels=1, seed=1)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    both = np.dstack([grey, grey, grey, alpha])
    assert np.abs(pixels(tmp_path / "la.png") - composited(both, white)).max() <= 1.0
    assert np.abs(pixels(tmp_path / "la.png", 1) - composited(both, white)[..., 0]).max() <= 1.0
    assert read_header(tmp_path / "la.png", Conversion()).gray
    assert not read_header(tmp_path / "la.png", Conversion("red")).gray, "it lies on a colour"

    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    palette.save(tmp_path / "index.png", transparency=1)
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 255, 128]))
    assert pixels(tmp_path / "index.png")[0, :4].tolist() == [[200, 0, 0], [255] * 3, [0, 0, 200], [9] * 3]
    assert pixels(tmp_path / "bytes.png")[0, :3].tolist() == [[200, 0, 0], [255] * 3, [0, 0, 200]]
    assert pixels(tmp_path / "bytes.png")[0, 3].tolist() == pytest.approx([9 * 128 / 255 + 127] * 3, abs=1)

    solid = noise()
    solid[0, 0] = (1, 2, 3)
    Image.fromarray(solid).save(tmp_path / "key.png", transparency=(1, 2, 3))
    expected = solid.copy()
    expected[(solid == (1, 2, 3)).all(-1)] = 255
    assert (pixels(tmp_path / "key.png") == expected).all()
    Image.fromarray(grey).save(tmp_path / "grey-key.png", transparency=int(grey[0, 0]))
    assert (pixels(tmp_path / "grey-key.png", 1) == np.where(grey == grey[0, 0], 255, grey)).all()
    deep = noise(channels=1).astype(np.uint16) * 256 + 7
    Image.fromarray(deep).save(tmp_path / "deep-key.png", transparency=int(deep[0, 0]))
    assert (pixels(tmp_path / "deep-key.png", 1) == np.where(deep == deep[0, 0], 255, deep >> 8)).all()


@pytest.mark.parametrize("word", ["", "nocolour", "#12345678", "rgba(1,2,3,4)", "1"])
def test_what_is_no_opaque_colour_is_refused(word):
    with pytest.raises(ConfigError, match=re.escape(f"--background {word}")):
        Conversion(word)


@pytest.mark.parametrize("turn", [1, *TURNS])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_images_are_upright(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    path, plain = tmp_path / f"a.{suffix}", tmp_path / f"plain.{suffix}"
    image = Image.fromarray(noise((6, 10)))
    options = {"lossless": True} if suffix == "webp" else {}
    image.save(path, exif=exif, **options)
    image.save(plain, **options)
    stored = pixels(plain)
    header = read_header(path, Conversion())
    expected = TURNS[turn](stored) if turn > 1 else stored
    assert (header.height, header.width) == expected.shape[:2]
    assert (pixels(path) == expected).all()
    if suffix != "tiff":  # which Pillow turns itself, for the reference too
        assert (pixels(path, how=Conversion(raw=True)) == stored).all()


def test_exif_after_the_pixels_of_a_png_turns_it_too(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    chunk = b"eXIf" + exif.tobytes()[6:]
    image = noise((6, 10))
    path = put_array(tmp_path / "a.png", image)
    whole, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
    path.write_bytes(
        whole + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end
    )
    header = read_header(tmp_path / "a.png", Conversion())
    assert (header.height, header.width) == (10, 6)
    assert (pixels(tmp_path / "a.png") == TURNS[6](image)).all()


def test_damaged_exif_does_not_make_an_image_unreadable(tmp_path):
    for number, exif in enumerate(
        (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    ):
        Image.fromarray(noise()).save(tmp_path / f"{number}.jpg", exif=exif)
        assert pixels(tmp_path / f"{number}.jpg").shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("kind", "bits", "inverted"),
    [("png", 16, False), ("II", 16, False), ("MM", 16, False), ("II", 12, False), ("II", 16, True)],
)
def test_deep_grey_keeps_its_upper_byte(tmp_path, kind, bits, inverted):
    values = np.random.default_rng(0).integers(0, 1 << bits, (8, 8)).astype(np.uint16)
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    if kind == "png":
        Image.fromarray(values).save(path)
    else:
        write_tiff(path, values, kind, bits, inverted)
    expected = (values >> (bits - 8)).astype(np.uint8)
    assert (pixels(path, 1) == (255 - expected if inverted else expected)).all()
    assert (pixels(path, 1, Conversion(raw=True)) == (255 - expected if inverted else expected)).all()


def write_tiff(path: Path, values: np.ndarray, order: str, bits: int, inverted: bool = False) -> None:
    """A grey TIFF in one strip, by hand: Pillow writes none of 12 bits, nor with white as zero."""
    end = "<" if order == "II" else ">"
    if bits == 12:
        flat = values.reshape(-1, 2).astype(np.uint32)
        packed = (flat[:, 0] << 12) | flat[:, 1]
        body = b"".join(int(word).to_bytes(3, "big") for word in packed)
    else:
        body = values.astype(f"{end}u2").tobytes()
    tags = [
        (256, 3, values.shape[1]), (257, 3, values.shape[0]), (258, 3, bits), (259, 3, 1),
        (262, 3, 0 if inverted else 1), (273, 4, 8), (277, 3, 1), (278, 3, values.shape[0]), (279, 4, len(body)),
    ]  # fmt: skip
    directory = struct.pack(f"{end}H", len(tags))
    for tag, kind, value in tags:
        content = struct.pack(
            f"{end}HH" if kind == 3 else f"{end}I", *((value, 0) if kind == 3 else (value,))
        )
        directory += struct.pack(f"{end}HHI", tag, kind, 1) + content
    start = 8 + len(body)
    path.write_bytes(order.encode() + struct.pack(f"{end}HI", 42, start) + body + directory + bytes(4))


@pytest.mark.parametrize(
    ("mode", "reason"), [("F", "floating-point values"), ("I", "32-bit signed or wide values")]
)
def test_values_without_a_known_range_are_refused_by_name(folder, mode, reason):
    """Pillow clips them to 0 .. 255 without a word: floats in [0, 1] would all be black."""
    Image.fromarray(noise(channels=1)).convert(mode).save(folder / "cat" / "wide.tif")
    with pytest.raises(DataError, match=rf"cat/wide\.tif \({reason} have no known range"):
        open_images(folder, 8)


def test_other_colour_spaces(tmp_path):
    image = Image.fromarray(noise())
    image.convert("CMYK").save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif") == np.asarray(image)).all()
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == "CMYK"
        assert (pixels(tmp_path / "a.jpg") == np.asarray(file.convert("RGB"))).all()
    image.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(pixels(tmp_path / "bits.png", 1))) <= {0, 255}


def test_a_file_is_what_its_first_bytes_say_and_runs_no_program(folder, monkeypatch):
    put(folder / "cat" / "really-png.jpg", format="PNG")
    put(folder / "cat" / "really-gif.png", format="GIF")
    assert counts(folder) == (8, 8, 8)
    (folder / "dog" / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    )
    with pytest.raises(DataError, match=r"dog/script\.png \(cannot identify image file"):
        open_images(folder, 8)


def test_a_plain_image_is_read_as_ever(tmp_path):
    """Bit for bit what Pillow's convert gives, cropped: RGB and grey files without alpha and orientation."""
    for mode, channels in (("RGB", 3), ("L", 1), ("L", 3), ("RGB", 1)):
        image = Image.fromarray(noise((37, 50))).convert(mode)
        image.save(tmp_path / "a.png")
        expected = np.asarray(center_crop(image.convert("L" if channels == 1 else "RGB"), 16)).reshape(
            16, 16, channels
        )
        for how in (Conversion(), Conversion("black", raw=True)):
            assert (
                read_image(tmp_path / "a.png", 16, channels, how).permute(1, 2, 0).numpy() == expected
            ).all()


# A sampler's folder --------------------------------------------------------------------------------------------------


def test_what_the_sampler_wrote_is_scored_without_its_grid(tmp_path, caplog):
    """Single images where they are; else the archive; with neither, a line that says how to get them."""
    out = tmp_path / "out"
    out.mkdir()
    save_grid(draw_grid([("", np.stack([noise((32, 32), seed=n) for n in range(3)]))]), out / "sample.png")
    (out / "scores.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"no single images, only 1 grids of samples: .* --save-images or --npz"
    ):
        open_source(out)
    images = np.stack([noise((32, 32), seed=n) for n in range(3)])
    np.savez(out / "samples.npz", arr_0=images)
    source = open_source(out)
    assert (source.num, source.sizes) == (3, ((32, 32),))
    assert torch.equal(next(source.batches(3)), torch.from_numpy(images).permute(0, 3, 1, 2))
    (out / "images").mkdir()
    for number in range(2):
        put_array(out / "images" / f"{number}.png", images[number])
    assert torch.equal(next(open_source(out).batches(3)), torch.from_numpy(images[:2]).permute(0, 3, 1, 2))
    # A grid among images, as in RUN/samples; also an older one, which does not say what it is, in the sampler's folder.
    shutil.copy(out / "sample.png", out / "images" / "grid.png")
    assert open_source(out).num == 2
    assert "1 grids of samples are ignored" in caplog.text
    put_array(out / "sample.png", noise((200, 300)))
    assert open_source(out).num == 2
    (out / "parts").mkdir()
    with pytest.raises(DataError, match="has not finished there"):
        open_source(out)


def test_a_folder_that_only_resembles_the_samplers_is_scored_whole(tmp_path):
    for name in ("sample.png", "other.png", "images/1.png"):
        put(tmp_path / name)
    assert open_source(tmp_path).num == 3


def test_every_folder_of_a_run_may_have_a_name_that_is_not_utf8(tmp_path, capsys):
    """Trained, continued, drawn from and scored: data, classes, run and samples are named in Latin-1."""
    name = os.fsdecode(b"caf\xe9")
    for label in (name, "b"):
        for number in range(4):
            put(tmp_path / name / label / f"{name}{number}.png", seed=number)
    tiny = (
        "--hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --batch-size 4 --device cpu --objective flow"
    )
    run, out = tmp_path / f"run-{name}", tmp_path / f"out-{name}"
    grids = ["--sample-every", "1", "--sample-steps", "1"]
    assert (
        main(
            [
                "train",
                "--data",
                str(tmp_path / name),
                *tiny.split(),
                "--steps",
                "1",
                "--out",
                str(run),
                *grids,
            ]
        )
        == 0
    )
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 0
    words = ["--num", "4", "--steps", "1", "--save-images"]
    assert main(["sample", "--ckpt", str(run), *words, "--out", str(out)]) == 0
    assert len(list((out / "images").iterdir())) == 4
    against = ["--against", str(tmp_path / name), "--features", "classifier"]
    assert main(["evaluate", str(out), *against, "--out", str(tmp_path / f"{name}.json")]) == 0
    assert "4 samples from" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["webp", "tiff", "apng", "gif"])
def test_files_of_several_frames_are_counted_and_named(tmp_path, caplog, suffix):
    """Once, by training and by scores: the first of each is read. A GIF is read under another suffix."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            frames[0].save(tmp_path / name / f"{number}.png")
    many = tmp_path / "cat" / f"many.{'png' if suffix == 'gif' else suffix}"
    kind = {"apng": "PNG", "gif": "GIF"}.get(suffix)
    frames[0].save(many, format=kind, save_all=True, append_images=frames[1:])
    for _ in range(2):
        data = open_images(tmp_path, 8)
    said = [line for line in caplog.messages if "frames" in line]
    assert said == [
        f"{tmp_path}: 1 files have several frames or pages; only the first is read: cat/{many.name}"
    ]
    number = [path.name for path in sorted((tmp_path / "cat").iterdir())].index(many.name)
    red = data.train.batch(torch.tensor([number])).mean((0, 2, 3))
    assert red[0] > 0.8
    assert red[1] < -0.8
