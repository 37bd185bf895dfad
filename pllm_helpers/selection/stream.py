"""A stream of dialogue sets through a buffer: one decision each, resumed where the buffer stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import SupportsIndex

from ..dialogue import DialogueSet
from ..runtime import InputError
from .buffer import Decision, DialogueBuffer
from .policies import Policy, make_policy
from .scoring import MetricTable

__all__ = ["run_stream"]


def run_stream(
    buffer: DialogueBuffer,
    policy: Policy | str,
    dialogues: Sequence[DialogueSet],
    table: MetricTable,
    *,
    stop: SupportsIndex | None = None,
    on_decision: Callable[[Decision], object] | None = None,
) -> list[Decision]:
    """Stream ``dialogues[buffer.position:stop]`` through the buffer; returns the decisions of this call.

    Parameters
    ----------
    policy : a policy, or its key in ``POLICIES``.
    dialogues : the stream from its beginning; it may have grown since the last call.
    table : their scores, row by row, from :func:`~pllm_helpers.selection.score_dialogues`.
    stop : position to stop before; the end of the stream if not given.
    on_decision : called after each decision, when it is on disk. An exception from it ends the
        stream between two sets.

    A stream that was interrupted, or killed, goes on to the same buffer, bit by bit. Raises
    :class:`~pllm_helpers.runtime.InputError` if stream, scores or policy are not those by which the
    buffer was filled so far, and for a table of the mode that the policy does not use.
    """
    policy = make_policy(policy) if isinstance(policy, str) else policy
    if len(dialogues) != len(table):
        raise InputError("table", f"expected {len(dialogues)} rows, one per dialogue set, got {len(table)}")
    if policy.mode is not None and policy.mode != table.mode:
        raise InputError(
            "table",
            f"expected scores of mode {policy.mode!r} for {policy!r}, got {table.mode!r}",
            f"Call score_dialogues(…, mode={policy.mode!r}).",
        )
    end = len(dialogues) if stop is None else min(stop.__index__(), len(dialogues))
    buffer.check_past(policy, dialogues, table)
    names, decisions = table.domain_names, []
    for i in range(buffer.position, end):
        decision = buffer.offer(
            policy,
            dialogues[i],
            embedding=table.embeddings[i],
            domain=names[i],
            eoe=float(table.eoe[i]),
            dss=float(table.dss[i]),
            mode=table.mode,
        )
        buffer._verified = (dialogues, table)
        decisions.append(decision)
        if on_decision is not None:
            on_decision(decision)
    return decisions
