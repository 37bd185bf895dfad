"""Notebooks as batch jobs: claims and results stated in code, runs through papermill, reports."""

from .claims import ClaimError, claim, record
from .last_run import last_run
from .run import RunReport, run_series

__all__ = ["ClaimError", "RunReport", "claim", "last_run", "record", "run_series"]
