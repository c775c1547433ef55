"""Ahead-of-time compilation of a Triton kernel without a GPU, and what the machine code says about it.

`triton.compile` with a GPUTarget runs the whole pipeline down to a cubin; registers, stack and shared memory are read from the cubin with
cuobjdump, the instructions of a loop with nvdisasm, both inside the triton package. Not usable where TRITON_INTERPRET is set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass
class Built:
    """registers per thread, stack and local bytes (spills), shared bytes, the PTX, and the instructions of every loop body."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str
    loops: list[list[str]] = field(default_factory=list)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def build(kernel, pointers: dict[str, str], scalars: dict[str, str], constants: dict, capability: int, warps: int, stages: int = 3,
          loops: bool = False, aligned: tuple[str, ...] = (), **options) -> Built:
    """Compiles `kernel` for sm_<capability>; pointers and the scalars `aligned` are promised to be divisible by 16, as at run time."""
    names = kernel.arg_names
    constants = {**{n: None for n in names if n not in pointers and n not in scalars}, **constants}
    signature = {n: pointers.get(n) or scalars.get(n) or "constexpr" for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, *aligned)}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name) if loops else ""
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Built(numbers["REG"], numbers["STACK"], numbers["LOCAL"], built.metadata.shared, built.asm["ptx"], loop_bodies(code))


def loop_bodies(code: str) -> list[list[str]]:
    """The opcodes between each label and the last backward branch to it, in program order."""
    label_at: dict[str, int] = {}
    opcodes: list[str] = []
    branches: dict[str, int] = {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x?_?\w+):", line)
        if label:
            label_at[label.group(1)] = len(opcodes)
            continue
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line)
        if instruction is None:
            continue
        opcodes.append(instruction.group(1))
        target = re.search(r"`\((\.L_x?_?\w+)\)", instruction.group(2))
        if target and instruction.group(1).startswith("BRA") and target.group(1) in label_at:
            branches[target.group(1)] = len(opcodes)
    return [opcodes[label_at[name] : end] for name, end in sorted(branches.items(), key=lambda item: item[1])]
