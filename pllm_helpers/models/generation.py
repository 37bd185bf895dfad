"""Batched generation that gives each prompt the answer it would get alone."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..runtime import InputError

if TYPE_CHECKING:
    from .llm import LLM

__all__ = ["Generation", "generate", "progress_bar"]


class Generation(NamedTuple):
    """One answer: its text, the number of new tokens, and whether the model ended the turn itself."""

    text: str
    tokens: int
    finished: bool


def progress_bar(total: int, what: str, progress: bool | None = None) -> Any:
    """A text progress bar; ``None`` shows it only for work that lasts more than two seconds."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=progress is False, delay=0 if progress else 2, leave=False, ascii=" =")


def generate(
    llm: LLM,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int = 64,
    temperature: float | int = 0.0,
    top_p: float | int = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 16,
    chat: bool = True,
    system: str | None = None,
    progress: bool | None = None,
    details: bool = False,
) -> list[str] | list[Generation]:
    """Answers to ``prompts``, in their order.

    Prompts are sorted by length, padded on the left and run in batches; a row leaves its batch
    when it ends its turn. What else is in a batch does not change an answer: attention is
    computed in fp64 for bf16 weights (their rounding would otherwise depend on the padding) and
    every row draws from its own random numbers, seeded by ``seed`` and the row's place in
    ``prompts``.

    Parameters
    ----------
    prompts : user messages, or lists of ``{"role", "content"}`` messages.
    max_new_tokens : upper bound on the answer's length, in tokens.
    temperature : 0 is greedy; above 0, samples from the softmax of logits / temperature.
    top_p : sample from the smallest set of tokens whose probability reaches ``top_p``.
    seed : one number for all, or one per prompt: such a prompt draws what it would draw alone.
    chat : put prompts through the model's chat template; ``False`` continues the raw text.
    system : system message in front of every prompt (``chat=True`` only).
    progress : ``None`` shows a bar for long work only.
    details : return :class:`Generation` tuples instead of texts.

    Raises :class:`~pllm_helpers.runtime.InputError` on blank or too long prompts and on settings
    out of range.
    """
    if isinstance(prompts, str):
        raise InputError("prompts", "expected a list of prompts, got one text", "Write [prompt].")
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    _in_range("max_new_tokens", max_new_tokens, 1, 100_000)
    _in_range("temperature", temperature, 0, 100)
    _in_range("batch_size", batch_size, 1, 10_000)
    if not 0 < top_p <= 1:
        raise InputError("top_p", f"expected a number above 0 and at most 1, got {top_p}")
    if isinstance(seed, Sequence) and len(seed) != len(prompts):
        raise InputError("seed", f"expected one number, or one for each of {len(prompts)} prompts, got {len(seed)}")
    own = [(s, 0) for s in seed] if isinstance(seed, Sequence) else [(seed, place) for place in range(len(prompts))]
    with llm.lock:
        rows = [_token_ids(llm, p, i, chat, system, max_new_tokens) for i, p in enumerate(prompts)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # longest first: memory peaks at once, not at the end
    answers: list[Generation] = [Generation("", 0, False)] * len(rows)
    with progress_bar(len(rows), "answers", progress) as bar, llm.lock, torch.inference_mode(), batch_invariant(llm):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            draws = [own[i] for i in chosen]
            written = _decode(llm, [rows[i] for i in chosen], draws, max_new_tokens, temperature, top_p)
            for i, ids in zip(chosen, written, strict=True):
                ended = bool(ids) and ids[-1] in llm.stop_ids
                text = llm.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
                answers[i] = Generation(text.strip() if chat else text, len(ids), ended)
            bar.update(len(chosen))
    return answers if details else [a.text for a in answers]


def _in_range(name: str, value: object, low: float | int, high: float | int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(name, f"expected a number from {low} to {high}, got {value!r}")


def _token_ids(llm: LLM, prompt: Any, place: int, chat: bool, system: str | None, new: int) -> list[int]:
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError(f"prompts[{place}]", "expected text, it is blank")
    if not chat and not isinstance(prompt, str):
        raise InputError(f"prompts[{place}]", "expected text, got messages", "Messages need chat=True.")
    text = llm.format_chat(prompt, system=system) if chat else prompt
    templated = chat and getattr(llm.tokenizer, "chat_template", None)
    ids = llm.tokenizer(text, add_special_tokens=not templated)["input_ids"]
    room = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if not ids or len(ids) + new > room:
        raise InputError(
            f"prompts[{place}]",
            f"expected 1 to {room - new} tokens (the model has room for {room}), got {len(ids)}",
            "Shorten the prompt or max_new_tokens.",
        )
    return ids


def _decode(
    llm: LLM,
    rows: list[list[int]],
    seeds: list[tuple[int, int]],
    new: int,
    temperature: float | int,
    top_p: float | int,
) -> list[list[int]]:
    """Token ids written after each row, stop token included."""
    from transformers import DynamicCache

    model, device = llm.model, llm.device
    wanted = len(rows)
    rows = rows + rows[-1:] * (2 - wanted)  # a product with one row takes another kernel, which rounds bf16 differently
    seeds = seeds + seeds[-1:] * (2 - wanted)
    pad, cache, shared = llm.tokenizer.pad_token_id or 0, DynamicCache(config=model.config), _shared(rows)
    if shared:  # what all rows begin with is read once; two rows, see above
        start = torch.tensor([rows[0][:shared]] * 2, device=device)
        model(input_ids=start, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long, device=device))
        rows = [r[shared:] for r in rows]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    mask = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    draws = [_generator(*s) for s in seeds] if temperature > 0 else None
    alive = list(range(len(rows)))  # rows of the batch -> rows of the answer
    written: list[list[int]] = [[] for _ in rows]
    stop = set(llm.stop_ids)
    for _ in range(new):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            # a list of one place, not 1: a slice would not be contiguous and cost a copy of the output matrix per row
            logits_to_keep=torch.tensor([ids.shape[1] - 1], device=device),
        )
        logits = out.logits[:, -1].float()
        if draws is None:
            token = logits.argmax(-1)
        else:
            token = torch.stack(
                [_sample(row, temperature, top_p, draws[i]) for row, i in zip(logits, alive, strict=True)]
            )
        for i, t in zip(alive, token.tolist(), strict=True):
            written[i].append(t)
        open_rows = {i for i in alive if i < wanted and written[i][-1] not in stop}
        if not open_rows:
            break
        keep = [k for k, i in enumerate(alive) if i in open_rows]
        if len(keep) == 1:
            keep.append(next(k for k in range(len(alive)) if k != keep[0]))
        ids, mask, position = token[:, None], torch.cat([mask, mask.new_ones(len(alive), 1)], 1), position[:, -1:] + 1
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            ids, mask, position, alive = ids[index], mask[index], position[index], [alive[k] for k in keep]
    return [w[: 1 + next((k for k, t in enumerate(w) if t in stop), len(w))] for w in written[:wanted]]


SHARED_TOKENS = 32  # a shorter common beginning is not worth a pass of its own


def _shared(rows: list[list[int]]) -> int:
    """Tokens that all rows begin with; every row keeps at least one of its own. 0 where they are few."""
    first, last = min(rows), max(rows)
    most = min(map(len, rows)) - 1
    same = next((k for k in range(most) if first[k] != last[k]), most)
    return same if same >= SHARED_TOKENS and len(rows) > 2 else 0


def _generator(seed: int, place: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}|{place}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _sample(logits: torch.Tensor, temperature: float | int, top_p: float | int, draw: torch.Generator) -> torch.Tensor:
    p = torch.softmax(logits.double().cpu() / temperature, -1)
    head, token = p.topk(min(1024, len(p)))  # nearly always enough, and four times as fast as sorting all
    if top_p < 1 and head.sum() >= top_p:
        token, place = token.sort()  # equal ones in the order of their ids
        head, place = head[place].sort(descending=True, stable=True)
        token = token[place]
    else:
        head, token = p.sort(descending=True, stable=True)
    if top_p < 1:
        head[head.cumsum(0) - head >= top_p] = 0  # keeps the token that crosses top_p
    point = torch.rand(1, generator=draw, dtype=torch.float64) * head.sum()
    return token[torch.searchsorted(head.cumsum(0), point).clamp(max=int((head > 0).sum()) - 1)][0].to(logits.device)


def _fp64_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
):
    """Attention in double precision, rounded once at the end.

    Sums over a padded and an unpadded row differ by their order, about 1e-16 in fp64, which
    never survives rounding to bf16. Shapes: query (b, h, q, d), key and value (b, kv, n, d).
    """
    b, h, q, d = query.shape
    kv = key.shape[1]
    grouped = query.double().reshape(b, kv, h // kv * q, d)
    score = (grouped @ key.double().transpose(2, 3) * (scaling or d**-0.5)).view(b, h, q, -1)
    if attention_mask is not None:
        score = score + attention_mask
    weight = torch.softmax(score, -1)
    out = (weight.view(b, kv, h // kv * q, -1) @ value.double()).view(b, h, q, -1)
    return out.to(query.dtype).transpose(1, 2).contiguous(), weight


@contextlib.contextmanager
def batch_invariant(llm: LLM) -> Iterator[None]:
    """Use fp64 attention inside this block where the weights are bf16 on a CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    before = llm.model.config._attn_implementation
    if llm.dtype != "bf16" or llm.device.type != "cpu":
        yield
        return
    AttentionInterface.register("pllm_fp64", _fp64_attention)
    AttentionMaskInterface.register("pllm_fp64", eager_mask)
    try:
        llm.model.set_attn_implementation("pllm_fp64")
        yield
    finally:
        llm.model.set_attn_implementation(before)
