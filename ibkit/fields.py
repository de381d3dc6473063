"""Typed fields of frozen dataclasses: parameters of notebooks, settings of methods.

A field says what it is, where its default comes from and what is allowed. Values from users are checked against that;
the error for an unknown name suggests the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

from ibkit.errors import ParameterError

T = TypeVar("T")


def field(
    default: Any,
    help: str,
    source: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    may_be_empty: bool = False,
) -> Any:
    """Declare a field of a dataclass.

    Args:
        default: its value where nobody gives one; its type is the field's.
        help: one line for people.
        source: of the default: a paper, a reference implementation, or why it is ours.
        low: smallest number allowed, inclusive.
        high: largest number allowed, inclusive.
        choices: the texts allowed; empty when any is.
        may_be_empty: whether a text or list may be empty although its default is not.
    """
    metadata = {"help": help, "source": source, "low": low, "high": high, "choices": choices}
    metadata["may_be_empty"] = may_be_empty or default in ("", [])
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Field:
    """A field as it was declared, with its name and default; of a nested dataclass the name is dotted."""

    name: str
    type: Any  # a class; named so, the word is no annotation below
    default: Any
    help: str = ""
    source: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    may_be_empty: bool = False
    items: type | None = None  # of a list

    @property
    def allowed(self) -> str:
        """What is allowed, in words: 'a whole number from 0 to 1000'."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        noun = {
            bool: "True or False",
            int: "a whole number",
            float: "a number",
            str: "a text" if self.may_be_empty else "a text that is not empty",
            list: ("a list of " if self.may_be_empty else "a list of one or more ")
            + ("whole numbers" if self.items is int else "texts that are not empty"),
            tuple: f"a list of {len(self.default) if self.type is tuple else 0} numbers",
            dict: "a table of names and values, such as {'n_steps': 400}",
        }[self.type]
        if self.low is not None and self.high is not None:
            return f"{noun} from {self.low} to {self.high}"
        return noun if self.low is None else f"{noun} not below {self.low}"

    def check(self, value: Any) -> Any:
        """Return `value` in the field's own type; raise ValueError when it is not allowed."""
        value = self._typed(value)
        empty = self.type in (str, list) and not (value.strip() if self.type is str else value)
        if empty and not self.may_be_empty:
            raise ValueError(value)
        if self.choices and value not in self.choices:
            raise ValueError(value)
        for number in value if self.type in (list, tuple) else [value]:
            if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
                raise ValueError(value)
        return value

    def _typed(self, value: Any) -> Any:
        kind = type(value)
        if self.type is float:
            return _number(value)
        if self.type is tuple and kind in (list, tuple) and len(value) == len(self.default):
            return tuple(map(_number, value))
        if kind is not self.type:
            raise ValueError(value)
        if self.type is list:
            if not all(type(item) is self.items and (self.items is not str or item.strip()) for item in value):
                raise ValueError(value)
            return list(value)
        if self.type is dict:
            if not all(isinstance(name, str) for name in value):
                raise ValueError(value)
            return dict(value)
        return value


def _number(value: Any) -> float:
    if type(value) not in (int, float, str):
        raise ValueError(value)
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(value)
    return value


_types_of = functools.cache(typing.get_type_hints)  # evaluates annotations, which is slow


def fields_of(settings: Any, prefix: str = "") -> list[Field]:
    """The fields of a dataclass (or of an instance, whose values are then the defaults), nested ones by dotted name."""
    rows = []
    cls = settings if isinstance(settings, type) else type(settings)
    types = _types_of(cls)
    for one in dataclasses.fields(cls):
        if not isinstance(settings, type):
            default = getattr(settings, one.name)
        else:
            missing = one.default is dataclasses.MISSING
            default = one.default_factory() if missing and callable(one.default_factory) else one.default
        if dataclasses.is_dataclass(default):
            rows += fields_of(default, f"{prefix}{one.name}.")
        else:
            items = next(iter(get_args(types[one.name])), None) if isinstance(default, list) else None
            rows.append(Field(prefix + one.name, type(default), default, items=items, **one.metadata))
    return rows


def checked(rows: Iterable[Field], values: Mapping[str, Any], whose: str, noun: str = "parameter") -> dict[str, Any]:
    """The values, each in its field's own type.

    Args:
        whose, noun: for messages, such as "Notebook 01_personalize", whose parameters they are.

    Raises:
        ParameterError: an unknown name (the nearest one is named), or a value that is not allowed (what is, is named).
    """
    known, found = {row.name: row for row in rows}, {}
    for name, value in values.items():
        if name not in known:
            raise ParameterError(f"{whose} has no {noun} {name!r}{nearest(name, known)}")
        try:
            found[name] = known[name].check(value)
        except (ValueError, OverflowError):
            text = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
            wanted_text = known[name].type is str and type(value) in (int, float, bool)
            hint = " (papermill: pass text with -r instead of -p)" if wanted_text else ""
            raise ParameterError(
                f"{whose}: {noun} {name!r} must be {known[name].allowed}, not {text} of type "
                f"{type(value).__name__}{hint}."
            ) from None
    return found


def fill(settings: T, values: Mapping[str, Any], whose: str) -> T:
    """A copy of a settings dataclass with the values that are given, by name; of a nested one by dotted name. See
    `checked`.
    """
    return _replaced(settings, checked(fields_of(settings), values, whose, "setting"))


def _replaced(settings: T, flat: Mapping[str, Any]) -> T:
    own = {name: value for name, value in flat.items() if "." not in name}
    for outer in {name.partition(".")[0] for name in flat if "." in name}:
        inner = {n.partition(".")[2]: v for n, v in flat.items() if n.startswith(f"{outer}.")}
        own[outer] = _replaced(getattr(settings, outer), inner)
    return dataclasses.replace(cast(Any, settings), **own)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name, with its full stop or question mark."""
    known = list(known)
    if not known:
        return "; it has none."
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; it is one of {', '.join(known)}."
