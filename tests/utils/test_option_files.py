"""Options in YAML files: read as the flags read them, and one line with the place of what is wrong."""

from pathlib import Path

import pytest

from dit_fast.errors import ConfigError
from dit_fast.training import PRESETS, TrainConfig
from dit_fast.training import presets as presets_package
from dit_fast.utils.option_files import as_yaml, read_option_file, read_option_files


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_values_are_read_as_flags_read_them(tmp_path):
    text = """
    # YAML 1.1 takes 1e-4 for text, and no for false.
    lr: 1e-4
    data-path: photos      # an alias, with dashes
    loss_weighting: none
    flip: no
    num_classes: null
    batch_size: "32"
    model: DiT-S/4
    """
    assert read_option_file(written(tmp_path, text.replace("\n    ", "\n")), TrainConfig) == {
        "lr": 1e-4,
        "data": "photos",
        "loss_weighting": "none",
        "flip": False,
        "num_classes": None,
        "batch_size": 32,
        "model": "DiT-S/4",
    }
    assert read_option_file(written(tmp_path, "# nothing\n"), TrainConfig) == {}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_configuration_survives_its_file(name, tmp_path):
    config = TrainConfig(**{"data": "a: b # c", **PRESETS[name]})
    again = TrainConfig(**read_option_file(written(tmp_path, as_yaml(config)), TrainConfig))
    assert again == config


def test_every_preset_is_a_file_and_every_file_a_preset():
    files = {path.stem for path in Path(presets_package.__file__).parent.glob("*.yaml")}
    assert files == set(PRESETS)
    with pytest.raises(KeyError):
        PRESETS["none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-3\nbatchsize: 8\n", "line 2: no option batchsize; did you mean batch_size?"),
        ("zzz: 8\n", "line 1: no option zzz"),
        ("\n\nlr: fast\n", "line 3: lr: expected a number above 0, up to 1e+06, found 'fast'"),
        ("batch_size: 1.5\n", "line 1: batch_size: expected a whole number from"),
        ("flip: maybe\n", "line 1: flip: expected true or false, found maybe"),
        ("objective: flows\n", "line 1: objective: expected one of"),
        ("lr: [1, 2]\n", "line 1: lr is one value, found a list of 2"),
        ("lr: {a: 1}\n", "line 1: lr is one value, found a mapping"),
        ("batch_size:\n", "line 1: batch_size has no value"),
        ("lr: 1e-3\n\nlr: 1e-4\n", "line 3: lr is set already in"),
        ("lr: [1\n", "line 2: not YAML: "),
        ("lr: !!python/object/apply:os.system [touch pwned]\n", "line 1: lr is one value, found a list of 1"),
        ("- lr\n", ": expected lines such as batch_size: 64, found a sequence"),
        ("just words\n", ": expected lines such as batch_size: 64, found a scalar"),
    ],
)
def test_one_line_with_the_place(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_option_file(path, TrainConfig)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_two_files_for_one_option_are_refused(tmp_path):
    one, two = written(tmp_path, "lr: 1e-3\nseed: 1\n", "a.yaml"), written(tmp_path, "seed: 2\n", "b.yaml")
    with pytest.raises(
        ConfigError, match=r"b\.yaml, line 1: seed is set already in .*a\.yaml, line 2: remove one"
    ):
        read_option_files([one, two], TrainConfig)
    assert read_option_files([one, written(tmp_path, "steps: 3\n", "b.yaml")], TrainConfig) == {
        "lr": 1e-3, "seed": 1, "steps": 3,
    }  # fmt: skip
