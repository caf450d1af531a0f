"""`dit-fast list` and `dit-fast completion`."""

import json
import subprocess
from contextlib import nullcontext
from typing import get_args

import pytest

from dit_fast.cli import COMMANDS, main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.sampling import Sampler, SamplerConfig, flow_schedule
from dit_fast.sampling.solvers import Solver
from dit_fast.sampling.trajectory import draws_noise
from dit_fast.training.presets import PRESETS
from tests.checkpoints import save_checkpoint
from tests.small_models import small_model


def listed(capsys, *arguments):
    assert main(["list", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_there_is(capsys):
    assert {row["preset"] for row in listed(capsys, "presets")} == PRESETS.keys()
    assert [row["solver"] for row in listed(capsys, "solvers")] == list(get_args(Solver))
    models = {row["model"]: row for row in listed(capsys, "models")}
    assert len(models) == 12
    assert models["DiT-XL/2"] == {"model": "DiT-XL/2", "parameters": "675.1 M", "GMACs": "118.62"}


def test_solvers_are_of_what_they_sample(capsys):
    model = small_model(learn_sigma=False)
    processes = {
        "diffusion": create_diffusion("4", learn_sigma=False),
        "flow matching": flow_schedule(4, start=0.1, last_step=0.1),
    }
    for row in listed(capsys, "solvers"):
        of = row["of"].split(",")[0].split(" and ")
        config = SamplerConfig(solver=row["solver"])
        assert draws_noise(config) == ("random" in row["of"] and "--eta" not in row["of"])
        for name, process in processes.items():
            with nullcontext() if name in of else pytest.raises(ConfigError):
                Sampler(model, process, config)


def test_runs_with_their_step_loss_and_age(tmp_path, capsys):
    manifest = {"step": 7, "train_config": {"model": "DiT-S/2", "steps": 20}}
    folder = tmp_path / "group" / "mine"
    save_checkpoint(folder, small_model(), {}, {}, manifest)
    (folder / "log.jsonl").write_text('{"step": 5, "loss": 0.5}\n{"step": 7, "loss": 0.25}\n{"torn')
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "d" / "checkpoints").mkdir(parents=True)  # too deep
    empty, mine = listed(capsys, "runs", tmp_path)
    assert empty["step"] == "no checkpoint"
    assert (mine["run"], mine["step"], mine["loss"]) == (str(folder), "7/20", "0.2500")
    assert mine["age"].endswith(" s")


def test_one_line_where_there_is_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["list", "runs"]) == 0
    assert capsys.readouterr().out == "no runs in the working directory, 3 levels deep\n"
    assert main(["list", "runs", "nowhere"]) == 1
    assert capsys.readouterr().err == "dit-fast: error: nowhere: no such folder\n"
    assert main(["list", "models", "here"]) == 1
    assert capsys.readouterr().err == "dit-fast: error: here: models are not in a folder; remove it\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["dit-fast", ""], COMMANDS), (["dit-fast", "sample", "--solver", ""], get_args(Solver))],
)
def test_bash_completes_commands_and_values(words, expected, tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "dit-fast.bash"
    script.write_text(capsys.readouterr().out)
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_dit_fast; "
    shell = ["bash", "-c", asked + 'printf "%s\\n" "${COMPREPLY[@]}"']
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert set(expected) <= set(done.stdout.split())
