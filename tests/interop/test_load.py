"""Checkpoints from anywhere: official and training files load, everything else is refused in one line."""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import zipfile
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import infer_config, load_model, read_weight_file, registry_size, require_config
from dit_fast.models import DiT, DiT_models
from tests.small_models import small_model as build

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}


small_model = partial(build, std=0.05, **SMALL)


def answer(model: DiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.in_channels, *model.x_embedder.img_size, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([10, 500]), torch.tensor([1, 2]))


@pytest.fixture(scope="module")
def model() -> DiT:
    return small_model()


# Files that must load


def test_bare_official_state_dict(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "official.pt")
    loaded, info = load_model(tmp_path / "official.pt", num_heads=4)
    assert loaded.config == {**model.config, "class_dropout_prob": 0.1}
    assert torch.equal(answer(loaded), answer(model))
    assert (info.weights, info.latent, info.notes) == ("only", True, ())
    assert not loaded.training
    assert not loaded.pos_embed.requires_grad
    assert loaded.blocks[0].attn.qkv.weight.requires_grad


def train_dictionary(model: DiT, ema: DiT) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-S/2", num_classes=10),
    }


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_train_py_dictionary_gives_the_set_asked_for(model, tmp_path, weights):
    ema = small_model()
    with torch.no_grad():
        ema.final_layer.linear.bias.add_(1.0)
    torch.save(train_dictionary(model, ema), tmp_path / "0050000.pt")
    loaded, info = load_model(tmp_path / "0050000.pt", weights=weights, num_heads=4)
    assert info.weights == weights
    assert torch.equal(answer(loaded), answer(ema if weights == "ema" else model))


def test_train_py_dictionary_without_ema_says_so(model, tmp_path):
    torch.save({"model": model.state_dict(), "opt": {}}, tmp_path / "a.pt")
    _, info = load_model(tmp_path / "a.pt", num_heads=4)
    assert info.weights == "model"
    assert "no ema weights" in info.notes[0]


def test_saved_arguments_tell_heads_and_classes(tmp_path):
    model = small_model(hidden_size=384, depth=1, num_heads=6, class_dropout_prob=0.0)
    state = train_dictionary(model, model)
    torch.save(state, tmp_path / "a.pt")
    loaded, _ = load_model(tmp_path / "a.pt")
    assert (loaded.num_heads, loaded.y_embedder.num_classes, loaded.y_embedder.dropout_prob) == (6, 10, 0)
    assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(model, tmp_path, prefix):
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, tmp_path / "a.pt")
    loaded, _ = load_model(tmp_path / "a.pt", num_heads=4)
    assert torch.equal(answer(loaded), answer(model))


def test_prefixes_of_compiled_blocks_are_stripped(model, tmp_path):
    state = {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in model.state_dict().items()}
    assert any("_orig_mod" in key for key in state)
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(answer(load_model(tmp_path / "a.safetensors", num_heads=4)[0]), answer(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_with_a_note(model, tmp_path, dtype):
    torch.save({key: value.to(dtype) for key, value in model.state_dict().items()}, tmp_path / "a.pt")
    loaded, info = load_model(tmp_path / "a.pt", num_heads=4)
    name = str(dtype).removeprefix("torch.")
    assert info.notes == (f"{tmp_path / 'a.pt'}: {name} weights cast to float32",)
    weight = "blocks.1.mlp.fc1.weight"
    assert loaded.state_dict()[weight].dtype == torch.float32
    assert torch.equal(loaded.state_dict()[weight], model.state_dict()[weight].to(dtype).float())


def test_save_pretrained_folder_and_its_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded, _ = load_model(path)
        assert loaded.config == model.config
        assert torch.equal(answer(loaded), answer(model))


def test_grid_that_is_not_square_and_odd_mlp_ratio_come_from_config_json(tmp_path):
    model = small_model(input_size=(8, 12), mlp_ratio=2.7, in_channels=3, learn_sigma=False)
    model.save_pretrained(tmp_path)
    loaded, info = load_model(tmp_path)
    assert loaded.config == model.config
    assert not info.latent
    assert torch.equal(answer(loaded), answer(model))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="24 positions, which is not a square grid"):
        load_model(tmp_path / "model.safetensors", num_heads=4)


def test_checksumless_files_load(model, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(answer(load_model(tmp_path / "a.pt", num_heads=4)[0]), answer(model))


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-XL/8", "DiT-L/4", "DiT-B/2", "DiT-S/8"])
@pytest.mark.parametrize("input_size", [32, 64])
def test_official_layouts_tell_their_configuration(name, input_size):
    with torch.device("meta"):
        model = DiT_models[name](input_size=input_size)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert infer_config(shapes, "official.pt") == model.config


# Files of another configuration


def test_every_differing_field_is_listed_with_both_values(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "a.pt", expected={**registry_size("DiT-S/4"), "num_classes": 1000})
    message = str(error.value)
    assert "\n" not in message
    for field in ("depth is 2", "hidden_size is 64", "patch_size is 2", "num_classes is 10"):
        assert f"{field} in the checkpoint" in message
    for value in ("12 expected", "384 expected", "4 expected", "1000 expected"):
        assert value in message


def test_number_of_classes_settles_whether_there_is_a_null_class(model):
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    told = {n: infer_config(shapes, "a", {"num_heads": 4, "num_classes": n}) for n in (10, 11, 12)}
    assert [(c["num_classes"], c["class_dropout_prob"]) for c in told.values()] == [
        (10, 0.1),
        (11, 0),
        (10, 0.1),
    ]


def test_config_json_that_contradicts_its_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3000, "num_classes": 1000}))
    with pytest.raises(
        CheckpointError, match="depth is 2 in the checkpoint, 3000 expected; num_classes is 10"
    ):
        load_model(tmp_path)


def test_the_first_block_tells_how_it_is_conditioned(model):
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    modulation = "blocks.0.adaLN_modulation.1.weight"
    without = {key: shape for key, shape in shapes.items() if "adaLN_modulation" not in key}
    others = {
        "adaln": {**shapes, modulation: (4 * 64, 64)},
        "cross_attention": {**without, "blocks.0.cross.q.weight": (64, 64), "blocks.0.norm1.weight": (64,)},
        "in_context": {**without, "blocks.0.norm1.weight": (64,)},
    }
    assert "conditioning" not in infer_config(shapes, "a", {"num_heads": 4})
    for name, changed in others.items():
        assert infer_config(changed, "a", {"num_heads": 4})["conditioning"] == name
    with pytest.raises(CheckpointError, match="conditioning is adaln_zero in the checkpoint, adaln expected"):
        require_config(infer_config(shapes, "a", {"num_heads": 4}), {"conditioning": "adaln"}, "a")


def test_square_sizes_compare_as_one_number():
    require_config({"input_size": [32, 32]}, {"input_size": 32}, "a")
    with pytest.raises(CheckpointError, match=r"input_size is 32 in the checkpoint, \(32, 64\) expected"):
        require_config({"input_size": [32, 32]}, {"input_size": [32, 64]}, "a")


def test_unknown_heads_ask_for_the_option(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"width 64 and depth 2 do not determine the number of heads.*--num-heads"
    ):
        load_model(tmp_path / "a.pt")


def test_unknown_model_name_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'DiT-XL-2'; the nearest are .*DiT-XL/2"):
        registry_size("DiT-XL-2")


def test_missing_unexpected_and_misshaped_tensors_are_listed_together(model, tmp_path):
    state = model.state_dict()
    del state["blocks.1.attn.proj.bias"]
    state["blocks.1.attn.extra"] = torch.zeros(3)
    state["t_embedder.mlp.0.bias"] = torch.zeros(65)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "a.pt", num_heads=4)
    for part in (
        "missing blocks.1.attn.proj.bias",
        "unexpected blocks.1.attn.extra",
        "t_embedder.mlp.0.bias is (65,)",
    ):
        assert part in str(error.value)


def test_a_single_absurd_block_index_builds_nothing(model, tmp_path):
    state = {**model.state_dict(), "blocks.999999999.attn.qkv.bias": torch.zeros(192)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: missing blocks\.2\..*unexpected blocks\.999999999"
    ):
        load_model(tmp_path / "a.pt", num_heads=4)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"a.weight": torch.zeros(3)}, "is not a DiT: pos_embed"),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(3)}, "names of diffusers"),
        ({"pos_embed": torch.zeros(3), "step": 7}, "entries that are not named tensors: step"),
        (
            {"pos_embed": torch.zeros(3, dtype=torch.int64)},
            r"not dense floating-point weights: pos_embed \(int64",
        ),
        ({"pos_embed": torch.eye(3).to_sparse()}, "refused|not dense"),
        ({}, "no tensors at all"),
        ([torch.zeros(3)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({"a\nb\x1b[31m": torch.zeros(3)}, r"entries that are not named tensors: a\\nb\\x1b\[31m$"),
        ({"module.a": torch.zeros(3), "a": torch.zeros(3)}, "two entries for a"),
    ],
)
def test_foreign_content_is_named(tmp_path, content, line):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=line):
        load_model(tmp_path / "a.pt")


# Damaged files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_give_one_line_with_path_and_size(model, tmp_path, suffix, share):
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pt" else save_file)(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError) as error:
        load_model(path, num_heads=4)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert ("is empty (0 bytes)" if share == 0 else f"{path.stat().st_size}") in message


def test_a_flipped_bit_in_a_tensor_is_found(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_model(tmp_path / "a.pt", num_heads=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_mutated_bytes_never_escape_as_another_error(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("mutated") / f"a{suffix}"
    state = {"pos_embed": torch.arange(8.0), "b": torch.ones(2, 2)}
    (torch.save if suffix == ".pt" else save_file)(state, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_weight_file(path)


def test_mutated_pickles_in_a_sound_archive_never_escape_as_another_error(tmp_path):
    content = {
        "ema": {"pos_embed": torch.arange(8.0)},
        "opt": {},
        "args": argparse.Namespace(model="DiT-S/2"),
    }
    torch.save(content, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        pickled, storage = archive.read("good/data.pkl"), archive.read("good/data/0")
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        mutated = bytearray(pickled)
        for _ in range(generator.randint(1, 3)):
            mutated[generator.randrange(len(mutated))] = generator.randrange(256)
        (tmp_path / "a.pt").write_bytes(as_archive(bytes(mutated), extra={"data/0": storage}))
        try:
            read_weight_file(tmp_path / "a.pt")
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_missing_and_wrong_paths(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_model(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder; expected checkpoints/step-N"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="weights 'best'"):
        load_model(tmp_path, weights="best")


# Hostile files


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def as_archive(
    pickled: bytes, compression: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None
) -> bytes:
    """A zip archive laid out as torch.save does, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {
            "data.pkl": pickled,
            "version": b"3\n",
            "byteorder": b"little",
            **(extra or {}),
        }.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["archive.pt", "bare.pt", "legacy.pt", "disguised.safetensors", "no_suffix"])
def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path, name):
    canary = tmp_path / "canary"
    pickled = pickle.dumps({"model": Command(f"touch {canary}")}, protocol=2)
    path = tmp_path / name
    path.write_bytes(as_archive(pickled) if name in ("archive.pt", "no_suffix") else pickled)
    if name == "legacy.pt":
        torch.save({"a": Command(f"touch {canary}")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert not canary.exists()
    if name == "archive.pt":
        assert "refused: torch.load(weights_only=True) rejects it (GLOBAL posix.system)" in str(error.value)
    pickle.loads(pickled)  # the trap itself works
    assert canary.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_pickle_protocol_of_a_trap_is_refused(tmp_path, protocol):
    canary = tmp_path / "canary"
    pickled = pickle.dumps([Command(f"touch {canary}")], protocol=protocol)
    (tmp_path / "a.pt").write_bytes(as_archive(pickled))
    with pytest.raises(CheckpointError, match="refused"):
        load_model(tmp_path / "a.pt")
    assert not canary.exists()


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path):
    bomb = as_archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, {"data/0": bytes(50_000_000)})
    assert len(bomb) < 100_000
    (tmp_path / "a.pt").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="is compressed"):
        load_model(tmp_path / "a.pt")


def test_tensors_that_claim_more_than_the_file_has_are_refused(model, tmp_path):
    state = {
        **model.state_dict(),
        "y_embedder.embedding_table.weight": torch.zeros(1, 1).expand(10**7, 10**5),
    }
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"refused: its tensors claim 4\d{12} bytes"):
        load_model(tmp_path / "a.pt", num_heads=4)


def test_a_storage_that_is_longer_than_its_record_is_refused(tmp_path):
    torch.save({"pos_embed": torch.zeros(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        pickled = archive.read("good/data.pkl")
    # the four elements of storage and size, each K\x04, become 2**30 of them
    grown = pickled.replace(b"K\x04", b"J\x00\x00\x00\x40")
    assert grown != pickled
    (tmp_path / "a.pt").write_bytes(as_archive(grown, extra={"data/0": bytes(16)}))
    with pytest.raises(CheckpointError):
        read_weight_file(tmp_path / "a.pt")


@pytest.mark.parametrize("length", [2**40, 10**15, 2**63])
def test_absurd_safetensors_headers_are_refused(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        load_model(tmp_path / "a.safetensors")


def test_a_zip_without_weights_and_a_text_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match=r"not one written by torch\.save"):
        load_model(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_text("<html>404</html>" * 100)
    with pytest.raises(CheckpointError, match=r"not a complete torch\.save archive"):
        load_model(tmp_path / "b.pt")
