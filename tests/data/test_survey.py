"""`dit-fast data`: every finding is named, and the preview has the training images."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import open_data
from dit_fast.data.survey import preview

RNG = np.random.default_rng(0)


def draw(path, height=24, width=20, channels=3, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (height, width, channels), dtype=np.uint8), mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 24 and 2 images, with one member of each kind of finding."""
    for number in range(23):
        draw(tmp_path / "pics" / "cat" / f"{number:02}.png", height=24 + number)
    draw(tmp_path / "pics" / "cat" / "clear.png", channels=4)
    draw(tmp_path / "pics" / "dog" / "0.png")
    shutil.copy(tmp_path / "pics" / "cat" / "03.png", tmp_path / "pics" / "dog" / "copy.png")
    (tmp_path / "pics" / "cat" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    (tmp_path / "pics" / "cat" / "phone.heic").write_bytes(b"x")
    Image.new("L", (32, 32)).save(tmp_path / "pics" / "loose.png")
    # Opaque, though the file has an alpha channel: nothing to report.
    Image.new("RGBA", (20, 24), (1, 2, 3, 255)).save(tmp_path / "pics" / "dog" / "opaque.png")
    return tmp_path / "pics"


def test_every_finding_is_a_line(folder, capsys):
    assert main(["data", str(folder)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{folder}: 29 images, 2 classes: 3 (dog) to 25 (cat)"
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert [note for note in notes if "torn.jpg" in note and "cannot be read" in note]
    assert [note for note in notes if "cat/03.png = dog/copy.png" in note and "other classes" in note]
    assert [note for note in notes if note.endswith(": cat/clear.png") and "transparent" in note]
    assert [note for note in notes if "cat/phone.heic" in note]
    assert [note for note in notes if note.startswith("outside the class sub-folders")]
    assert len(notes) == 5  # 25 to 3 is no large difference


def test_json_names_every_file(folder, capsys):
    assert main(["data", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["classes"] == {"cat": 25, "dog": 3}
    assert facts["transparent"] == ["cat/clear.png"]
    assert list(facts["unreadable"]) == ["cat/torn.jpg"]
    assert facts["copies"] == [["cat/03.png", "dog/copy.png"]]
    assert facts["other_formats"] == ["cat/phone.heic"]
    assert facts["grayscale"] == 1
    assert sum(size["images"] for size in facts["sizes"]) == 28


def test_splits_and_uneven_classes_are_pointed_out(tmp_path, capsys):
    for number in range(20):
        draw(tmp_path / "train" / f"{number}.png")
    draw(tmp_path / "val" / "0.png")
    assert main(["data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"train/ and val/ are splits of a data set: train on {tmp_path / 'train'}" in text
    assert "train has 20 images, val 1" in text


def test_a_flat_folder_is_previewed_without_classes(tmp_path, capsys):
    for number in range(3):
        draw(tmp_path / "flat" / f"{number}.png")
    picture = tmp_path / "preview.png"
    assert main(["data", str(tmp_path / "flat"), "--image-size", "16", "--preview", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "--num-classes 0" in out
    assert out.endswith(f"wrote {picture}\n")
    assert Image.open(picture).format == "PNG"


def test_the_preview_has_the_training_images(folder):
    """Pixels of the first tile are those of the first sample, and unreadable files are left out."""
    data = open_data(folder, image_size=16, skip_unreadable=1)
    picture = np.asarray(preview(data))
    sample = ((data.train.batch(torch.tensor([0]))[0] + 1) * 127.5).round().to(torch.uint8)
    tile = np.kron(sample.permute(1, 2, 0).numpy(), np.ones((4, 4, 1), np.uint8))
    rows, columns = picture.shape[0] - tile.shape[0], picture.shape[1] - tile.shape[1]
    places = [
        (row, column)
        for row in range(min(rows, 40))
        for column in range(columns)
        if np.array_equal(picture[row, column], tile[0, 0])
        and np.abs(picture[row : row + 64, column : column + 64].astype(int) - tile).max() <= 1
    ]
    assert places
    assert data.unreadable.known.keys() == {"cat/torn.jpg"}


def test_reading_a_preview_changes_nothing_of_the_stream(folder):
    data = open_data(folder, image_size=16, skip_unreadable=1)
    before = dict(data.unreadable.known)
    preview(data)
    assert data.unreadable.known == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere is neither a folder nor a built-in set (digits, mnist)"),
        (["empty"], "empty has no image (PNG, JPEG, WebP, BMP or TIFF)"),
        (["mnist", "--preview", "x.jpg"], "--preview x.jpg: give a name that ends in .png"),
    ],
)
def test_one_line_for_what_cannot_be_surveyed(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["data", *arguments]) == 1
    assert capsys.readouterr().err == f"dit-fast: error: {reason}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
