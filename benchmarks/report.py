"""Tables and plots of the result files: `python -m benchmarks.report [--check]`.

Writes, from benchmarks/results/<device>/<date>-<commit>.json alone, the regions between `<!-- table: NAME -->` and
`<!-- end -->` of README.md, and for each device report.md, with everything, and plots beside its files. Rows that are
compared come from one file: a case is taken whole from the newest one that has it. `--check` writes nothing, names
what is not current and exits with 1.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.ops.rows import RESULTS, Results, Row, read_results, slug
from dit_fast.errors import DataError, DitFastError, MissingExtraError
from dit_fast.models import DiT_models
from dit_fast.utils.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"\d{4}-\d\d-\d\d-.+\.json")
REGION = re.compile(r"(?<=<!-- table: )(\S+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
OURS = "ours"
PROVIDERS = {OURS: OURS, "eager": "PyTorch", "compiled": "torch.compile"}
COMPILED = "+ torch.compile"
STEP_BENCHMARKS = ("train", "sample")
OPERATIONS, STEPS = "operations.png", "steps.png"


@dataclass(frozen=True)
class Group:
    """Rows of one benchmark and case, and the file that they are from."""

    benchmark: str
    case: str
    source: Results
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Device:
    """What is known of one device: the newest rows of each benchmark and case."""

    name: str
    on_gpu: bool
    groups: tuple[Group, ...]

    def of(self, *benchmarks: str) -> list[Group]:
        return [group for group in self.groups if group.benchmark in benchmarks]


def load(folder: Path) -> list[Device]:
    """Devices with result files in `folder`, GPUs first. DataError names a file that is cut or foreign."""
    files = sorted(path for path in folder.glob("*/*.json") if NAME.fullmatch(path.name))
    return devices(read_results(path) for path in files)


def devices(results: Iterable[Results]) -> list[Device]:
    found: dict[str, dict[tuple[str, str], Group]] = {}
    on_gpu: dict[str, bool] = {}
    for source in sorted(results, key=lambda results: results.date):
        groups = found.setdefault(source.device, {})
        on_gpu[source.device] = source.on_gpu
        for key in dict.fromkeys((row.benchmark, row.case) for row in source.rows):
            rows = tuple(row for row in source.rows if (row.benchmark, row.case) == key)
            groups[key] = Group(*key, source, rows)
    known = [Device(name, on_gpu[name], tuple(groups.values())) for name, groups in found.items()]
    return sorted(known, key=lambda device: (not device.on_gpu, device.name))


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def time(row: Row | None, unit: float) -> str:
    """Median and half the distance of the quartiles; "" of a row that has none."""
    if row is None or row.median is None or row.lower is None or row.upper is None:
        return ""
    return f"{number(row.median / unit)} +- {number((row.upper - row.lower) / 2 / unit)}"


def lines_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def origin(groups: Sequence[Group]) -> str:
    """Versions, commit, date and load of what a table shows, in a line."""
    parts = []
    for source in dict.fromkeys(id(group.source) for group in groups):
        group = next(group for group in groups if id(group.source) == source)
        found = group.source.environment
        rows = [row for other in groups if other.source is group.source for row in other.rows]
        said = [group.source.date[:10], f"commit {group.source.commit}", f"torch {found['torch']}"]
        said += [f"triton {found['triton']}"]
        if group.source.on_gpu:
            said += [f"driver {found['driver']}", f"clocks {found['clocks']}"]
        else:
            loads, threads = [row.load for row in rows], sorted({row.threads for row in rows})
            said += [f"{' and '.join(map(str, threads))} of {found['cores']} cores"]
            said += [f"load average {min(loads):.1f} to {max(loads):.1f}"]
        parts.append(", ".join(said))
    return "; ".join(parts)


def reasons(groups: Sequence[Group]) -> list[str]:
    """Why rows have no figure, each reason once."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for row in group.rows:
            if row.failed is not None:
                names = found.setdefault(row.failed, [])
                name = f"{row.case} {row.provider}" if row.benchmark == "op" else row.provider
                if name not in names:
                    names.append(name)
    if not found:
        return []
    return [
        "",
        "Not timed: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in found.items()) + ".",
    ]


def operations(groups: Sequence[Group]) -> list[str]:
    """Microbenchmarks: one line for each operation, shape, dtypes and pass; microseconds."""
    header = ["operation", "shape", "pass", *PROVIDERS.values(), "others", "ours: GB/s", "of the ceiling"]
    table = []
    for group in groups:
        for key in dict.fromkeys((row.shape, row.dtype, row.direction) for row in group.rows):
            rows = {r.provider: r for r in group.rows if (r.shape, r.dtype, r.direction) == key}
            shape, dtype, direction = key
            others = [
                f"{name} {time(row, 1e-6)}"
                for name, row in rows.items()
                if name not in PROVIDERS and row.median
            ]
            metrics: Mapping[str, float] = rows[OURS].metrics if OURS in rows else {}
            table.append([
                f"`{group.case}`", f"{' x '.join(map(str, shape))}, {dtype}", direction,
                *(time(rows.get(name), 1e-6) for name in PROVIDERS), "; ".join(others),
                number(metrics["GB/s"]) if "GB/s" in metrics else "",
                f"{metrics['share of the ceiling']:.0%}" if "share of the ceiling" in metrics else "",
            ])  # fmt: skip
    note = (
        "Microseconds, median +- half the distance of the quartiles; the ceiling is what a copy and a matrix product "
        f"reach in the same run. {origin(groups)}."
    )
    return [*lines_of(header, table), "", note, *reasons(groups)]


def steps(groups: Sequence[Group]) -> list[str]:
    """Whole steps: a table for each benchmark, case, shape and direction; milliseconds and what stands beside them."""
    lines = []
    for group in groups:
        for key in dict.fromkeys((row.shape, row.direction) for row in group.rows):
            rows = [row for row in group.rows if (row.shape, row.direction) == key and row.failed is None]
            if not rows:
                continue
            names = list(dict.fromkeys(name for row in rows for name in row.metrics))
            base = next((row.median for row in rows if row.provider == COMPILED), None)
            header = ["", "dtype", "ms", *(["over + torch.compile"] if base else []), *names]
            table = []
            for row in rows:
                over = f"{base / row.median:.2f}" if base and row.median else ""
                metrics = [number(row.metrics[name]) if name in row.metrics else "" for name in names]
                table.append([row.provider, row.dtype, time(row, 1e-3), *([over] if base else []), *metrics])
            lines += [f"{group.benchmark}, {group.case}, {describe(row.shape)}, {row.direction}:", ""]
            lines += [*lines_of(header, table), ""]
    note = "Milliseconds, median +- half the distance of the quartiles."
    return [*lines, f"{note} {origin(groups)}.", *reasons(groups)]


def listing(group: Group) -> list[str]:
    """Any other benchmark: its rows as they are."""
    rows = [row for row in group.rows if row.failed is None]
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    table = [
        [describe(row.shape), row.provider, row.direction, row.dtype, time(row, 1e-3)]
        + [number(row.metrics[name]) if name in row.metrics else "" for name in names]
        for row in rows
    ]
    return [
        *lines_of(["", "", "", "dtype", "ms", *names], table),
        "",
        f"{origin([group])}.",
        *reasons([group]),
    ]


def describe(shape: tuple[int, ...]) -> str:
    """Batch and image size of a model's step; other shapes by their numbers."""
    return f"batch {shape[0]}, {shape[1]} px" if len(shape) == 2 else " x ".join(map(str, shape))


def headline(groups: Sequence[Group]) -> list[Group]:
    """Of each benchmark the largest model of the paper that was measured; all cases that are not such a model."""
    order = {name: place for place, name in enumerate(DiT_models)}
    shown = []
    for group in groups:
        rivals = [
            other.case for other in groups if other.benchmark == group.benchmark and other.case in order
        ]
        if group.case not in order or group.case == min(rivals, key=lambda case: order[case]):
            shown.append(group)
    return shown


def regions(known: Sequence[Device]) -> dict[str, str]:
    """README regions by name. Operations are in each device's report.md: on a CPU they measure dispatch."""
    lines = []
    measured = [(device, headline(device.of(*STEP_BENCHMARKS))) for device in known]
    if not any(device.on_gpu and groups for device, groups in measured):
        lines += ["NVIDIA GPU: not measured yet.", ""]
    for device, groups in measured:
        if groups:
            place = f"benchmarks/results/{slug(device.name)}"
            drawn = f", [plot]({place}/{STEPS})" if STEPS in plots(device) else ""
            lines += [f"**{device.name}** ([everything]({place}/report.md){drawn}):", "", *steps(groups), ""]
    return {"ladder": "\n".join(lines).rstrip() + "\n"}


def fill(text: str, found: Mapping[str, str]) -> str:
    """`text` with its regions anew. DataError for a region that is not known, missing or there twice."""
    named = [match[1] for match in REGION.finditer(text)]
    if sorted(named) != sorted(found):
        raise DataError(f"README.md has the tables {sorted(named)}, the results fill {sorted(found)}")
    return REGION.sub(lambda match: f"{match[1]}{match[2]}{found[match[1]]}", text)


def full(device: Device) -> str:
    """Everything that is known of a device, as Markdown."""
    lines = [f"# {device.name}", "", "Made by `python -m benchmarks.report` from the files beside it.", ""]
    if not device.on_gpu:
        lines += ["Measured on a CPU: nothing here is a GPU figure.", ""]
    if found := device.of("op"):
        lines += ["## Operations", "", *operations(found), ""]
    if found := device.of(*STEP_BENCHMARKS):
        lines += ["## Steps", "", *steps(found), ""]
    for group in device.groups:
        if group.benchmark not in ("op", *STEP_BENCHMARKS):
            lines += [f"## {group.benchmark.capitalize()}: {group.case}", "", *listing(group), ""]
    return "\n".join(lines).rstrip() + "\n"


def plots(device: Device) -> dict[str, dict[str, list[Row]]]:
    """File names of a device's plots and the rows that each one shows, by title of what is compared."""
    found: dict[str, dict[str, list[Row]]] = {OPERATIONS: {}, STEPS: {}}
    for group in device.of("op", *STEP_BENCHMARKS):
        for row in group.rows:
            title = f"{row.case}, {describe(row.shape)}, {row.direction}"
            if row.benchmark != "op":
                found[STEPS].setdefault(f"{row.benchmark} {title}", []).append(row)
            elif row.direction in ("both", "step"):
                found[OPERATIONS].setdefault(f"{title}, {row.dtype}", []).append(row)
    timed = {
        name: {title: [row for row in rows if row.median] for title, rows in parts.items()}
        for name, parts in found.items()
    }
    return {name: parts for name, parts in timed.items() if any(parts.values())}


def digest(parts: Mapping[str, Sequence[Row]]) -> str:
    """Of the rows that a plot is drawn from; kept in the PNG."""
    rows = [asdict(row) for part in parts.values() for row in part]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw(device: str, parts: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Bars of the medians with their quartiles, over the slowest of each part, the fastest first."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'dit-fast[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = sum(1 + len(rows) for rows in parts.values())
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.2 * bars), layout="constrained")
    labels = []
    for title, rows in parts.items():
        labels.append(title)
        slowest = max((row.median or 0.0 for row in rows), default=0.0)
        for row in sorted(rows, key=lambda row: row.median or 0.0):
            lower, median, upper = ((value or 0.0) / slowest for value in (row.lower, row.median, row.upper))
            colour = "tab:orange" if row.provider.startswith(OURS) else "tab:blue"
            axes.barh(len(labels), median, 0.8, color=colour, xerr=[[median - lower], [upper - median]])
            labels.append(f"{row.provider}  {time(row, 1e-3)} ms")
    axes.set_yticks(range(bars), labels, fontsize=7)
    axes.set_ylim(bars - 0.5, -0.5)
    axes.set_xlim(0, 1.5)
    axes.set_xlabel(f"time over the slowest, {device}")
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, dpi=100, metadata={"Source": digest(parts)})
    )
    plt.close(figure)


def is_current(path: Path, parts: Mapping[str, Sequence[Row]]) -> bool:
    """Whether a plot was drawn from these rows."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Source") == digest(parts)
    except OSError:
        return False


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def outdated(readme: Path, folder: Path) -> dict[Path, Callable[[], None]]:
    """Files that are not what the results say, with what writes each of them anew."""
    known = load(folder)
    texts = {readme: fill(readme.read_text(), regions(known))}
    found: dict[Path, Callable[[], None]] = {}
    for device in known:
        place = folder / slug(device.name)
        texts[place / "report.md"] = full(device)
        for name, parts in plots(device).items():
            if not is_current(place / name, parts):
                found[place / name] = partial(draw, device.name, parts, place / name)
    for path, text in texts.items():
        if not path.is_file() or path.read_text() != text:
            found[path] = partial(write_atomically, path, partial(_write_text, text))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots of the result files.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if anything is not current"
    )
    args = parser.parse_args(arguments)
    try:
        found = outdated(ROOT / "README.md", RESULTS)
        for path, write in found.items():
            print(f"{path.relative_to(ROOT)}: {'not current' if args.check else 'written'}")
            if not args.check:
                write()
    except DitFastError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
