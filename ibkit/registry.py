"""Registries of methods, scorers and the like, which other packages can extend.

A package adds its own by an entry point, with the name as users write it:

    [project.entry-points."ibkit.methods"]
    my_method = "my_package.my_method:METHOD"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from ibkit.errors import ParameterError
from ibkit.fields import nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Objects by name, each imported on first use.

    Args:
        group: of entry points, "ibkit.methods".
        noun: for messages, "method".
        own: name -> object of this package, or its "module:attribute".
    """

    def __init__(self, group: str, noun: str, own: Mapping[str, T | str]):
        self.group, self.noun = group, noun
        self._own = own
        self._made: dict[str, T] = {name: one for name, one in own.items() if not isinstance(one, str)}

    def __getitem__(self, name: str) -> T:
        if name not in self._made:
            module, _, attribute = self._points[name].partition(":")
            self._made[name] = getattr(import_module(module), attribute)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._points

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def find(self, name: str) -> T:
        """The object of this name; a ParameterError where there is none (the nearest is named), or its module does not
        import.
        """
        if name not in self:
            raise ParameterError(f"There is no {self.noun} {name!r}{nearest(name, self)}")
        try:
            return self[name]
        except (ImportError, AttributeError) as error:
            raise ParameterError(
                f"The {self.noun} {name!r} ({self._points[name]}) cannot be imported: {error}; mend or uninstall the "
                "package that brings it."
            ) from error

    @cached_property
    def _points(self) -> dict[str, str]:
        """Name -> "module:attribute", of this package and of all that are installed when it is first asked."""
        others = {point.name: point.value for point in entry_points(group=self.group)}
        if taken := others.keys() & self._own.keys():
            name = min(taken)
            raise ParameterError(
                f"{others[name]} calls itself the {self.noun} {name!r}, which this kit has: give it another name."
            )
        return {name: str(place) for name, place in self._own.items()} | others
