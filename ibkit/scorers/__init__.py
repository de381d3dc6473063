"""Picture metrics and rewards behind one interface (`Scorer`), made by name (`make_scorer`)."""

from ibkit.scorers.base import SCORERS, Level, Scorer, column_of, make_scorer

__all__ = ["SCORERS", "Level", "Scorer", "column_of", "make_scorer"]
