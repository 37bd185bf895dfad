"""A paper's table, figure or claim as one function each; notebooks and sweeps call these."""

from .cells import Cell, CellResult, Settings, Workbench
from .policy_study import (
    ALL_POLICIES,
    Grid,
    Study,
    buffer_size_sweep,
    development_grid,
    learning_curve,
    load_results,
    metric_ablation,
    policy_comparison,
    released_code_gap,
    run_cells,
    synthesis_sweep,
)
from .streams import (
    DATA_SETS,
    StudyStream,
    authored_study_stream,
    data_set_stream,
    open_stream,
    person_stream,
    shorten,
)

__all__ = [
    "ALL_POLICIES",
    "Cell",
    "CellResult",
    "DATA_SETS",
    "Grid",
    "Settings",
    "Study",
    "StudyStream",
    "Workbench",
    "authored_study_stream",
    "buffer_size_sweep",
    "data_set_stream",
    "development_grid",
    "learning_curve",
    "load_results",
    "metric_ablation",
    "open_stream",
    "person_stream",
    "policy_comparison",
    "released_code_gap",
    "run_cells",
    "shorten",
    "synthesis_sweep",
]
