"""Finds the toolkit's own `kernels` and `models` packages, whatever else carries these generic names.

In a checkout (and an editable install) they are top-level folders beside `compress`; a built wheel carries them as
`compress.kernels` and `compress.models`, so that it can never overwrite the files of another distribution.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    inside, beside = _HERE / name, _HERE.parent / name
    return inside if (inside / "__init__.py").is_file() else beside


def _is_own(module: ModuleType | None, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == folder / "__init__.py"


def own(name: str) -> ModuleType:
    """The toolkit's package `name` ("kernels" or "models"), imported once under one module name."""
    folder = _folder(name)
    for candidate in (name, f"compress.{name}"):
        if _is_own(sys.modules.get(candidate), folder):
            return sys.modules[candidate]
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == folder / "__init__.py":
        return importlib.import_module(name)
    full = f"compress.{name}"
    spec = importlib.util.spec_from_file_location(full, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"the package {name!r} of this toolkit was not found in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module
