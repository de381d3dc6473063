"""Tables that people may have edited: read with the line of each row, and checked column by column.

What is wrong is said with the file, the line and the column. The words that name a kind of value, such as "a number or
nothing", are the kind itself.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError
from ibkit.runs import TEXT_COLUMNS

LINE = "line"  # name of the index of a table that was read from a file: the line that each row ends in
TEXT, NUMBER, WHOLE, SHARE, ANSWER = "a text", "a number", "a whole number", "0 or 1", "True or False"
OR_NOTHING = " or nothing"
LARGEST_WHOLE = 2**53  # above, neighbours have one float


def read_table(path: Path) -> pd.DataFrame:
    """A CSV table as it was written: only an empty field is a missing value. Its index, `LINE`, is for messages. A
    ScoreError where the file cannot be read, is no CSV table, or a line has more or fewer fields than the heading.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            heading, lines = next(reader, []), []
            if len(set(heading)) < len(heading):
                raise ValueError(f"{max(heading, key=heading.count)!r} heads two columns")
            for fields in reader:
                if fields and len(fields) != len(heading):
                    raise ValueError(f"line {reader.line_num} has {len(fields)} fields and the heading {len(heading)}")
                lines += [reader.line_num] if fields else []
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=TEXT_COLUMNS)
        table.index = pd.Index(lines, name=LINE)
    except (OSError, ValueError, csv.Error) as error:
        said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ScoreError(
            f"{path} is not a readable CSV table ({said}): restore it, or run the notebook that made it again."
        ) from error
    return table


def check_columns(table: pd.DataFrame, kinds: Mapping[str, str], where: str) -> pd.DataFrame:
    """The table with each of these columns that it has as numbers or answers; the first value that is none is a
    ScoreError, with its line where the table was read from a file.

    Args:
        kinds: column -> `TEXT`, `NUMBER` (finite), `WHOLE`, `SHARE` or `ANSWER`, each also with `OR_NOTHING`.
        where: the file, for messages.
    """
    table = table.copy()
    for name, kind in kinds.items():
        if name not in table.columns:
            continue
        values, empty = table[name], table[name].isna()
        too_large = values.map(lambda value: isinstance(value, int) and abs(value) > LARGEST_WHOLE)
        numbers = pd.to_numeric(values.where(~empty & ~too_large), errors="coerce").astype(float)
        what = kind.removesuffix(OR_NOTHING)
        if what == TEXT:
            good = ~empty
        elif what == ANSWER:
            answers = values.map(lambda value: str(value).strip().lower()).map({"true": True, "false": False})
            good = answers.notna()
            numbers = answers.astype("boolean" if kind.endswith(OR_NOTHING) else "bool") if good.all() else answers
        else:
            good = np.isfinite(numbers)
            if what == SHARE:
                good &= numbers.isin((0, 1))
            elif what == WHOLE:
                good &= (numbers % 1 == 0) & (numbers.abs() < LARGEST_WHOLE)
        bad = ~(good | empty if kind.endswith(OR_NOTHING) else good)
        if bad.any():
            value = values[bad].tolist()[0]
            said = "nothing" if pd.isna(value) else repr(value)[:80]
            raise ScoreError(
                f"{place(where, table, bad)}: {name} must be {kind}, and is {said}: restore the table, or run the "
                "notebook that made it again."
            )
        if what == ANSWER:
            table[name] = numbers
        elif what != TEXT:
            table[name] = numbers.astype("Int64") if what == WHOLE and empty.any() else pd.to_numeric(values)
    return table


def check_table(
    table: pd.DataFrame, where: str, *, keys: Mapping[str, str], measured: Mapping[str, str]
) -> pd.DataFrame:
    """`check_columns`, and one row for each of the keys: two of the same are a ScoreError, too. Columns that are
    missing are not looked for.
    """
    table = check_columns(table, {**keys, **measured}, where)
    if set(keys) <= set(table.columns):
        check_unique(table, list(keys), where)
    return table.reset_index(drop=True)


def check_unique(table: pd.DataFrame, keys: Sequence[str], where: str) -> None:
    """Refuse (ScoreError) a table in which two rows have the same keys."""
    if (twice := table.duplicated(list(keys))).any():
        row = table[twice].iloc[0]
        said = ", ".join(f"{name} {row[name]}" for name in keys)
        raise ScoreError(f"{place(where, table, twice)}: there is a row of {said} before this one: keep one of each.")


def place(where: str, table: pd.DataFrame, chosen: pd.Series) -> str:
    """The file and the line of the first row that is chosen; the file alone of a table that was not read from one."""
    return f"{where}, line {table.index[chosen][0]}" if table.index.name == LINE else where
