"""The version of a kernel: a hash of the source files that a product in its format runs through.

A measured time belongs to it, like the device and the library versions: after an edit the time says nothing any more. Only what a format's
`op.py` and `triton.py` import, directly or not, is hashed, so that work on one kernel leaves the times of the others valid.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).parent


def sources(format: str, root: Path = ROOT) -> list[Path]:
    """The files of the package that `format` runs through, sorted; C sources lie beside the module that compiles them."""
    found: set[Path] = set()
    waiting = sorted((root / format).glob("*.py"))
    if not waiting:
        raise ValueError(f"there is no kernel {format!r} in {root}")
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path, root)
    return sorted(found | set((root / format).glob("*.c")))


def _imported(path: Path, root: Path) -> list[Path]:
    """Files of the package that a module imports by relative imports, those inside functions included."""
    found: list[Path] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1]
        if folder != root and root not in folder.parents:
            continue
        inside = folder.joinpath(*(node.module or "").split("."))
        names = [inside.with_suffix(".py")] if node.module else []
        names += [inside / f"{alias.name}.py" for alias in node.names]
        found += [name for name in names if name.is_file()]
    return found


@functools.cache
def version(*formats: str) -> str:
    """Twelve hexadecimal digits that change with any source file of these formats; without formats, of the package."""
    digest = hashlib.sha256()
    found = {path for format in formats for path in sources(format)} if formats else {*ROOT.rglob("*.py"), *ROOT.rglob("*.c")}
    for path in sorted(found):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
