"""The language model: loading, chat formatting, batched generation."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..runtime import InputError, go_offline
from .dtypes import faster_dtype
from .weights import BUNDLED_LLM, DTYPES, bundled_gguf, converted_gguf, fetch, mapped_model, quiet_transformers

__all__ = ["LLM", "load_llm"]

Messages = Sequence[Mapping[str, str]]


@dataclass
class LLM:
    """A language model with its tokenizer.

    Attributes
    ----------
    model : the torch module, in evaluation mode, gradients off.
    tokenizer : pads on the left.
    name : what :func:`load_llm` was asked for.
    dtype : ``"bf16"`` or ``"fp32"``.
    kind : ``"causal"`` (writes text) or ``"masked"`` (fills gaps, as RoBERTa does).
    folder : where the weights lie.
    """

    model: Any
    tokenizer: Any
    name: str
    dtype: str
    kind: Literal["causal", "masked"] = "causal"
    folder: Path | None = None
    lock: Any = field(default_factory=threading.RLock, repr=False)  # a widget may answer while a cell generates

    def __repr__(self) -> str:
        return f"LLM({self.name}, {self.parameters / 1e6:.0f}M parameters, {self.dtype}, {self.kind})"

    @property
    def parameters(self) -> int:
        """Number of weights; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a turn: of the generation config, the tokenizer, and ``<|im_end|>``/``<|eot_id|>``."""
        ids: set[int] = set()
        config = getattr(self.model, "generation_config", None)
        for value in (getattr(config, "eos_token_id", None), self.tokenizer.eos_token_id):
            ids.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
        vocabulary = self.tokenizer.get_vocab()
        ids.update(vocabulary[t] for t in ("<|im_end|>", "<|eot_id|>") if t in vocabulary)
        return sorted(ids)

    @property
    def end_of_turn(self) -> int:
        """The token that ends a reply: the chat template's, else the first of :attr:`stop_ids`."""
        vocabulary = self.tokenizer.get_vocab()
        known = [vocabulary[t] for t in ("<|im_end|>", "<|eot_id|>") if t in vocabulary]
        return known[0] if known else self.stop_ids[0]

    def format_chat(
        self, prompt: str | Messages, *, system: str | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The text that the model sees for a user's message or a list of ``{"role", "content"}`` messages.

        A model without a chat template (OPT, base models) gets ``content`` lines joined by
        newlines. Raises :class:`~pllm_helpers.runtime.InputError` on another shape of input.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if not messages or any(set(m) < {"role", "content"} or not isinstance(m["content"], str) for m in messages):
            raise InputError("prompt", "expected text or a list of {'role': …, 'content': text} messages")
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        return "\n".join(m["content"] for m in messages) + ("\n" if add_generation_prompt else "")


def load_llm(
    name: str | Path | None = None,
    *,
    dtype: str = "auto",
    attention: str = "eager",
    revision: str | None = None,
    allow_download: bool = False,
    device: str = "cpu",
) -> LLM:
    """Load a language model, memory-mapped, without touching the network.

    Parameters
    ----------
    name : ``None`` for the bundled SmolLM2-135M-Instruct; a local folder with ``config.json``
        and safetensors; a ``.gguf`` file; or a hub id such as ``"Qwen/Qwen2-0.5B-Instruct"``.
    dtype : ``"bf16"``, ``"fp32"`` or ``"auto"``: the faster of both, timed once on this machine.
    attention : attention implementation of transformers; ``"eager"`` is the faster one for short
        prompts on a CPU.
    revision : branch, tag or commit of a hub repository.
    allow_download : let this one call reach the hub. Everything else stays offline.

    Raises :class:`~pllm_helpers.runtime.InputError` if the model is not to be had; the message
    says what to type. Only safetensors and GGUF files are read, never pickles.
    """
    if dtype not in ("auto", *DTYPES):
        raise InputError("dtype", f"expected 'auto', 'bf16' or 'fp32', got {dtype!r}")
    go_offline()
    label, folder, converted = _locate(name, revision, allow_download)
    config, auto_class, kind = _describe(folder)
    config._attn_implementation = attention
    built: dict[str, Any] = {}

    def build(wanted: str) -> Any:
        if wanted not in built:
            built[wanted] = _build(folder, converted, config, auto_class, wanted, attention)
        return built[wanted]

    chosen = faster_dtype(label, build) if dtype == "auto" else dtype
    model = build(chosen)
    built.clear()
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LLM(model.to(device), tokenizer, label, chosen, kind, folder)


def _locate(name: str | Path | None, revision: str | None, allow_download: bool) -> tuple[str, Path, bool]:
    """Label, folder, and whether the folder is a converted one (a file per dtype)."""
    if name is None or str(name) == BUNDLED_LLM:
        return BUNDLED_LLM, converted_gguf(bundled_gguf()), True
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError("model", f"expected a GGUF file, found none at {path}")
        return path.stem, converted_gguf(path.resolve()), True
    if path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise InputError(
                "model",
                f"expected config.json and *.safetensors in {path}",
                "Give the folder that save_pretrained wrote.",
            )
        return path.name, path, False
    text = str(name)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text.strip():
        raise InputError("model", f"expected a local folder or a hub id, found no folder {text!r}")
    return text, fetch(text, revision, allow_download), False


def _describe(folder: Path) -> tuple[Any, Any, Literal["causal", "masked"]]:
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

        try:
            config = AutoConfig.from_pretrained(folder)
        except (ValueError, KeyError, OSError) as e:
            raise InputError("model", f"expected a config.json that transformers can read in {folder}, got: {e}") from e
    names = getattr(config, "architectures", None) or [""]
    if "MaskedLM" in names[0]:
        return config, AutoModelForMaskedLM, "masked"
    return config, AutoModelForCausalLM, "causal"


def _build(folder: Path, converted: bool, config: Any, auto_class: Any, dtype: str, attention: str) -> Any:
    files = [folder / f"{dtype}.safetensors"] if converted else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            "model",
            f"expected *.safetensors in {folder}, found none",
            "For a hub model give a revision that has them, for instance revision='refs/pr/1'.",
        )
    with quiet_transformers():
        from safetensors import SafetensorError

        try:
            model = mapped_model(auto_class, config, files, DTYPES[dtype], attention)
            mapped = model is not None
            if not mapped:  # another dtype or layout on disk: converted in memory, so not shared between kernels
                model = auto_class.from_pretrained(
                    folder, dtype=DTYPES[dtype], attn_implementation=attention, use_safetensors=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            raise InputError(
                "model",
                f"expected whole weights that fit config.json in {folder}, got: {e}",
                "Fetch or save the model again.",
            ) from e
        if mapped and (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().requires_grad_(False)
