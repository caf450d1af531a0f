"""Tables of what was counted, in U = one bfloat16 token tensor of batch * tokens * width elements."""

from collections.abc import Iterable

from benchmarks.analysis.traffic import MEMORY_BOUND, PHASES, Program, Traffic

HEADER = (
    "| mode | block | forward U | backward U | sum U | kept U | launches forward | launches backward |\n"
    "|---|---|---|---|---|---|---|---|"
)


TITLES = {
    "dit": "DiT block",
    "lightningdit": "block of LightningDiT (RMSNorm, SwiGLU, QK-norm, rotary positions)",
}


def launches(traffic: Traffic, phase: str) -> str:
    """ "memory-bound + library" launches of a phase."""
    bound = traffic.launches(phase, MEMORY_BOUND)
    return f"{bound} + {traffic.launches(phase) - bound}"


def row(mode: str, name: str, traffic: Traffic, unit: int) -> str:
    """One line of the comparison."""
    moved = [traffic.moved(phase) / unit for phase in PHASES]
    kept = f"{traffic.kept / unit:.1f}"
    if traffic.weights >= 0.05 * unit:
        kept += f" (+ {traffic.weights / unit:.1f} weights)"
    counts = " | ".join(launches(traffic, phase) for phase in PHASES)
    return f"| {mode} | {name} | {moved[0]:.1f} | {moved[1]:.1f} | {sum(moved):.1f} | {kept} | {counts} |"


def details(traffic: Traffic, unit: int) -> list[str]:
    """One line for each distinct launch: what it is, how often, what it reads and writes."""
    lines = ["| phase | launches | kind | launch | read U | written U |", "|---|---|---|---|---|---|"]
    for one, count in sorted(traffic.passes.items(), key=lambda item: PHASES.index(item[0].phase)):
        name = one.name if len(one.name) <= 72 else f"{one.name[:69]}..."
        lines.append(
            f"| {one.phase} | {count} | {one.kind} | {name} | {one.read / unit:.2f} | {one.write / unit:.2f} |"
        )
    return lines


def comparison(
    block: str,
    shape: Program,
    blocks: Iterable[tuple[str, str, Traffic]],
    versions: str,
    verbose: bool = True,
) -> str:
    """The document for (mode, name, steady-state traffic) triples of a block of TITLES."""
    option = "" if block == "dit" else f" --block {block}"
    blocks = list(blocks)
    lines = [
        f"# Memory traffic of one {TITLES[block]} in the middle of a network, forward and backward",
        "",
        f"Counted by `python -m benchmarks.analysis.traffic{option}`: B = {shape.batch}, T = {shape.tokens}, "
        f"D = {shape.width}, H = {shape.heads}; U = B * T * D * 2 bytes = {shape.unit / 1e6:.1f} MB. {versions}.",
        "Each kernel moves each element of a buffer once; matrix products and attention count as launches without "
        "bytes, on both sides. A row is",
        f"the difference between {shape.blocks + 1} and {shape.blocks} blocks. Launches are memory-bound ones + "
        "library calls. Nothing was timed.",
        "",
        HEADER,
        *(row(mode, name, traffic, shape.unit) for mode, name, traffic in blocks),
    ]
    if verbose:
        for mode, name, traffic in blocks:
            lines += ["", f"## {name}, {mode}", "", *details(traffic, shape.unit)]
    return "\n".join(lines) + "\n"
