"""Compare methods: run every training of a design in other processes, then judge the results and write the report.

compare(store, recipe, ComparisonRequest(...), ...)    everything, in the calling process, which loads no torch
prepare(store, recipe, ComparisonRequest(...), ...)    what would be trained, and which differences it could detect
composing.compare_composition(store, ...)              a composition with its parts; trains nothing, and loads torch
cells.CellRunner                                       its trainings and measurements, as jobs
"""

from turret.workspace.comparing.run_comparison import compare, prepare
from turret.workspace.orders import ComparisonRequest

__all__ = ["ComparisonRequest", "compare", "prepare"]
