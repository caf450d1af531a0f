"""Machine code (SASS) of a compiled kernel, read for what bounds a pass over memory besides its bytes.

`figures(cubin)` counts the barriers and instructions of the main loop, which a program walks once for each tile, and
how many 128-bit loads are in flight there. The main loop is the longest backward branch; code without one is one tile
from beginning to end. Instructions of a loop within it count once, whatever its number of turns.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: byte address, operation with its modifiers, operands as they are printed."""

    address: int
    name: str
    operands: str

    def registers(self) -> list[int]:
        """Numbers of the general registers that it names, a wide operand by its first."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]

    def branches_back_to(self) -> int | None:
        """Address of the earlier instruction that a branch goes to, None for anything else."""
        target = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(target[1], 16) if target and int(target[1], 16) < self.address else None


@dataclass(frozen=True)
class Figures:
    """Of one kernel, per warp: `tile` instructions of the main loop, 0 without one, and `once` those outside it.

    `barriers` of all warps and 128-bit `loads_in_flight` are those of the main loop, else of the whole kernel.
    """

    tile: int
    once: int
    barriers: int
    loads_in_flight: int


def figures(sass: str) -> Figures:
    """Read the figures off what cuobjdump or nvdisasm prints of one kernel."""
    code = [Instruction(int(address, 16), *rest) for address, *rest in LINE.findall(sass)]
    loop = main_loop(code)
    tile = loop or code
    return Figures(
        tile=len(loop),
        once=sum(instruction.name != "NOP" for instruction in code) - len(loop),
        barriers=sum(instruction.name.startswith("BAR.") for instruction in tile),
        # Twice, for the loads that one turn of a loop leaves to the next.
        loads_in_flight=max(loads_in_flight([*loop, *tile]), default=0),
    )


def main_loop(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """The instructions of the longest loop, empty if there is none. What lies behind the last exit is off the path."""
    last = max((number for number, one in enumerate(code) if one.name == "EXIT"), default=len(code))
    loops = [
        (one.address - target, target, one.address)
        for one in code[:last]
        if (target := one.branches_back_to()) is not None
    ]
    if not loops:
        return []
    _, first, end = max(loops)
    return [one for one in code if first <= one.address <= end]


def loads_in_flight(code: Sequence[Instruction]) -> Iterator[int]:
    """After each instruction, the number of 128-bit global loads whose result nothing has touched yet."""
    waiting: dict[int, range] = {}
    copies, groups = 0, []
    for number, one in enumerate(code):
        touched = one.registers()
        for issued in [n for n, result in waiting.items() if any(r in result for r in touched)]:
            del waiting[issued]
        name, *modifiers = one.name.split(".")
        if name == "LDG" and "128" in modifiers:
            waiting[number] = range(touched[0], touched[0] + 4)
        elif name == "LDGSTS" and "128" in modifiers:
            copies += 1
        elif name == "LDGDEPBAR":
            groups.append(copies)
            copies = 0
        elif name == "DEPBAR" and (left := re.search(r"SB\d+, 0x([0-9a-f]+)", one.operands)):
            groups = groups[max(len(groups) - int(left[1], 16), 0) :]
        yield len(waiting) + copies + sum(groups)
