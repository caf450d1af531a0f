"""Rows of the ladder as a table."""

from collections.abc import Sequence

from benchmarks.rows import Row

BASE = "+ torch.compile"


def tables(rows: Sequence[Row]) -> str:
    """Rows as Markdown, a table for each case."""
    cases: dict[tuple[str, str, tuple[int, ...], str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.benchmark, row.case, row.shape, row.direction), []).append(row)
    found = []
    for (benchmark, case, shape, direction), members in cases.items():
        batch, pixels = shape
        found.append(f"{benchmark}, {case}, batch {batch}, {pixels} px, {direction}:\n\n{table(members)}\n")
    return "\n".join(found)


def table(rows: Sequence[Row]) -> str:
    """Rows of one case, each time relative to that of the compiled plain model where that is there."""
    base = next((row.median for row in rows if row.provider == BASE and row.median), None)
    rate = next((name for row in rows for name in row.metrics if name.startswith("images/s")), "images/s")
    lines = [
        f"| rung | dtype | ms | quartiles | {rate} | over {BASE} | MFU | of the roofline | peak GB | launches |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.median is None or row.lower is None or row.upper is None:
            lines.append(f"| {row.provider} | {row.dtype} | {row.failed} | | | | | | | |")
            continue
        formats = {rate: ".4g", "MFU": ".1%", "of the roofline": ".0%", "peak GB": ".1f", "launches": ".0f"}
        found = {name: f"{row.metrics[name]:{how}}" for name, how in formats.items() if name in row.metrics}
        times = f"{1e3 * row.median:.4g} | {1e3 * row.lower:.4g} - {1e3 * row.upper:.4g}"
        cells = [times, found.pop(rate), f"{base / row.median:.2f}" if base else ""]
        cells += [found.get(name, "") for name in list(formats)[1:]]
        lines.append(f"| {row.provider} | {row.dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)
