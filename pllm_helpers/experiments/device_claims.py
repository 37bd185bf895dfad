"""What notebook 07 claims, each from numbers that a cell measured; the ledger against four papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from ..evaluation import Claim, Estimate, bootstrap_interval, check_claim, paired_difference, rank_correlation
from ..runtime import InputError
from .device_study import VARIANTS, DeviceTable

__all__ = [
    "LedgerRow",
    "Pairs",
    "better_shape_claim",
    "blocks_claim",
    "both_claim",
    "built_model_claim",
    "chat_probe_claim",
    "choice_by_difficulty_claim",
    "cold_start_claim",
    "compressed_claim",
    "count_by_hand_claim",
    "decode_speed_claim",
    "difficulty_rows",
    "embedding_share_claim",
    "grid_claim",
    "int4_loss_claim",
    "int8_loss_claim",
    "ledger",
    "longer_tuning_claim",
    "more_data_claim",
    "paper_numbers",
    "published_sizes_claim",
    "quantised_by_hand_claim",
    "ranking",
    "size_claim",
    "task_kept_claim",
    "trained_enough",
    "tuned_task_claim",
]

Number = float | int
Rows = Sequence[np.ndarray]
Pairs = tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
NATS = "nats per token"


def _beyond(text: str, estimate: Estimate, bound: Number = 0, paper: str = "") -> Claim:
    """A claim that an estimate lies above ``bound``: an interval that only touches it does not hold."""
    claim = check_claim(text, estimate, above=bound, paper=paper)
    verdict = "holds" if estimate.low > bound else "fails" if estimate.high <= bound else "inconclusive"
    return replace(claim, verdict=verdict, bound=f"above {bound:g}")


# --------------------------------------------------------------------------- counting


def count_by_hand_claim(by_hand: Int[np.ndarray, " n"], package: Int[np.ndarray, " n"]) -> Claim:
    """Parameters part by part, counted by hand and by the package."""
    return check_claim(
        f"The count by hand equals the package's in {len(package)} parts: largest difference is 0",
        int(np.max(np.abs(by_hand - package))),
        below=0,
        kind="deterministic",
    )


def built_model_claim(counted: Int[np.ndarray, " n"], built: Int[np.ndarray, " n"]) -> Claim:
    """The counter's totals and the parameters of models that were really built (or loaded)."""
    return check_claim(
        f"The counter agrees with {len(built)} real models: largest difference is 0",
        int(np.max(np.abs(counted - built))),
        below=0,
        kind="deterministic",
    )


def published_sizes_claim(
    counted: Float[np.ndarray, " n"] | Int[np.ndarray, " n"],
    published: Float[np.ndarray, " n"],
    units: Float[np.ndarray, " n"],
) -> Claim:
    """Counted totals and the published ones, in units of the last published digit."""
    return check_claim(
        f"The published configurations have the published sizes: largest of {len(published)} differences is at most "
        "one unit of the last digit",
        float(np.max(np.abs(counted - published) / units)),
        below=1,
        kind="deterministic",
        paper="sizes on the model cards of MobileLLM",
    )


def embedding_share_claim(small: Number, large: Number) -> Claim:
    """Share of the weights that an own output matrix would add, in the smallest and the largest configuration."""
    return check_claim(
        "Sharing the embedding matters more for small models: share saved in the smallest over that in the largest "
        "is at least 2",
        small / large,
        above=2,
        kind="deterministic",
        paper="MobileLLM shares embeddings because they weigh much below a billion parameters (abstract)",
    )


def blocks_claim(parameters: Int[np.ndarray, " 2"], flops: Int[np.ndarray, " 2"]) -> Claim:
    """Blocks once and twice: the same parameters, and the ratio of the work per token."""
    if parameters[0] != parameters[1]:
        raise InputError("parameters", f"expected equal numbers, got {parameters[0]:,} and {parameters[1]:,}")
    return check_claim(
        "Running every block twice costs no memory for weights, but work: operations per token are at least 1.5-fold",
        float(flops[1] / flops[0]),
        above=1.5,
        kind="deterministic",
        paper="block-wise sharing: no increase in model size, marginal latency overhead (MobileLLM, abstract)",
    )


# --------------------------------------------------------------------------- shapes trained here


def better_shape_claim(name: str, other: str, pairs: Pairs, paper: str = "") -> Claim:
    """NLL of shape ``other`` minus that of ``name`` on held-out windows; ``pairs``: rows of ``name``, of ``other``."""
    edge = paired_difference(pairs[1], pairs[0], unit=NATS)
    return _beyond(
        f"At equal parameters, {name} predicts chats better than {other}: mean edge is above 0", edge, paper=paper
    )


ENOUGH = 1.0  # training tokens per weight below which no shape is judged; about 20 would be compute-optimal


def trained_enough(table: DeviceTable | None) -> bool:
    """Whether every model of ``architectures`` read at least :data:`ENOUGH` tokens per weight."""
    cells = table.cells if table is not None else ()
    return bool(cells) and all(c.facts["tokens"] >= ENOUGH * c.facts["parameters"] for c in cells)


def ranking(table: DeviceTable, reference: str = "deep") -> dict[str, str]:
    """Each shape against ``reference``: better, worse, no difference seen, or too short to rank.

    Too short: fewer tokens than weights, or held-out losses that still fall by more in the last part
    of the training than the shapes differ, so that longer training may turn the order round. (The
    second alone is not enough: a rate that goes down makes every curve flat at its end.)
    """
    falls = {
        v: float(np.mean([c.facts["still_falling"] for c in table.find(variant=v)])) for v in table.values("variant")
    }
    out = {}
    for v in table.values("variant"):
        if v == reference:
            continue
        e = table.difference("nll", {"variant": v}, {"variant": reference})
        if not trained_enough(table) or (not e.low <= 0 <= e.high and max(falls[v], falls[reference]) > abs(e.value)):
            out[v] = "too short to rank"
        elif e.low <= 0 <= e.high:
            out[v] = "no difference seen"
        else:
            out[v] = "better" if e.value < 0 else "worse"
    return out


# --------------------------------------------------------------------------- quantisation


def quantised_by_hand_claim(by_hand: Sequence[np.ndarray], package: Sequence[np.ndarray]) -> Claim:
    """A matrix quantised and put back by hand and by the package, in each form; relative to its largest weight."""
    gaps = [np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in zip(by_hand, package, strict=True)]
    return check_claim(
        "int8 and int4 by hand are the package's: largest relative difference is at most 0.001",
        float(max(gaps)),
        below=0.001,
        kind="deterministic",
    )


def size_claim(full_mb: Number, int4_mb: Number) -> Claim:
    """Megabytes of the weights, scales included."""
    return check_claim(
        "int4 weights, their scales included, take less than half of 16-bit ones: ratio is at most 0.5",
        int4_mb / full_mb,
        below=0.5,
    )


def grid_claim(own: Number, random: Number) -> Claim:
    """Relative int4 error of the shipped weights and of normal weights of the same shapes."""
    return check_claim(
        "The shipped weights lie on a 4-bit grid already, so that int4 costs them little: their error over that of "
        "random weights is at most 0.5",
        own / random,
        below=0.5,
    )


def int8_loss_claim(packed: Rows, full: Rows, margin: Number = 0.01) -> Claim:
    """NLL that int8 adds, paired by row."""
    return check_claim(
        f"int8 weights cost at most {margin:g} nats per token: mean rise of the NLL",
        paired_difference(packed, full, unit=NATS),
        below=margin,
    )


def int4_loss_claim(packed: Rows, full: Rows, margin: Number = 0.02) -> Claim:
    """NLL that int4 adds to models whose weights never were quantised, paired by row."""
    return check_claim(
        f"On weights that never were quantised, int4 costs at most {margin:g} nats per token: mean rise of the NLL",
        paired_difference(packed, full, unit=NATS),
        below=margin,
    )


def decode_speed_claim(full: Float[np.ndarray, " n"], packed: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Tokens per second after the first, prompt by prompt: int4 over 16 bits. A busy machine moves it."""
    ratio = bootstrap_interval(full, packed, statistic=lambda a, b: np.median(b / a), seed=seed, unit="times")
    return _beyond("int4 weights write faster than 16-bit ones: median ratio is above 1", ratio, 1)


def task_kept_claim(
    task: str, packed: Float[np.ndarray, " n"], full: Float[np.ndarray, " n"], kind: str, margin: Number = 0.1
) -> Claim:
    """Score lost by quantisation, paired by row."""
    return check_claim(
        f"{kind} keeps the score of {task}: mean loss is at most {margin:g}",
        paired_difference(full, packed),
        below=margin,
    )


def chat_probe_claim(right: Float[np.ndarray, " n"]) -> Claim:
    """Share of everyday questions for which the model finds the better of two replies likelier."""
    return _beyond(
        "The model prefers the better of two replies: share is above one half",
        bootstrap_interval(right),
        0.5,
        paper="MobileLLM improves on earlier models of its size on chat benchmarks (abstract)",
    )


def tuned_task_claim(task: str, tuned: Rows, base: Rows, metric: str, margin: Number = 0.05, paper: str = "") -> Claim:
    """Score after LoRA on the task's train split minus before, paired by row."""
    return check_claim(
        f"LoRA on a few dozen examples raises {metric} of {task}: mean rise is at least {margin:g}",
        paired_difference(tuned, base),
        above=margin,
        paper=paper,
    )


# --------------------------------------------------------------------------- LoRA or retrieval


def cold_start_claim(n: int, lora: Rows, rag: Rows) -> Claim:
    """NLL under LoRA minus under retrieval with the fewest examples, paired by reply."""
    return _beyond(
        f"With {n} examples retrieval beats LoRA: NLL under LoRA minus under retrieval is above 0",
        paired_difference(lora, rag, unit=NATS),
        paper="retrieval wins at cold start (LaMP, 2409.09510)",
    )


def more_data_claim(few: int, many: int, lora_few: Rows, lora_many: Rows) -> Claim:
    """NLL under LoRA with few examples minus with many, paired by reply."""
    return _beyond(
        f"LoRA gains from more examples ({few} to {many}): fall of the NLL is above 0",
        paired_difference(lora_few, lora_many, unit=NATS),
        paper="gains of tuning grow with the user's data (LaMP, 2409.09510)",
    )


def both_claim(n: int, both: Rows, lora: Rows, rag: Rows) -> Claim:
    """NLL of the better of the two alone minus of both together; "better" by the means of these very rows."""
    alone = min(lora, rag, key=lambda rows: float(np.mean([np.mean(r) for r in rows])))
    return _beyond(
        f"With {n} examples both together beat the better one alone: fall of the NLL is above 0",
        paired_difference(alone, both, unit=NATS),
        paper="retrieval +14.92 %, tuning +1.07 %, both +15.98 % (LaMP, 2409.09510)",
    )


def choice_by_difficulty_claim(
    difficulty: Float[np.ndarray, " n"], lora: Float[np.ndarray, " n"], rag: Float[np.ndarray, " n"], seed: int = 0
) -> Claim:
    """Rank correlation of a row's difficulty (NLL before learning) with what LoRA is ahead of retrieval.

    The paper names no direction that could be verified, so the absolute value is judged: its interval
    is the image of the correlation's.
    """
    e = bootstrap_interval(
        difficulty, lora, rag, statistic=lambda d, a, b: rank_correlation(d, b - a), seed=seed, resamples=500
    )
    low = 0.0 if e.low <= 0 <= e.high else min(abs(e.low), abs(e.high))
    size = Estimate(abs(e.value), low, max(abs(e.low), abs(e.high), abs(e.value)), e.n, e.seeds, "rank correlation")
    towards = "LoRA" if e.value > 0 else "retrieval"
    return check_claim(
        f"What is better depends on how hard a row is (harder rows favour {towards} here): size of the rank "
        "correlation is at least 0.1",
        size,
        above=0.1,
        paper="the choice between parameter learning and RAG may vary with the difficulty of the task (2406.03777)",
    )


def longer_tuning_claim(n: int, factor: int, short: Rows, long: Rows) -> Claim:
    """NLL after ``factor`` times as many steps minus after the usual number, paired by reply."""
    return _beyond(
        f"With {n} examples, {factor} times as many steps do harm: rise of the NLL is above 0",
        paired_difference(long, short, unit=NATS),
        paper="longer fine-tuning does not necessarily help (2406.03777)",
    )


def compressed_claim(n: int, full: Rows, packed: Rows) -> Claim:
    """NLL after LoRA on the full model minus on the int8 model, paired by reply."""
    return _beyond(
        f"With {n} examples the int8 model ends better: NLL of the full model minus of int8 is above 0",
        paired_difference(full, packed, unit=NATS),
        paper="a compressed LLM may be the better choice on little personal data (2406.03777)",
    )


# --------------------------------------------------------------------------- rows behind the verdicts


def difficulty_rows(table: DeviceTable, **labels: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difficulty (NLL of the base model), NLL under LoRA and under retrieval, row by row, seeds averaged.

    ``labels`` narrow the cells down (``n=50``). A person's or task's replies come once. Raises
    :class:`~pllm_helpers.runtime.InputError` where the table has no such cells.
    """
    who = "task" if table.name == "tasks" else "person"
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for name in table.values(who):
        mine = {who: name, "precision": "bf16"}
        usual = {k: v for k, v in labels.items() if k != "factor"}
        once = {"factor": 1} if who == "person" else {}
        base = table.rows("nll", method="base", **mine)
        lora = table.rows("nll", method="lora", **mine, **usual, **once)
        rag = table.rows("nll", method="rag", **mine, **usual)
        if base and lora and rag:
            for part, rows in zip(parts, (base, lora, rag), strict=True):
                part.append(np.mean(rows, axis=0))
    if not parts[0]:
        raise InputError("labels", f"expected cells of {table.name} with {labels}, found none")
    return tuple(np.concatenate(p) for p in parts)  # type: ignore[return-value]


@dataclass(frozen=True)
class LedgerRow:
    """One sentence of a paper (or a question of its kind), its tag, and our verdict or what is missing for one."""

    paper: str
    tag: str
    says: str
    claim: Claim | None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """``holds``, ``fails``, ``inconclusive`` or ``not measured``."""
        return self.claim.verdict if self.claim else "not measured"


ABSTRACT = "verified: abstract"


def ledger(tables: Mapping[str, DeviceTable]) -> list[LedgerRow]:
    """Sentences of MobileLLM, the Empirical Guidelines and LaMP with our verdict, from recorded or live tables.

    ``tables`` maps experiments to tables; what a table lacks is said, not skipped.
    """
    rows: list[LedgerRow] = []
    shapes, personal, tasks = (tables.get(k) for k in ("architectures", "personal", "tasks"))
    for name, other, says in (
        ("deep", "wide", "architecture matters below a billion parameters: deep and thin"),
        ("deep", "unshared", "embedding sharing, with what it saves spent on layers"),
        ("gqa", "deep", "grouped queries, with what they save spent on layers"),
        ("twice", "deep", "block-wise sharing: 0.7 % / 0.8 % more accuracy at no increase in size"),
    ):
        found = _shape_pairs(shapes, name, other)
        claim = better_shape_claim(VARIANTS[name].name, VARIANTS[other].name, found, says) if found else None
        rows.append(LedgerRow("MobileLLM", ABSTRACT, says, claim, "" if claim else "both shapes, a token per weight"))
    says = "close to a 7B model in API calling: small models can do it"
    found = tasks.pairs("score", {"method": "lora"}, {"method": "base"}, task="api_calls") if tasks else ([], [])
    claim = tuned_task_claim("api_calls", *found, metric="exact match", paper=says) if found[0] else None
    rows.append(LedgerRow("MobileLLM", ABSTRACT, says, claim, "" if claim else "LoRA on API calls"))
    rows += _guidelines(personal, tasks)
    return rows


def _shape_pairs(table: DeviceTable | None, name: str, other: str) -> Pairs | None:
    if table is None or not trained_enough(table):
        return None
    found = table.pairs("nll", {"variant": name}, {"variant": other})
    return found if found[0] else None


def _guidelines(personal: DeviceTable | None, tasks: DeviceTable | None) -> list[LedgerRow]:
    paper, rows = "Empirical Guidelines", list[LedgerRow]()
    says = "retrieval or parameter learning: depends on the difficulty of the task"
    claim, missing = None, "LoRA and retrieval on tasks or replies of different difficulty"
    for table in (tasks, personal):
        if table is not None and claim is None:
            try:
                labels = {} if table.name == "tasks" else {"n": _middle(table.values("n"))}
                claim, missing = choice_by_difficulty_claim(*difficulty_rows(table, **labels)), ""
            except InputError:
                continue
    rows.append(LedgerRow(paper, ABSTRACT, says, claim, missing))
    says, claim = "longer fine-tuning does not necessarily help", None
    factors = [f for f in personal.values("factor", method="lora") if f != 1] if personal else []
    if personal and factors:
        n = max(personal.values("n", factor=factors[0]))
        pairs = personal.pairs("nll", {"factor": 1}, {"factor": factors[0]}, method="lora", n=n, precision="bf16")
        claim = longer_tuning_claim(n, factors[0], *pairs) if pairs[0] else None
    rows.append(LedgerRow(paper, ABSTRACT, says, claim, "" if claim else "longer runs"))
    says, claim = "a compressed LLM may be better on little personal data", None
    sizes = personal.values("n", precision="int8", method="lora") if personal else []
    if personal and sizes:
        n = min(sizes)
        both = ({"precision": "bf16"}, {"precision": "int8"})
        pairs = personal.pairs("nll", *both, method="lora", n=n, factor=1)
        claim = compressed_claim(n, *pairs) if pairs[0] else None
    rows.append(LedgerRow(paper, ABSTRACT, says, claim, "" if claim else "LoRA on the int8 model"))
    return rows + _lamp(personal)


def _lamp(personal: DeviceTable | None) -> list[LedgerRow]:
    tag, rows = "verified: project page", list[LedgerRow]()
    usual = {"precision": "bf16"}
    sizes = sorted(personal.values("n", method="lora", **usual)) if personal else []
    found: dict[str, Claim | None] = {
        "retrieval wins at cold start": None,
        "gains of tuning grow with data": None,
        "both together gain most": None,
    }
    if personal and sizes:
        few, many = sizes[0], sizes[-1]
        lora, rag, both = ({"method": m, **({} if m == "rag" else {"factor": 1})} for m in ("lora", "rag", "both"))
        pairs = personal.pairs("nll", lora, rag, n=few, **usual)
        if pairs[0]:
            found["retrieval wins at cold start"] = cold_start_claim(few, *pairs)
        pairs = personal.pairs("nll", {"n": few}, {"n": many}, **lora, **usual)
        if pairs[0] and few < many:
            found["gains of tuning grow with data"] = more_data_claim(few, many, *pairs)
        together, single = personal.pairs("nll", both, lora, n=many, **usual)
        retrieved = personal.pairs("nll", both, rag, n=many, **usual)[1]
        if together and len(single) == len(retrieved) == len(together):
            found["both together gain most"] = both_claim(many, together, single, retrieved)
    for says, claim in found.items():
        rows.append(LedgerRow("LaMP", tag, says, claim, "" if claim else "LoRA and retrieval at several sizes"))
    return rows


def _middle(values: Sequence[int]) -> int:
    if not values:
        raise InputError("n", "expected cells with examples, found none")
    return sorted(values)[len(values) // 2]


def paper_numbers() -> list[tuple[str, str, str, str]]:
    """What the papers did and found, beside what runs here: item, paper, here, tag."""
    size = next(iter(VARIANTS.values())).parameters().total / 1e6
    return [
        (
            "MobileLLM: models",
            "125M to 1.5B, trained from scratch on 1T tokens (unverified)",
            f"counted exactly; five shapes of {size:.2f}M weights trained from scratch on chats",
            "configurations verified; training data recalled",
        ),
        (
            "MobileLLM: zero-shot average of eight tasks",
            "125M 46.3 (blocks twice 47.0); 350M 51.3 (52.1)",
            "not measured: needs the trained weights",
            "verified: the authors' repository",
        ),
        (
            "MobileAIBench: models, tasks",
            "TinyLlama-1.1B to Mistral-7B; CNN/DM, XSum, HotpotQA, Dolly, MMLU, GSM8K, BBQ, TruthfulQA …",
            "SmolLM2-135M; seven authored sets with fixed splits",
            "verified: the authors' repository",
        ),
        (
            "MobileAIBench: bits",
            "Q4_K_M on phones; tables for 16, 8, 4, 3 bits (unverified)",
            "bf16, int8 per row, int4 in groups of 32",
            "partly recalled",
        ),
        (
            "MobileAIBench: efficiency",
            "load time, seconds per example, tokens/s, CPU, memory, temperature, battery",
            "time to first token, tokens/s, megabytes; energy as a stated proxy only",
            "verified: the authors' repository",
        ),
        (
            "Empirical Guidelines: finding 1",
            "the choice between tuning and retrieval varies with the difficulty of the task",
            "the ledger",
            "verified: abstract; its tables were not found",
        ),
        ("Empirical Guidelines: finding 2", "longer tuning need not help", "the ledger", "verified: abstract"),
        (
            "Empirical Guidelines: finding 3",
            "a compressed model may be better on little data",
            "the ledger, for int8 only",
            "verified: abstract",
        ),
        (
            "LaMP: gain over no personalization",
            "retrieval 14.92 %, tuning 1.07 %, both 15.98 %",
            "NLL of a person's later replies",
            "verified: project page of 2409.09510",
        ),
    ]
