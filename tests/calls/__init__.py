"""Calls of every public function of core and ops and of every registered method, as hypothesis strategies.

A call is a shape set, options that follow from the set (so that one compiled program serves all calls of a function with it), values
that hypothesis draws, and at times one argument spoiled. `CASES` and `PLAIN` say how each function is called: a new public function
takes an entry in core.py or ops.py here; methods are found by their `small`. `missing` names what has none.
"""

from tests.calls import core, methods, ops, prefill
from tests.calls.cases import CASES, ODD, PLAIN, Case, missing
from tests.calls.values import SETS, Sizes, Values

__all__ = ["CASES", "ODD", "PLAIN", "SETS", "Case", "Sizes", "Values", "core", "methods", "missing", "ops", "prefill"]
