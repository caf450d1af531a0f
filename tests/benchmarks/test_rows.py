"""Result files: what a row may hold, that a file is whole after each addition, and what is refused by name."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import environment
from benchmarks.ops import rows
from benchmarks.ops.rows import Recorder, Row, read_results, slug
from dit_fast.errors import DataError, OutputError

KEY = ("op", "gelu", (2, 64, 384), "fp32", "ours", "forward")


def test_timed_has_median_and_quartiles() -> None:
    row = Row.timed(*KEY, [1.0, 2.0, 3.0, 4.0, 10.0], {"GB/s": 7.0})
    assert (row.lower, row.median, row.upper, row.repeats) == (2.0, 3.0, 4.0, 5)
    assert Row.timed(*KEY, [2.0]).upper == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither a figure nor the reason"),
        ({"failed": "x", "metrics": {"GB/s": 1.0}}, "a reason and no figures"),
        ({"failed": "x", "median": 1.0, "lower": 1.0, "upper": 1.0, "repeats": 1}, "a reason and no figures"),
        ({"failed": ""}, "a reason and no figures"),
        ({"metrics": {"GB/s": float("nan")}}, "nan is not a finite number"),
        ({"median": 1.0, "repeats": 3}, "times"),
        ({"median": 1.0, "lower": 2.0, "upper": 3.0, "repeats": 3}, "times"),
        ({"median": 1.0, "lower": 1.0, "upper": 3.0}, "0 repeats"),
    ],
)
def test_a_row_is_a_figure_or_a_reason(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(*KEY, **fields)


def test_additions(tmp_path: Path) -> None:
    """What was measured again replaces its row, everything else stays, in its order, also for another process."""
    first, failed = Row.timed(*KEY, [1.0, 2.0]), Row(*KEY[:4], "liger", "forward", failed="not installed")
    recorder = Recorder(tmp_path)
    recorder.add(first, failed)
    again = Row.timed(*KEY, [3.0, 4.0], {"GB/s": 1.0})
    Recorder(tmp_path).add(again)
    found = read_results(recorder.path)
    assert found.rows == (again, failed)
    assert found.environment["torch"] == rows.torch.__version__
    assert recorder.path.relative_to(tmp_path).as_posix() == (
        f"{slug(found.device)}/{found.date[:10]}-{found.commit}.json"
    )
    assert [path.name for path in recorder.path.parent.iterdir()] == [recorder.path.name]


def test_slug() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert rows.device_of({"cpu": "AMD EPYC"}) == "AMD EPYC (CPU)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    recorder = Recorder(tmp_path)
    recorder.add(Row.timed(*KEY, [1.0, 2.0]), Row(*KEY[:4], "liger", "forward", failed="not installed"))
    return recorder.path


def changed(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="other"), "its format is 'other'"),
        (lambda data: data.pop("commit"), "it has no 'commit'"),
        (lambda data: data.update(commit="0123abc"), "its head says that it is"),
        (lambda data: data.update(environment=[]), "no result file"),
        (lambda data: data["rows"][0].update(median=None), "times"),
        (lambda data: data["rows"][0].update(median=float("nan")), "NaN is not a figure"),
        (lambda data: data["rows"][0].update(speed=3), "speed"),
        (lambda data: data["rows"][1].update(median=1.0), "a reason and no figures"),
        (lambda data: data["rows"].append(data["rows"][0]), "two rows of one measurement"),
    ],
)
def test_foreign_files_are_refused_by_name(path: Path, change, message: str) -> None:
    changed(path, change)
    with pytest.raises(DataError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format"'])
def test_cut_files_are_refused_by_name(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path} is no result file"):
        Recorder(path.parents[1])
    assert path.read_text() == text


def test_every_cut_is_noticed(path: Path) -> None:
    whole = path.read_text()
    for end in range(0, len(whole.rstrip()), 97):
        path.write_text(whole[:end])
        with pytest.raises(DataError, match="no result file"):
            read_results(path)


def test_other_versions_do_not_mix(path: Path) -> None:
    changed(path, lambda data: data["environment"].update(torch="1.0", load_average=99))
    with pytest.raises(DataError, match="made with another torch: move it away first"):
        Recorder(path.parents[1])


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        Recorder(tmp_path / "file")


def test_a_tree_without_a_repository_has_the_commit_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it lies in another repository."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "a")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    copied = tmp_path / "copied"
    copied.mkdir()
    monkeypatch.setattr(environment, "ROOT", copied)
    assert Recorder(tmp_path).path.name.endswith("-unknown.json")
    (copied / "COMMIT").write_text("0123abc\n")
    assert Recorder(tmp_path).path.name.endswith("-0123abc.json")


def test_commit_is_dirty_where_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and the README, which benchmarks write themselves, are no code."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for name in ("kernels/a.py", "benchmarks/results/a.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    assert environment.commit() == ""
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "a")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "benchmarks/results/a.json").write_text("b")
    (tmp_path / "README.md").write_text("b")
    clean = environment.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "kernels/a.py").write_text("b")
    assert environment.commit() == f"{clean}-dirty"
