"""Runs that train adapters: what is trained, kept, merged, resumed, and read by peft."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_fast.cli import main
from dit_fast.data import ImageSet, from_arrays
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import load_model
from dit_fast.interop.adapter import merged, read_adapter
from dit_fast.model.cost import count
from dit_fast.models import DiT, DiT_models
from dit_fast.training import TrainConfig, Trainer, resume, train
from dit_fast.training import run as training_run
from dit_fast.training.initial import read_initial
from dit_fast.training.lora import layers_of
from tests.distributed import ranks
from tests.small_models import small_model
from tests.tolerance import assert_trained_alike, relative, rounding

pytest.importorskip("peft")
TABLE = "y_embedder.embedding_table.weight"


def images(classes: str = "abcde", size: int = 8) -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.arange(4 * len(classes)) % len(classes)
    return from_arrays(
        "set", rng.integers(0, 255, (len(labels), size, size, 3), dtype=np.uint8), labels, list(classes)
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    small_model(3, depth=2, in_channels=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(base: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "data": "set", "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "batch_size": 4, "lr": 1e-2,
        "device": "cpu", "steps": 4, "lora": 4, "init_from": str(base),
    }  # fmt: skip
    return TrainConfig(**{**options, **changes})


def start(base: Path, data: ImageSet | None = None, **changes: Any) -> Trainer:
    made, data = config(base, **changes), data or images()
    return Trainer(made, data, initial=read_initial(made, data))


@pytest.fixture
def run_of(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train a run in a folder of the given name; its data set stays for later commands."""

    def make(name: str = "run", data: ImageSet | None = None, **changes: Any) -> Path:
        data = data or images()
        monkeypatch.setattr(training_run, "open_set", lambda config: data)
        return train(config(base, **changes), tmp_path / name).run

    return make


def outputs(model: Any, classes: int = 5, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, size, size, generator=generator)
    with torch.no_grad():
        return model(x, torch.arange(6) * 150, torch.arange(6) % classes)


def test_only_adapters_are_trained_and_the_start_is_the_checkpoint(base):
    trainer = start(base)
    assert torch.equal(outputs(trainer.model), outputs(DiT.from_pretrained(base)))
    layers = {
        f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {name.partition(".lora_")[0] for name in trainer.trained} == layers
    assert all(".lora_" in name for name in trainer.trained)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step(*trainer.stream.batch(0))
    changed = {name for name, tensor in trainer.model.state_dict().items() if not tensor.equal(before[name])}
    # A gets a gradient once B is not zero.
    assert changed == {name for name in trainer.trained if "lora_B" in name}
    number = sum(p.numel() for p in trainer.trained.values())
    assert f"training LoRA of rank 4 on 8 layers: {number} parameters beside" in trainer.partly[0]
    assert set(trainer.tensors()["model"]) == set(trainer.tensors()["ema"]) == set(trainer.trained)


@pytest.mark.parametrize("options", [{}, {"lora_dora": True, "lora_alpha": 2.0}])
def test_the_run_its_adapter_peft_and_the_export_are_one_model(run_of, base, tmp_path, options):
    from peft import PeftModel

    run = run_of(lora_targets=("x_embedder", "*.attn", "*.adaLN_modulation", "final_layer"), **options)
    model, info = load_model(run)
    expected = outputs(model)
    assert relative(outputs(DiT.from_pretrained(base)), expected) > 1e-3
    found, about = load_model(base, adapter=run / "adapter")
    assert torch.equal(outputs(found), expected)
    assert about.class_names == info.class_names
    assert about.adapter == str(run / "adapter")
    with_peft = PeftModel.from_pretrained(DiT.from_pretrained(base), str(run / "adapter")).eval()
    assert relative(outputs(with_peft), expected) < rounding()
    assert relative(outputs(with_peft.merge_and_unload()), expected) < rounding()
    for arguments in (["--ckpt", str(run)], ["--ckpt", str(base), "--lora", str(run / "adapter")]):
        out = tmp_path / f"export-{len(arguments)}"
        assert main(["export", *arguments, "--out", str(out)]) == 0
        assert torch.equal(outputs(DiT.from_pretrained(out)), expected)


def test_new_classes_belong_to_the_adapter(run_of, base):
    from peft import PeftModel

    run = run_of(data=images("xyz"))
    content = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert content["modules_to_save"] == ["y_embedder"]
    model, info = load_model(run)
    assert (model.num_classes, info.class_names) == (3, ("x", "y", "z"))
    found, about = load_model(base, adapter=run / "adapter")
    assert found.config == model.config
    assert about.class_names == info.class_names
    assert torch.equal(outputs(found, 3), outputs(model, 3))
    # peft has no way to change the number of classes: RUN/base has the new one.
    with_peft = PeftModel.from_pretrained(DiT.from_pretrained(run / "base"), str(run / "adapter")).eval()
    assert relative(outputs(with_peft.merge_and_unload(), 3), outputs(model, 3)) < rounding()


def test_modules_that_are_trained_whole_and_another_resolution(run_of, base):
    run = run_of(data=images(size=16), lora_train=("final_layer.linear", "final_layer"))
    model, _ = load_model(run)
    assert model.x_embedder.img_size == (16, 16)
    assert not model.final_layer.linear.weight.equal(DiT.from_pretrained(base).final_layer.linear.weight)
    assert torch.equal(
        outputs(load_model(base, adapter=run / "adapter")[0], size=16), outputs(model, size=16)
    )


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run_of, base, tmp_path):
    options = {"data": images("xyz"), "ema_snapshot_every": 2, "accumulate": 2, "steps": 6}
    whole = run_of("whole", **options)
    part = run_of("part", **{**options, "steps": 4})
    # The checkpoint of --init-from is not needed any more.
    base.rename(tmp_path / "gone")
    resume(part, {"steps": 6})
    for weights in ("ema", "model"):
        one, other = (load_model(run, weights=weights)[0].state_dict() for run in (whole, part))
        assert all(one[name].equal(other[name]) for name in one)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((whole / "adapter" / n).read_bytes() == (part / "adapter" / n).read_bytes() for n in names)
    step = whole / "checkpoints" / "step-0000006"
    held = (step / "ema.safetensors").stat().st_size
    assert held < (whole / "base" / "model.safetensors").stat().st_size / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "accumulate": 2},
        {"optimizer": "torch"},
        {"recompute": "blocks", "kernels": "triton"},
        {"lora_dora": True},
    ],
)
def test_settings_of_a_run(base, changes):
    trainer = start(base, **changes)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if n not in trainer.trained}
    for step in range(2):
        trainer.train_step(*trainer.stream.batch(step))
    assert all(p.equal(frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    assert all(value.loss > 0 for value in trainer.values())


def test_grids_are_drawn_with_the_merged_average(run_of):
    run = run_of(sample_every=2, sample_steps=2)
    assert len(list((run / "samples").glob("*.png"))) >= 2


def test_what_does_not_fit_is_refused_before_training(base, run_of, tmp_path, capsys):
    for changes, message in (
        ({"init_from": None}, "--lora 4 adapts the weights of a checkpoint: give --init-from CKPT"),
        ({"lora": None, "lora_alpha": 1.0}, "--lora-alpha applies only to --lora RANK"),
        ({"freeze": ("blocks",)}, "--freeze blocks: --lora freezes all weights already"),
        ({"precision": "fp8"}, "--precision fp8 does not go with --lora"),
        (
            {"lora_targets": ("blocks.7",)},
            "--lora-targets blocks.7 matches no layer; the closest are blocks.",
        ),
        (
            {"lora_train": ("final",)},
            "--lora-train final is no module of the model; the closest are final_layer",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            start(base, **changes)


def test_an_adapter_of_other_weights_or_layers_is_refused(base, run_of, tmp_path):
    run = run_of()
    adapter = run / "adapter"
    small_model(4, depth=2, in_channels=3).save_pretrained(tmp_path / "other")
    small_model(4, depth=1, in_channels=3).save_pretrained(tmp_path / "shallow")
    for path, message in (
        (tmp_path / "other", f"was trained on other weights than .*other: those of {base}"),
        (tmp_path / "shallow", "was trained on another model than .*: depth is 2 there and 1 here"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(path, adapter=adapter)
    with pytest.raises(
        CheckpointError, match=r"is not an adapter: it has no adapter_config.json; give .*run/adapter"
    ):
        load_model(base, adapter=run)
    # An adapter of peft has no facts of ours: its layers are compared.
    (adapter / "base.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*blocks.1.attn.qkv: no such layer"):
        load_model(tmp_path / "shallow", adapter=adapter)
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, "peft_type": "LOHA"}))
    with pytest.raises(CheckpointError, match="an adapter of type 'LOHA', not LORA"):
        load_model(base, adapter=adapter)
    (run / "base" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is not what the run was trained on: its SHA-256 differs"):
        load_model(run)
    (run / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base is missing: the run trained adapters"):
        resume(run, {"steps": 9})


def test_options_of_peft_are_merged_as_peft_merges_them(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["qkv", "attn.proj", "x_embedder.proj"],
        alpha_pattern={"blocks.1.attn.qkv": 3}, rank_pattern={"blocks.0.attn.proj": 2}, init_lora_weights=False,
        modules_to_save=["y_embedder"],
    )  # fmt: skip
    get_peft_model(DiT.from_pretrained(base), options).save_pretrained(tmp_path / "adapter")
    expected = get_peft_model(DiT.from_pretrained(base), options)
    from peft import PeftModel

    expected = PeftModel.from_pretrained(
        DiT.from_pretrained(base), str(tmp_path / "adapter")
    ).merge_and_unload()
    found, _ = load_model(base, adapter=tmp_path / "adapter")
    assert relative(outputs(found), outputs(expected)) < rounding()
    assert relative(outputs(found), outputs(DiT.from_pretrained(base))) > 1e-2


def test_a_part_of_an_adapter_is_refused():
    state = {"a.weight": torch.zeros(4, 3)}
    down, up = torch.zeros(2, 3), torch.zeros(4, 2)
    for adapter, message in (
        ({"a.lora_A.weight": down}, "a: lora_A or lora_B is missing"),
        (
            {"a.lora_A.weight": down, "a.lora_B.weight": torch.zeros(5, 2)},
            "a: the adapter is for 5x3, the layer is 4x3",
        ),
        ({"b.lora_A.weight": down, "b.lora_B.weight": up}, "b: no such layer"),
        ({"c.bias": up}, "c.bias: not a parameter of the model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merged(state, adapter, {"lora_alpha": 1}, "x")


def test_diffusers_loads_the_adapter_into_fast_dit(run_of, base):
    pytest.importorskip("diffusers")
    from dit_fast import FastDiT

    run = run_of()
    expected = outputs(load_model(run)[0])
    adapter = FastDiT.from_dit(DiT.from_pretrained(base))
    adapter.load_lora_adapter(run / "adapter")

    def sample(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return adapter(x, t, y).sample

    assert relative(outputs(sample), expected) < rounding()
    adapter.fuse_lora()
    adapter.unload_lora()
    assert relative(outputs(adapter.dit), expected) < rounding()
    with pytest.raises(CheckpointError, match="was trained on other weights than this model"):
        adapter.load_lora_adapter(run / "adapter")
    whole = run_of("whole", images("xyz"))
    with pytest.raises(ConfigError, match="has y_embedder beside the adapter: load_model"):
        FastDiT.from_dit(DiT.from_pretrained(whole / "base")).load_lora_adapter(whole / "adapter")


def test_the_example_of_the_page(base, tmp_path, capsys):
    """The command lines of docs/fine-tuning.md, on a small model and images in folders."""
    rng = np.random.default_rng(0)
    for name in ("cup", "spoon"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    run, sizes = str(tmp_path / "lora"), "--hidden-size 32 --depth 2 --num-heads 2 --patch-size 2"
    command = f"train --init-from {base} --data {tmp_path / 'photos'} --lora 4 --steps 3 --batch-size 4 --device cpu"
    assert main([*command.split(), *sizes.split(), "--out", run]) == 0
    said = capsys.readouterr().out
    assert "training LoRA of rank 4 on 8 layers and y_embedder whole" in said
    drawn = []
    for number, source in enumerate(([run], [str(base), "--lora", f"{run}/adapter"])):
        out = tmp_path / f"samples-{number}"
        options = ["--num", "2", "--steps", "2", "--npz", "--device", "cpu", "--classes", "all"]
        assert main(["sample", "--ckpt", *source, "--out", str(out), *options]) == 0
        drawn.append(np.load(out / "samples.npz")["arr_0"])
    assert np.array_equal(*drawn)
    assert main(["sample", "--ckpt", str(base), "--lora", run, "--out", str(tmp_path / "none")]) != 0
    assert "is not an adapter" in capsys.readouterr().err


def test_the_page_counts_what_is_trained():
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](input_size=32)
    whole = count(model)
    targets = layers_of(model, (), ())
    inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), model, low_cpu_mem_usage=True)
    counts = count(model)
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
    state = [sum(each.state_bytes.values()) for each in (whole, counts)]
    for text in (
        f"{counts.trained:,} parameters on {len(targets)} layers, {counts.trained / whole.trained:.2%} of "
        f"{whole.trained:,}",
        f"{4 * whole.trained / 1e9:.1f} GB of frozen weights and {state[1] / 1e6:.0f} MB",
        f"instead of {state[0] / 1e9:.1f} GB",
    ):
        assert text in page


def test_two_ranks_train_the_adapter_of_one(tmp_path):
    base = tmp_path / "digits"
    small_model(3, depth=2, in_channels=1, num_classes=10).save_pretrained(base)
    command = f"--init-from {base} --data digits --lora 4 --lora-train y_embedder --steps 3 --batch-size 8 --lr 1e-3"
    sizes = "--hidden-size 32 --depth 2 --num-heads 2 --patch-size 2 --device cpu"
    arguments = ["train", *command.split(), *sizes.split()]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    expected = read_adapter(tmp_path / "one" / "adapter").state
    for parallel in ("ddp", "fsdp"):
        run = tmp_path / parallel
        ended = ranks.train(
            tmp_path / f"said-{parallel}", 2, [*arguments[1:], "--parallel", parallel, "--out", run]
        )
        assert ended.codes == [0, 0], ended.text
        found = read_adapter(run / "adapter").state
        assert found.keys() == expected.keys()
        assert_trained_alike(found, expected, 1e-3)
        model, _ = load_model(run)
        assert torch.equal(
            model.blocks[0].attn.qkv.weight,
            load_model(base, adapter=run / "adapter")[0].blocks[0].attn.qkv.weight,
        )


def test_an_average_of_any_width_is_merged(run_of, base):
    run = run_of(ema_snapshot_every=8, steps=24)
    model, _ = load_model(run, weights="ema:0.12")
    assert relative(model.blocks[1].mlp.fc1.weight, load_model(run)[0].blocks[1].mlp.fc1.weight) < 1
    assert not model.blocks[1].mlp.fc1.weight.equal(load_model(run)[0].blocks[1].mlp.fc1.weight)
