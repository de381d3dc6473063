"""What a method adds to a base model: named deltas that stack, each a small file.

A kind of delta is one file with `attach`, `parameters`, `without` and `export`, and one line in `KINDS`.
"""

from ibkit.adapt.adapted import Adapted
from ibkit.adapt.kinds import KINDS, attach, freeze, load_state, parameters_of, state, without

__all__ = ["KINDS", "Adapted", "attach", "freeze", "load_state", "parameters_of", "state", "without"]
