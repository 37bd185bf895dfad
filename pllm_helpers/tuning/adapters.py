"""Adapters on a model that is never touched: attach, save, check, load, use."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..runtime import InputError, write_whole

if TYPE_CHECKING:
    from ..models import LLM
    from .result import TuningResult

WEIGHTS, CONFIG, CARD, CHECKPOINT = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "card.json",
    "checkpoint.safetensors",
)


def without_adapter(llm: LLM) -> LLM:
    """``llm`` itself; raises :class:`~pllm_helpers.runtime.InputError` if it already carries an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(m, BaseTunerLayer) for m in llm.model.modules()):
        raise InputError("llm", "expected a model without an adapter", "Use the model that load_llm returned.")
    return llm


def twin(llm: LLM) -> LLM:
    """A second module tree around the *same* tensors: takes milliseconds and no memory for weights.

    Adapters go into the twin, so that ``llm`` answers as before, in other threads too, and an
    exception leaves nothing to undo.
    """
    with without_adapter(llm).lock:  # a running generation changes the config for its own duration
        tensors = [*llm.model.parameters(), *llm.model.buffers()]
        model = copy.deepcopy(llm.model, {id(t): t for t in tensors})
    return replace(llm, model=model, lock=threading.RLock())


def decoder_layers(llm: LLM) -> torch.nn.ModuleList:
    """The transformer blocks of ``llm``, first to last."""
    found = [m for m in llm.model.modules() if isinstance(m, torch.nn.ModuleList)]
    if not found:
        raise InputError("llm", f"expected a model made of a list of blocks, got {type(llm.model).__name__}")
    return max(found, key=lambda m: sum(p.numel() for p in m.parameters()))


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of names, shapes and the first 64 values (as bf16) of every weight: tells base models apart."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        head = p.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        digest.update(repr((name, tuple(p.shape))).encode() + head)
    return digest.hexdigest()[:16]


def attach(llm: LLM, config: Any, seed: int) -> Any:
    """A peft model around a twin of ``llm`` with a new adapter, drawn from ``seed`` alone."""
    double = twin(llm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _wrapped(double.model, config)
    config.base_model_name_or_path = llm.name
    return model


def _wrapped(model: torch.nn.Module, config: Any) -> Any:
    """peft's own wrapping, without its advice about names and folders."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that peft saves, detached copies."""
    from peft import get_peft_model_state_dict

    return {
        k: v.detach().cpu().clone().contiguous()
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def write_adapter(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any], card: dict) -> None:
    """Adapter as peft saves it, and ``card.json``, which comes last and carries the adapter's checksum."""
    from safetensors.torch import save

    data = save(dict(state), metadata={"format": "pt"})
    write_whole(folder / WEIGHTS, data)
    write_whole(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())
    card["adapter_sha256"] = hashlib.sha256(data).hexdigest()
    write_whole(folder / CARD, json.dumps(card, indent=1).encode())


def plain_config(config: Any) -> dict[str, Any]:
    """A peft configuration as JSON types."""
    values = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in values.items()}


def read_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, configuration and card (empty for an adapter from elsewhere) of a saved adapter.

    Raises :class:`~pllm_helpers.runtime.InputError` on a missing, damaged or non-finite adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    again = "Train it again or copy it again."
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise InputError("adapter", f"expected {name} in {folder}, found none", "Give the folder of an adapter.")
    try:
        data = (folder / WEIGHTS).read_bytes()
        card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).is_file() else {}
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if card.get("adapter_sha256", "") not in ("", hashlib.sha256(data).hexdigest()):
            raise InputError("adapter", f"expected the weights that {CARD} lists in {folder}, got others", again)
        state = load(data)
    except (OSError, ValueError, SafetensorError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError("adapter", f"expected a whole adapter in {folder}, got: {e}", again) from e
    if not all(torch.isfinite(v).all() for v in state.values()):
        raise InputError("adapter", f"expected finite weights in {folder}, got NaN or infinity", again)
    return state, config, card


@contextlib.contextmanager
def adapted(llm: LLM, adapter: TuningResult | str | Path) -> Iterator[LLM]:
    """The model with an adapter active, for ``generate``, ``response_nll`` and whatever takes an LLM.

    ``llm`` itself stays as it is (the adapter lives in a second module tree around the same
    weights), so two adapters may be active side by side, and leaving the block, by an exception
    too, undoes nothing because nothing was changed.

    Parameters
    ----------
    adapter : what a tuner returned, or a folder: of a tuner, or an adapter that peft can read. A
        full-parameter run gives a model with its tuned weights; one that only its log is left of is replayed.

    Raises :class:`~pllm_helpers.runtime.InputError` if ``llm`` already carries an adapter, if the
    adapter is damaged, or if it was trained for another base model.
    """
    import peft

    from .result import TuningResult, load_result

    if isinstance(adapter, (str, Path)) and not (Path(adapter) / WEIGHTS).exists() and (Path(adapter) / CARD).exists():
        adapter = load_result(adapter)
    if isinstance(adapter, TuningResult) and not adapter.adapter:
        from .full import with_weights
        from .replay import replay

        yield with_weights(llm, adapter.weights) if adapter.weights else replay(llm, adapter)
        return
    if isinstance(adapter, TuningResult):
        state, config, card = adapter.adapter, adapter.config, adapter.card
    elif isinstance(adapter, (str, Path)):
        state, config, card = read_adapter(Path(adapter))
    else:
        raise InputError("adapter", f"expected a TuningResult or a folder, got {type(adapter).__name__}")
    double = twin(llm)
    base = card.get("base_fingerprint")
    if base and base != fingerprint(llm.model):
        raise InputError(
            "adapter",
            f"expected an adapter for {llm.name}, got one for {card.get('base_model')} with other weights",
            "Load the model it was trained on.",
        )
    yield replace(double, model=_injected(double.model, peft, config, state))


def _injected(model: torch.nn.Module, peft: Any, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """``model`` with the adapter's layers in place, in evaluation mode, gradients off."""
    try:
        settings = peft.PeftConfig.from_peft_type(**{**config, "base_model_name_or_path": None, "inference_mode": True})
        wrapped = _wrapped(model, settings)
        found = peft.set_peft_model_state_dict(wrapped, state)
    except (ValueError, RuntimeError, KeyError, TypeError) as e:
        raise InputError("adapter", f"expected an adapter that fits the model, got: {e}") from e
    missing = [k for k in found.missing_keys if "lora_" in k]
    if missing or found.unexpected_keys:
        odd = (missing or found.unexpected_keys)[0]
        raise InputError("adapter", f"expected weights for every adapted layer and no other, got a misfit at {odd}")
    return wrapped.get_base_model().eval().requires_grad_(False)
