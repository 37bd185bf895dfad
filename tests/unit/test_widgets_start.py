"""Chat and machine check on the real model, without a page; tests/browser drives them in one."""

from __future__ import annotations

import os

import pytest

from pllm_helpers.models import LLM, generate, load_encoder, load_llm
from pllm_helpers.runtime import InputError, prepare
from pllm_helpers.widgets import Chat, chat, machine_check

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm() -> LLM:
    prepare(0)
    return load_llm()


@pytest.fixture
def talk(llm: LLM) -> Chat:
    w = chat(llm)
    w.controls["max_new_tokens"].value = 6
    return w


def test_two_turns_are_what_the_package_generates(llm: LLM, talk: Chat):
    one = talk.ask("Where is Iceland? ")
    two = talk.ask("And Malta?")
    messages = [{"role": "user", "content": "Where is Iceland?"}]
    (first,) = generate(llm, [messages], max_new_tokens=6)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And Malta?"}]
    (second,) = generate(llm, [messages], max_new_tokens=6)
    assert (one.answer, two.answer) == (first, second)
    assert talk.messages == [*messages, {"role": "assistant", "content": second}]
    assert one.tokens == 6 and not one.finished and one.seconds > 0
    assert one.rate == pytest.approx(one.tokens / one.seconds)


def test_settings_reach_the_model(llm: LLM, talk: Chat):
    with talk.held():
        talk.controls["temperature"].value, talk.controls["seed"].value = 1.2, 5
    (expected,) = generate(llm, ["A colour?"], max_new_tokens=6, temperature=1.2, seed=5)
    assert talk.ask("A colour?").answer == expected


def test_moving_a_setting_writes_nothing(talk: Chat):
    runs = talk.runs
    talk.controls["seed"].value = 3
    assert talk.runs == runs and not talk.turns


def test_blank_messages_are_refused_and_change_nothing(talk: Chat):
    talk.ask("Hi")
    before = list(talk.log.parts)
    with pytest.raises(InputError, match="expected some text"):
        talk.ask(" \n ")
    assert talk.log.parts == before and len(talk.turns) == 1 and not talk.prompt.waiting


def test_a_conversation_that_outgrows_the_model_says_so(llm: LLM, talk: Chat):
    room = llm.model.config.max_position_embeddings
    with pytest.raises(InputError, match="room"):
        talk.ask("word " * (room + 10))
    assert "room" in talk._error.html and not talk.turns and "Nothing said yet" in talk.log.parts[0]
    talk.ask("Hi")
    assert talk._error.html == ""


def test_what_people_and_models_write_is_escaped(talk: Chat):
    hostile = "<script>alert(1)</script>"
    talk.ask(hostile)
    assert not any("<script" in part for part in talk.log.parts)
    assert any("&lt;script&gt;" in part for part in talk.log.parts)


def test_reset_forgets(talk: Chat):
    talk.ask("Hi")
    talk.reset()
    assert talk.turns == talk.messages == [] and "Nothing said yet" in talk.log.parts[0]


def test_first_message_is_answered_at_once_and_kept_for_exports(llm: LLM):
    w = Chat(llm=llm, first="Name a <fruit>.")
    assert len(w.turns) == 1 and w.turns[0].message == "Name a <fruit>."
    html = w.fallback_html()
    assert "Name a &lt;fruit&gt;." in html and "tokens/s" in html
    assert llm.name in chat(llm).fallback_html()


def test_machine_check_reports_what_is_loaded(llm: LLM):
    encoder = load_encoder()
    check = machine_check(llm, encoder)
    assert check["Number format"] == llm.dtype and check["Language model"] == llm.name
    assert check["Encoder"] == encoder.name and check["Network"] == "off"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "torch" in repr(check) and check._repr_html_().count("<tr>") == len(check.rows) + 1
    small = machine_check()
    assert not {"Number format", "Encoder"} & {name for name, _, _ in small.rows}
    with pytest.raises(KeyError, match="Encoder"):
        small["Encoder"]
