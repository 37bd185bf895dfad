"""One explorable per notebook: thin views over the rooms above, with manners (see :mod:`.base`)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name -> module; loaded on first use, so that a notebook imports only what its widget needs
_WHERE = {
    "AnnotationDesk": "synthesis",
    "Chat": "start",
    "DeviceDesigner": "device",
    "Explorable": "base",
    "LoraLab": "lora",
    "MachineCheck": "start",
    "MetricExplorer": "metrics",
    "Rewriter": "synthesis",
    "SynthesisLab": "synthesis",
    "PocketLab": "pocket",
    "PolicyDuel": "streaming",
    "ReplicationExplorer": "replication",
    "chat": "start",
    "device_designer": "device",
    "lora_lab": "lora",
    "machine_check": "start",
    "metric_explorer": "metrics",
    "open_desk": "synthesis",
    "pocket_lab": "pocket",
    "synthesis_lab": "synthesis",
    "policy_duel": "streaming",
    "replication_explorer": "replication",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
