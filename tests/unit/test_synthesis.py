"""Synthesis: parsing what the model really prints, the ROUGE-1 check, seeded and resumable requests."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pllm_helpers import synthesis
from pllm_helpers.corpora import authored_dialogues, chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_words
from pllm_helpers.models import LLM, generate, load_llm
from pllm_helpers.runtime import InputError
from pllm_helpers.synthesis import (
    HIGH,
    LOW,
    PROMPTS,
    SHOTS,
    VERDICTS,
    Synthesis,
    parse_bracketed,
    rouge1,
    sanity_check,
    synthesis_prompt,
    synthesize,
)
from tests.unit.tuning_kit import tiny_llm

# ---------------------------------------------------------------- parsing

# printed by SmolLM2-135M-Instruct for authored questions, with both prompts
PRINTED = [
    (
        "[What's the difference between a dark room and a hospital?]",
        "What's the difference between a dark room and a hospital?",
    ),
    # cut by the token limit
    ("[7.4, 3.8, 21.5, 9.5, 17.5, 13.1, 14.5, 15.5,", "7.4, 3.8, 21.5, 9.5, 17.5, 13.1, 14.5, 15.5,"),
    # nested
    (
        "[Blaming the noise for your neighborhood! I wonder... [some of these words can be overly dramatic.]]",
        "Blaming the noise for your neighborhood! I wonder... [some of these words can be overly dramatic.]",
    ),
    # two groups
    (
        "[4 possibilities remaining, Spell-checking only makes it easier!][Well-done job, proud of you!]",
        "4 possibilities remaining, Spell-checking only makes it easier!",
    ),
    # the brackets of the prompt, empty, then the text behind an announcement
    (
        "Lets create a text that is similar but without the use of [ ]\n\nThe text is: We had a picnic by the lake and "
        "left the bags of trash next to the full bin. Cleaners are paid for that.",
        "We had a picnic by the lake and left the bags of trash next to the full bin. Cleaners are paid for that.",
    ),
    # the prompt, said back
    (
        "Please refine and generate a text semantically similar to the following text block, no need to answer: "
        "7/4, 3/8, 21/3, 3/5, 9/9, 1/12",
        "7/4, 3/8, 21/3, 3/5, 9/9, 1/12",
    ),
    (
        'You can refine and generate a text semantically similar to this:\n\n"Your migraines start with zigzag lights '
        "for twenty minutes and when should you swallow sumatriptan?",
        "Your migraines start with zigzag lights for twenty minutes and when should you swallow sumatriptan?",
    ),
    # a preface, the text, an explanation
    (
        "Here's a revised version of the given text with better grammar and clarity:\n\nI take codeine-paracetamol for "
        "headache almost daily and the headaches are becoming daily too.\n\nThis edited version aims "
        "to convey the idea that the condition is becoming more severe as a result of",
        "I take codeine-paracetamol for headache almost daily and the headaches are becoming daily too.",
    ),
    (
        "Here is the text rewritten using the provided punctuation:\n\nI installed a tracker on my girlfriend's phone "
        "without her knowing. If she has nothing to hide, she has nothing to fear.\n\nI made the following changes to "
        'improve grammar and clarity:\n- Added an apostrophe to the beginning of "I"',
        "I installed a tracker on my girlfriend's phone without her knowing. If she has nothing to hide, she has "
        "nothing to fear.",
    ),
    (
        "The original text is too complex and lacks clarity. Here's a revised version with simplified language and a "
        "more conversational tone:\n\nRan into my best friend from 5th grade, Jonas, at a petrol station.",
        "Ran into my best friend from 5th grade, Jonas, at a petrol station.",
    ),
    (
        "Awesome! Well, here’s a collection of simplified sentences that will help you convey your message "
        "effectively.\n\nHere's a reworked version:\n\nI take codeine for headache daily for the most part.",
        "I take codeine for headache daily for the most part.",
    ),
    # nothing around it
    (
        "The perfect bakery that opens at five in the morning and leaves its own bread at the door",
        "The perfect bakery that opens at five in the morning and leaves its own bread at the door",
    ),
    # a stray closing bracket
    ("Sentence 1. Son, 105]4; 2. Daan, 20]2", "Sentence 1. Son, 105 4; 2. Daan, 20 2"),
]


@pytest.mark.parametrize(("printed", "text"), PRINTED)
def test_parses_what_the_model_prints(printed, text):
    assert parse_bracketed(printed) == text
    assert parse_bracketed(printed, strict=True) in ((text,) if printed.startswith("[") else (None, ""))


@pytest.mark.parametrize(
    ("raw", "text", "strict"),
    [
        ("", "", ""),
        ("  \n", "", ""),
        ("[ ]", "", ""),
        ("[...]", "", ""),
        ("[ ] [then a text]", "then a text", "then a text"),
        ("[[double]]", "[double]", "[double]"),
        ("Sure! Here it is: [ a text ] Hope it helps.", "a text", "a text"),
        ('["quoted"]', "quoted", "quoted"),
        ("[“curly”]", "curly", "curly"),
        ('[He said "no" and left "early"]', 'He said "no" and left "early"', 'He said "no" and left "early"'),
        ("【全角の文】", "全角の文", "全角の文"),
        ("<|im_start|>assistant\n[a text]<|im_end|>", "a text", "a text"),
        ("assistant: [a text]", "a text", "a text"),
        ("Assistant\nplain text", "plain text", None),
        ('"plain, quoted"', "plain, quoted", None),
        ("Here's a rewritten text:", None, None),
        ("Here's a rewritten text:\n\n", None, None),
        ("The bus: is it late?", "The bus: is it late?", None),
        ("first paragraph\n\nsecond paragraph", "first paragraph", None),
        ("] closing first [then open", "then open", "then open"),
    ],
)
def test_parsing_rules(raw, text, strict):
    assert (parse_bracketed(raw), parse_bracketed(raw, strict=True)) == (text, strict)


PIECES = st.sampled_from(
    ["[", "]", "【", "］", '"', "“", "'", ":", "\n", "\n\n", " ", "text", "Here's", "revised", "[ ]"]
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=30).map(" ".join), st.lists(PIECES, max_size=30).map("".join)))
@example("[" * 3000)
@example("The text:\n\n" * 1500)
@example("\ud800[\udfff]")
@example("'" * 5)
@example("0\x000")
def test_never_raises_and_never_invents(raw):
    for strict in (False, True):
        text = parse_bracketed(raw, strict=strict)
        assert text is None or (text == "" or response_words(text))
        if text:
            assert not Counter(response_words(text)) - Counter(response_words(raw.replace("[", " ").replace("]", " ")))
        assert sanity_check("an original", text) in VERDICTS


# ---------------------------------------------------------------- the check


def by_hand(a, b):
    """ROUGE-1 F-measure written out: shared words, each as often as both have it."""
    x, y = Counter(response_words(a)), Counter(response_words(b))
    shared = sum(min(x[w], y[w]) for w in x)
    if not shared:
        return 0.0
    precision, recall = shared / sum(y.values()), shared / sum(x.values())
    return 2 * precision * recall / (precision + recall)


def test_rouge1_equals_hand_written_and_the_library_on_real_text():
    rows = [d.question for d in authored_dialogues()[:60]] + [d.question for d in chitchat_stream(3).stream[:60]]
    library = RougeScorer(["rouge1"])
    plain = 0
    for a, b in zip(rows, rows[1:], strict=False):
        for x, y in ((a, b), (a, a), (a + " " + b, b)):
            assert rouge1(x, y) == pytest.approx(by_hand(x, y), abs=1e-12)
            if (x + y).isascii() and "'" not in x + y:  # there both cut words alike
                plain += 1
                assert rouge1(x, y) == pytest.approx(library.score(x, y)["rouge1"].fmeasure, abs=1e-12)
    assert plain > 60


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge1_properties(a, b):
    score = rouge1(a, b)
    assert 0 <= score <= 1 and score == pytest.approx(rouge1(b, a)) and score == pytest.approx(by_hand(a, b))
    assert rouge1(a, a) == (1.0 if response_words(a) else 0.0)


@pytest.mark.parametrize(
    ("original", "near", "far"),
    [
        ("Где находится ближайшая аптека?", "Где тут находится аптека?", "Сколько стоит билет в театр"),
        ("ποιος έγραψε τον Άμλετ;", "ποιος ήταν αυτός που έγραψε τον Άμλετ;", "τι ώρα είναι"),
        ("最寄りの薬局はどこですか", "一番近い薬局はどこですか", "今日の天気予報を教えて"),
        ("मुझे सिर दर्द है क्या करूँ", "सिर दर्द है मुझे अब क्या करना चाहिए", "कल बारिश होगी"),
        ("هل هناك صيدلية قريبة من هنا", "هل توجد صيدلية قريبة", "كم الساعة الآن"),
    ],
)
def test_other_scripts_count(original, near, far):
    """The library's own tokenizer sees nothing here and would call everything too far."""
    assert RougeScorer(["rouge1"]).score(original, near)["rouge1"].fmeasure == 0
    assert sanity_check(original, near) == "passed"
    assert sanity_check(original, far) == "too_far"
    assert sanity_check(original, original) == "copy"


def test_verdicts():
    original = "How do I remove a red wine stain from a shirt?"
    assert sanity_check(original, "What removes a red wine stain from cotton?") == "passed"
    assert sanity_check(original, "The weather is lovely today.") == "too_far"
    assert sanity_check(original, original.upper() + "!!") == "copy"
    assert sanity_check(original, "how do i remove a red wine stain from a white shirt") == "copy"  # ROUGE-1 0.95
    assert sanity_check(original, None) == "unparsed"
    assert sanity_check(original, " … ") == sanity_check(original, "") == "empty"
    text = "What removes a red wine stain from cotton?"
    assert sanity_check(original, text, seen=[response_words(text)]) == "duplicate"
    # the bounds belong to the range
    score = rouge1(original, text)
    assert sanity_check(original, text, low=score, high=score) == "passed"
    assert sanity_check(original, text, low=score + 1e-9) == "too_far"
    assert sanity_check(original, text, high=score - 1e-9) == "copy"
    # the very words are a copy under any bound
    assert sanity_check(original, original, low=0, high=1) == "copy"
    for low, high in ((0.5, 0.4), (-0.1, 1), (0, 1.1), (float("nan"), 1)):
        with pytest.raises(InputError, match="low, high"):
            sanity_check(original, text, low=low, high=high)


def test_default_bounds_separate_real_paraphrases_from_unrelated_text(shared_data):
    """The bounds rest on paraphrases that others made (neutral rewritings of tweets), not on our own outputs."""
    import gzip

    with gzip.open(shared_data / "cds_english_tweet.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:400]
    paired = [rouge1(r["response"], r["instruction"]) for r in rows]
    apart = [rouge1(r["response"], s["instruction"]) for r, s in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert sum(x >= LOW for x in apart) / len(rows) < 0.02
    assert sum(x >= LOW for x in paired) / len(rows) > 0.75
    assert sum(x > HIGH for x in paired) / len(rows) < 0.06


# ---------------------------------------------------------------- prompts


def test_prompts():
    paper = synthesis_prompt("what {text} is [this]?", "paper")
    assert paper.endswith("what {text} is [this]?") and "semantically similar" in paper and "[ ]" in paper
    messages = synthesis_prompt("hello", "few_shot")
    assert [m["role"] for m in messages] == ["user", "assistant"] * len(SHOTS) + ["user"]
    assert messages[-1]["content"].endswith("[hello]")
    for message, other in SHOTS:  # the examples are what they ask for
        assert sanity_check(message, other, low=0.15) == "passed"
    with pytest.raises(InputError, match="prompt: expected 'paper' or 'few_shot', got 'best'"):
        synthesis_prompt("hello", "best")


# ---------------------------------------------------------------- requests, on a tiny random model


@pytest.fixture
def tiny(noise: LLM, monkeypatch) -> LLM:
    """Writes noise and never ends its turn; here it counts as ended, so that noise can pass."""

    def ended(*given, **more):
        return [a._replace(finished=True) for a in generate(*given, **more)]

    monkeypatch.setattr(synthesis, "generate", ended)
    return noise


@pytest.fixture(scope="module")
def noise() -> LLM:
    """A tiny random model: requests, seeds, files and counts are the same as with a real one."""
    return tiny_llm(hidden_size=32, intermediate_size=64, num_hidden_layers=1)


ORIGINALS = [
    DialogueSet("u", f"question number {i} about {w}", f"a reply {i}") for i, w in enumerate(("tea", "a bus", "rain"))
]
FAST = {"max_new_tokens": 6, "low": 0, "high": 1, "progress": False}


def test_every_request_has_its_own_numbers(tiny):
    whole = synthesize(tiny, ORIGINALS, 3, rounds=1, **FAST)
    assert whole.asked == 9 and len({a.raw for a in whole.attempts}) == 9
    raws = {(a.original.id, a.number): a.raw for a in whole.attempts}
    for others in (
        synthesize(tiny, ORIGINALS[::-1], 3, rounds=1, batch_size=2, **FAST),
        synthesize(tiny, ORIGINALS[1], 2, rounds=1, batch_size=1, **FAST),
    ):
        assert {(a.original.id, a.number): a.raw for a in others.attempts}.items() <= raws.items()
    assert synthesize(tiny, ORIGINALS, 3, rounds=1, seed=1, **FAST).attempts != whole.attempts
    # equal originals draw different numbers
    twice = synthesize(tiny, [ORIGINALS[0], ORIGINALS[0]], 1, rounds=1, **FAST)
    assert len({a.raw for a in twice.attempts}) == 2


def test_generate_takes_a_seed_per_prompt(noise):
    prompts, how = ["one", "two"], {"max_new_tokens": 4, "temperature": 1.0, "progress": False}
    assert generate(noise, prompts, seed=[5, 7], **how) == [
        generate(noise, [p], seed=s, **how)[0] for p, s in zip(prompts, (5, 7), strict=True)
    ]
    with pytest.raises(InputError, match="seed: expected one number, or one for each of 2 prompts, got 3"):
        generate(noise, prompts, seed=[1, 2, 3], **how)


def test_rounds_ask_only_for_what_is_missing(tiny):
    none = synthesize(tiny, ORIGINALS, 1, rounds=3, **{**FAST, "low": 0.99})  # nothing passes
    assert none.asked == 3 * 3 and none.passed == 0 and none.dialogues == []
    assert sorted(a.number for a in none.attempts) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    every = synthesize(tiny, ORIGINALS, 2, rounds=5, **FAST)
    per = Counter(a.original.id for a in every.attempts if a.verdict == "passed")
    assert every.passed == 6 and set(per.values()) == {2}
    assert every.asked == 6 + sum(a.verdict != "passed" for a in every.attempts)


def test_accepted_sets_and_the_table(tiny):
    made = synthesize(tiny, ORIGINALS, 2, rounds=9, **FAST)
    assert [d.meta["original"] for d in made.dialogues] == [d.id for d in ORIGINALS for _ in range(2)]
    for d in made.dialogues:
        original = next(o for o in ORIGINALS if o.id == d.meta["original"])
        assert (d.user, d.answer, d.time, d.source) == ("u", original.answer, None, "synthetic")
        assert d.meta["rouge1"] == rouge1(original.question, d.question) and d.meta["seed"] == 0
        assert (d.meta["mode"], d.meta["prompt"], d.meta["model"]) == ("question", "few_shot", "tiny")
    table = made.table()
    assert len(table) == made.asked and (table.verdict == "passed").sum() == made.passed == 6
    assert sum(made.verdicts.values()) == made.asked and list(made.verdicts)[: len(VERDICTS)] == list(VERDICTS)
    assert made.bracketed <= made.parsed <= made.asked and "6 passed" in repr(made)
    json.dumps([dict(d.meta) for d in made.dialogues])  # goes into a buffer or an adapter's card


def test_other_bounds_need_no_new_request(tiny):
    made = synthesize(tiny, ORIGINALS, 2, rounds=2, **FAST)
    assert made.judged(low=0, high=1).attempts == made.attempts
    assert made.judged(low=0.99, high=1).passed == 0
    assert made.judged(low=0.99, high=1).judged(low=0, high=1).dialogues == made.dialogues
    assert synthesize(tiny, ORIGINALS, 2, rounds=1, **{**FAST, "low": 0.99}).attempts == (
        synthesize(tiny, ORIGINALS, 2, rounds=1, **FAST).judged(low=0.99, high=1).attempts
    )
    with pytest.raises(InputError, match="low, high"):
        made.judged(low=1, high=0)


def _scripted(monkeypatch, answers):
    """The requests go on as always; what the model prints for a text is given, round by round."""

    def printed(self, wanted, what):
        return [answers[text].pop(0) for text, _ in wanted]

    monkeypatch.setattr(synthesis._Writer, "rewrite", printed)


def test_duplicates_within_and_across_originals_and_cut_texts(tiny, monkeypatch):
    a = DialogueSet("u", "is the red bus to town late today or not", "yes")
    b = DialogueSet("u", "will the blue bus to town come late today", "no")
    _scripted(
        monkeypatch,
        {
            a.question: [
                ("[Is the bus late today?]", True),
                ("[is THE bus late, today]", True),
                ("[Will the blue bus to town come late today]", True),  # b's own question: nothing new
                ("[the red bus is late, isn't it, so", False),
            ],
            b.question: [
                ("[is the bus late today]", True),
                ("Here's the text:\n\nthe blue bus is late today then?\n\nI changed", False),
                ("", True),
                ("[today the blue one is late] and then it went", False),
            ],
        },
    )
    made = synthesize(tiny, [a, b], 4, rounds=1)
    found = [(x.original.question, x.verdict) for x in made.attempts]
    assert [v for q, v in found if q == a.question] == ["passed", "duplicate", "duplicate", "too_long"]
    assert [v for q, v in found if q == b.question] == ["duplicate", "passed", "empty", "passed"]
    assert [d.question for d in made.dialogues] == [
        "Is the bus late today?",
        "the blue bus is late today then?",
        "today the blue one is late",
    ]


def test_strict_counts_only_brackets(tiny, monkeypatch):
    d = DialogueSet("u", "is the red bus to town late today or not", "yes")
    printed = {d.question: [("the red bus is late?", True), ("[is the red bus late?]", True)]}
    _scripted(monkeypatch, printed)
    made = synthesize(tiny, d, 2, rounds=1, strict=True)
    assert [a.verdict for a in made.attempts] == ["unparsed", "passed"]
    assert (made.asked, made.bracketed, made.parsed, made.passed) == (2, 1, 1, 1)


def test_pairs_rewrite_the_reply_of_questions_that_passed(tiny, monkeypatch):
    d = DialogueSet("u", "is the red bus to town late today or not", "it was on time at noon")
    _scripted(
        monkeypatch,
        {
            d.question: [("[is the bus late]", True), ("[is the red bus late]", True), ("nonsense", True)],
            d.answer: [("[at noon it was punctual]", True), ("[no idea, sorry]", True)],
        },
    )
    made = synthesize(tiny, d, 3, rounds=1, mode="pair")
    assert [a.verdict for a in made.attempts] == ["passed", "reply_too_far", "too_far"]
    assert made.passed == 1 and made.dialogues[0].answer == "at noon it was punctual"
    assert made.dialogues[0].meta["mode"] == "pair" and made.verdicts["reply_too_far"] == 1
    assert made.attempts[0].reply.rouge1 == rouge1(d.answer, "at noon it was punctual")
    assert [a.verdict for a in made.judged(low=0, high=1).attempts] == ["passed", "passed", "reply_unasked"]


def test_resumes_from_a_file(tiny, tmp_path, monkeypatch):
    out = tmp_path / "texts.jsonl"
    whole = synthesize(tiny, ORIGINALS, 2, batch_size=2, out=out, **FAST)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == whole.asked

    asked = []
    ended = synthesis.generate

    def counting(llm, prompts, **more):
        asked.extend(prompts)
        return ended(llm, prompts, **more)

    monkeypatch.setattr(synthesis, "generate", counting)

    def again(expected, **more):
        asked.clear()
        made = synthesize(tiny, ORIGINALS, 2, out=out, **{**FAST, **more})
        assert len(asked) == expected
        return made

    assert again(0).attempts == whole.attempts
    assert again(0, low=0.5, rounds=1).attempts == whole.judged(low=0.5, high=1).attempts[:6]  # bounds are judged anew
    # the last line broke off; another was damaged
    out.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
    assert again(whole.asked - 3).attempts == whole.attempts
    assert again(0).attempts == whole.attempts
    damaged = lines[0].replace(b'"raw": "', b'"raw": "x')
    out.write_bytes(b"\xff\xfe\n" + damaged + b"".join(lines[1:]) + b"[1, 2]\n")
    with pytest.raises(InputError, match="file of an earlier synthesis"):
        out.with_name("other.txt").write_text("my notes\n", encoding="utf-8")
        synthesize(tiny, ORIGINALS, 2, out=out.with_name("other.txt"), **FAST)
    assert out.with_name("other.txt").read_text(encoding="utf-8") == "my notes\n"
    assert again(1).attempts == whole.attempts
    # whatever decides on a text is part of its key
    for change in ({"seed": 1}, {"temperature": 0.8}, {"top_p": 0.9}, {"max_new_tokens": 5}, {"prompt": "paper"}):
        again(6, rounds=1, **change)
    with torch.no_grad():
        weight = tiny.model.model.layers[0].self_attn.q_proj.weight
        kept = weight.clone()
        weight.add_(1.0)
    try:
        assert again(6, rounds=1).attempts != whole.attempts[:6]
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_an_interruption_keeps_whole_batches(tiny, tmp_path, monkeypatch):
    out, ended, calls = tmp_path / "t.jsonl", synthesis.generate, []

    def failing(llm, prompts, **more):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return ended(llm, prompts, **more)

    monkeypatch.setattr(synthesis, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tiny, ORIGINALS, 2, batch_size=2, rounds=1, out=out, **FAST)
    assert len(out.read_text(encoding="utf-8").splitlines()) == sum(calls) == 4
    monkeypatch.setattr(synthesis, "generate", ended)
    resumed = synthesize(tiny, ORIGINALS, 2, batch_size=5, rounds=1, out=out, **FAST)
    assert resumed.attempts == synthesize(tiny, ORIGINALS, 2, rounds=1, **FAST).attempts


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"n": 0}, "n: expected a whole number from 1 to 100"),
        ({"n": 101}, "n: "),
        ({"n": True}, "n: "),
        ({"mode": "both"}, "mode: "),
        ({"prompt": "best"}, "prompt: "),
        ({"low": 0.9, "high": 0.1}, "low, high: "),
        ({"temperature": 0}, "temperature: .*greedy"),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"seed": -1}, "seed: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"rounds": 0}, "rounds: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"unfit": "ignore"}, "unfit: "),
        ({"out": "/nowhere/at/all.jsonl"}, "out: expected the folder"),
        ({"out": "/"}, "out: "),
    ],
)
def test_bad_settings(tiny, given, what):
    with pytest.raises(InputError, match=what):
        synthesize(tiny, ORIGINALS, **{"n": 2, **FAST, **given})


@pytest.mark.parametrize(
    ("original", "reason"),
    [
        (DialogueSet("u", " ", "reply"), "question with a word"),
        (DialogueSet("u", "?!", "reply"), "question with a word"),
        (DialogueSet("u", "question", " "), "reply with a word"),
        (DialogueSet("prosocial", "I lied.", "__needs_caution__"), "safety label"),
        (DialogueSet("u", "word " * 3000, "reply"), "room for its question"),
        (DialogueSet("u", "half an emoji \ud83d", "reply"), "lone surrogate"),
    ],
)
def test_unfit_originals(tiny, original, reason):
    with pytest.raises(InputError, match=f"dialogues\\[1\\]: .*{reason}.*unfit='skip'"):
        synthesize(tiny, [ORIGINALS[0], original], 1, **FAST)
    made = synthesize(tiny, [original, ORIGINALS[0]], 1, unfit="skip", **FAST)
    assert made.originals == (ORIGINALS[0],) and made.skipped[0][0] is original and reason in made.skipped[0][1]


def test_nothing_to_do(tiny):
    empty = synthesize(tiny, [], 3)
    assert isinstance(empty, Synthesis) and (empty.asked, empty.dialogues, len(empty.table())) == (0, [], 0)


# ---------------------------------------------------------------- the real model


@pytest.mark.model
def test_the_real_model_with_examples_in_the_prompt():
    """The bundled model follows examples (brackets, near texts); with one seed the texts repeat exactly."""
    llm = load_llm()
    originals = [d for d in authored_dialogues("open_qa") if len(d.question) < 60][:8]
    made = synthesize(llm, originals, 1, rounds=1, max_new_tokens=24, progress=False)
    assert made.asked == 8 and made.bracketed >= 6 and made.parsed >= 6
    assert made.passed >= 2  # measured yield 0.6 to 0.7; of unrelated messages under 0.02 pass
    for d in made.dialogues:
        assert LOW <= d.meta["rouge1"] <= HIGH
    short = made.attempts[3].original
    one = synthesize(llm, short, 1, rounds=1, max_new_tokens=24, batch_size=1, progress=False)
    assert one.attempts[0].raw == made.attempts[3].raw
    assert set(PROMPTS) == {"paper", "few_shot"}
