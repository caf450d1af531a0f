"""The report: README and plots are those of the result files; what is cut, foreign or failed shows no figure."""

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.ops import rows
from benchmarks.ops.rows import Recorder, Results, Row
from benchmarks.report import devices, fill, full, headline, load, outdated, regions
from dit_fast.errors import DataError

ENVIRONMENT = {"cpu": "Some CPU", "cores": 4, "torch": "2.13", "triton": "3.7"}
GPU = ENVIRONMENT | {"gpu": "NVIDIA H100", "driver": "570", "clocks": "1980 MHz"}
README = """# x

<!-- table: ladder -->
old
<!-- end -->

end
"""


def operation(provider: str, median: float, case: str = "gelu", **changes) -> Row:
    metrics = {"GB/s": 1234.5, "share of the ceiling": 0.875}
    return Row(
        *("op", case, (2, 64, 384), "fp32", provider, "forward"),
        **{"median": median, "lower": 0.9 * median, "upper": 1.1 * median, "repeats": 9, "metrics": metrics},
        **changes,
    )


def step(provider: str, median: float, case: str = "DiT-S/2", **metrics: float) -> Row:
    times = {"median": median, "lower": 0.98 * median, "upper": 1.02 * median, "repeats": 9}
    return Row(
        "train", case, (8, 256), "fp32", provider, "step", **times, metrics=metrics, load=0.5, threads=2
    )


def missing(provider: str, benchmark: str = "op", case: str = "gelu", reason: str = "not installed") -> Row:
    return Row(benchmark, case, (2, 64, 384), "fp32", provider, "forward", failed=reason)


def results(*found: Row, date: str = "2026-11-21T10:00:00Z", environment: dict = ENVIRONMENT) -> Results:
    return Results(rows.device_of(environment), date, "0123abc", environment, found)


def test_the_readme_and_plots_are_current() -> None:
    """Whoever changes a result file or a table by hand: python -m benchmarks.report."""
    assert [str(path) for path in outdated(report.ROOT / "README.md", rows.RESULTS)] == []


def test_operations_stand_beside_their_peers() -> None:
    (device,) = devices(
        [results(operation("ours", 2e-3), operation("eager", 3e-3), operation("apex", 2.5e-3))]
    )
    line = next(line for line in full(device).splitlines() if line.startswith("| `gelu`"))
    assert line == (
        "| `gelu` | 2 x 64 x 384, fp32 | forward | 2,000 +- 200 | 3,000 +- 300 |  | apex 2,500 +- 250 | "
        "1,234 | 88% |"
    )
    assert "commit 0123abc, torch 2.13" in full(device)


def test_steps_are_relative_to_the_compiled_plain_step() -> None:
    found = results(
        step("+ torch.compile", 0.02, **{"images/s": 400.0}),
        step("ours", 0.016, **{"images/s": 500.0, "launches": 512}),
    )
    text = full(*devices([found]))
    assert "train, DiT-S/2, batch 8, 256 px, step:" in text
    assert "| + torch.compile | fp32 | 20 +- 0.4 | 1.00 | 400 |  |" in text
    assert "| ours | fp32 | 16 +- 0.32 | 1.25 | 500 | 512 |" in text
    assert "2 of 4 cores, load average 0.5 to 0.5" in text


def test_other_benchmarks_are_listed() -> None:
    part = Row.timed("roofline", "DiT-S/2", (8, 256), "fp32", "ours", "qkv", [0.25], {"limit ms": 200.0})
    (device,) = devices([results(part)])
    assert "## Roofline: DiT-S/2" in full(device)
    assert "| batch 8, 256 px | ours | qkv | fp32 | 250 +- 0 | 200 |" in full(device)
    assert "qkv" not in "".join(regions([device]).values())


def test_a_failed_case_has_a_reason_and_no_figure() -> None:
    found = results(
        operation("ours", 2e-3),
        missing("apex"),
        missing("liger"),
        missing("ours", case="mlp", reason="wrong"),
    )
    text = full(*devices([found]))
    assert "Not timed: gelu apex, gelu liger (not installed); mlp ours (wrong)." in text
    line = next(line for line in text.splitlines() if line.startswith("| `mlp`"))
    assert set(line.split("|")[4:]) <= {"  ", ""}
    found = results(missing("ours", "train", "DiT-S/2", "needs a CUDA device"))
    assert not [line for line in full(*devices([found])).splitlines() if line.startswith("| ours")]
    assert report.plots(*devices([found])) == {}


def test_gpus_are_not_measured_until_there_is_a_file() -> None:
    cpu = results(operation("ours", 2e-3), step("ours", 1.0))
    found = regions(devices([cpu]))
    assert all(text.startswith("NVIDIA GPU: not measured yet.\n") for text in found.values())
    assert "**Some CPU (CPU)**" in found["ladder"]
    operations = regions(devices([cpu, results(operation("ours", 2e-5), environment=GPU)]))
    assert "not measured yet" in operations["ladder"]
    both = regions(devices([cpu, results(step("ours", 0.1), environment=GPU)]))
    assert "not measured yet" not in both["ladder"]
    assert both["ladder"].index("NVIDIA H100") < both["ladder"].index("Some CPU")
    assert "driver 570, clocks 1980 MHz" in both["ladder"]


def test_a_case_is_of_one_file_the_newest() -> None:
    """Rows of different runs never stand in one comparison."""
    old = results(operation("ours", 1e-3), operation("eager", 3e-3), operation("ours", 5e-3, "mlp"))
    new = results(operation("ours", 2e-3), date="2026-11-22T10:00:00Z")
    (device,) = devices([new, old])
    found = {group.case: [(row.provider, row.median) for row in group.rows] for group in device.groups}
    assert found == {"gelu": [("ours", 2e-3)], "mlp": [("ours", 5e-3)]}


def test_headline_is_the_largest_model() -> None:
    (device,) = devices(
        [results(*(step("ours", 1.0, case) for case in ("DiT-S/2", "DiT-XL/2", "DiT-L/2", "other")))]
    )
    assert [group.case for group in headline(device.groups)] == ["DiT-XL/2", "other"]


def test_regions_are_filled_and_the_rest_stays() -> None:
    found = {"ladder": "new\n"}
    text = fill(README, found)
    assert text == README.replace("old\n", "new\n")
    assert fill(text, found) == text
    for broken in (README.replace("table: ladder", "table: other"), README + README, "no table"):
        with pytest.raises(DataError, match=r"README.md has the tables"):
            fill(broken, found)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    recorder = Recorder(tmp_path / "results")
    recorder.add(operation("ours", 2e-3), operation("eager", 3e-3), step("ours", 1.0), missing("apex"))
    write(tmp_path)
    return tmp_path


def write(tree: Path) -> list[str]:
    found = outdated(tree / "README.md", tree / "results")
    for make in found.values():
        make()
    return sorted(path.name for path in found)


def test_everything_is_written_once(tree: Path) -> None:
    assert write(tree) == []
    (folder,) = (tree / "results").iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png"}


def test_what_is_changed_is_noticed(tree: Path) -> None:
    readme = tree / "README.md"
    readme.write_text(readme.read_text().replace("1,000 +- 20", "2,000 +- 20"))
    assert write(tree) == ["README.md"]
    Recorder(tree / "results").add(operation("eager", 4e-3))
    assert write(tree) == ["report.md"]
    Recorder(tree / "results").add(step("ours", 2.0))
    assert write(tree) == ["README.md", "report.md", "steps.png"]
    (path,) = tree.glob("results/*/steps.png")
    path.write_bytes(path.read_bytes()[:-40][:20])
    assert write(tree) == ["steps.png"]
    path.unlink()
    assert write(tree) == ["steps.png"]


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}'])
def test_cut_and_foreign_files_are_refused_by_name(tree: Path, text: str) -> None:
    (path,) = tree.glob("results/*/*.json")
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path} is no result file"):
        load(tree / "results")


def test_a_failed_row_with_a_number_is_refused(tree: Path) -> None:
    (path,) = tree.glob("results/*/*.json")
    data = json.loads(path.read_text())
    data["rows"][-1]["metrics"] = {"GB/s": 1.0}
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="a failed measurement has a reason and no figures"):
        load(tree / "results")


def test_command(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "ROOT", tree)
    monkeypatch.setattr(report, "RESULTS", tree / "results")
    assert report.main(["--check"]) == 0
    (tree / "README.md").write_text(README)
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md: not current\n"
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    (path,) = tree.glob("results/*/*.json")
    path.write_text("{")
    assert report.main([]) == 1
    assert f"report: {path} is no result file" in capsys.readouterr().err
