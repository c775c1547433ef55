"""One small registry: names to objects, with the nearest name in the error."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from compress.errors import UserError

T = TypeVar("T")


def nearest(word: str, candidates: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest candidate, or an empty string."""
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry(Generic[T]):
    """A dictionary of named objects of one kind, filled by decorators.

    Parameters
    ----------
    kind:
        What the objects are, used in error messages ("criterion").
    package:
        A package whose every module is imported before the first look-up, so that a new file is a new entry.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores the object under `name`; a name can be taken once."""

        def store(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return store

    def _fill(self) -> None:
        if self._package is not None:
            package, self._package = importlib.import_module(self._package), None
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")

    def __getitem__(self, name: str) -> T:
        self._fill()
        if name not in self._items:
            raise UserError(f"Unknown {self.kind} {name!r}{nearest(name, list(self._items))}; known: {', '.join(self.names())}.")
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        self._fill()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._fill()
        return sorted(self._items)
