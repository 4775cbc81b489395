"""Histories with calls, results and several system messages: in the prompt, or refused by name."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.srt.chat.messages import MAX_ALL_PARTS, MAX_MESSAGES, MAX_PARTS, MAX_ROLES, ChatTemplateError
from rtp_llm.srt.chat.template import ChatTemplate

USER, SYSTEM = {"role": "user", "content": "b1x"}, {"role": "system", "content": "a1x"}
ANSWER, AGAIN = {"role": "assistant", "content": "c1x"}, {"role": "user", "content": "d1x"}
LATER = {"role": "system", "content": "e1x"}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": "fun7q", "arguments": arguments}}


def calling(arguments: Any, **message: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(arguments)], **message}


RESULT = {"role": "tool", "content": "res5w", "tool_call_id": "call00000", "name": "fun7q"}
CALL = calling(json.dumps({"pla4x": "val9z"}))
HISTORIES = {
    "plain": [SYSTEM, USER, ANSWER, AGAIN],
    "second system": [SYSTEM, LATER, USER],
    "system in the middle": [USER, ANSWER, LATER, AGAIN],
    "call": [USER, CALL, RESULT],
    "call and answer": [USER, CALL, RESULT, ANSWER, AGAIN],
    "former call": [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "fun7q", "arguments": '{"pla4x": "val9z"}'}},
        {"role": "function", "name": "fun7q", "content": "res5w"},
    ],
    "empty list": [USER, {"role": "assistant", "content": []}, AGAIN],
}
WORDS = ("a1x", "b1x", "c1x", "d1x", "e1x", "fun7q", "pla4x", "val9z", "res5w")


def outcome(template: ChatTemplate, history: list[dict[str, Any]]) -> str:
    """``shown``, ``left out`` (refused by us), or ``refused`` (in the template's own words)."""
    try:
        text = template.render(history)
    except ChatTemplateError as error:
        if "leaves out" not in str(error):
            return "refused"
        assert str(error).startswith("messages[")
        return "left out"
    said = json.dumps(history)
    assert [word for word in WORDS if word in said and word not in text] == []
    assert '\\\\"' not in text and "{{" not in text
    return "shown"


@pytest.fixture(scope="module")
def real(data_dir: Path) -> dict[str, ChatTemplate]:
    folder = data_dir / "chat-templates"
    if not folder.is_dir():
        pytest.skip(f"no chat templates: {folder} does not exist")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return {path.stem: ChatTemplate(path.read_text(encoding="utf-8"), tokens) for path in folder.glob("*.jinja")}


@pytest.mark.parametrize(
    ("history", "shown", "left_out"),
    [
        ("plain", 62, 0),
        ("second system", 47, 11),
        ("system in the middle", 50, 7),
        ("call", 54, 6),
        ("call and answer", 54, 6),
        ("former call", 54, 6),
        ("empty list", 62, 0),
    ],
)
def test_real_templates_show_all_or_refuse(
    real: dict[str, ChatTemplate], history: str, shown: int, left_out: int
) -> None:
    """The counts are of 68 templates; the others refuse in their own words, or work only with tools."""
    counts = Counter(outcome(template, HISTORIES[history]) for template in real.values())
    assert (counts["shown"], counts["left out"], counts.total()) == (shown, left_out, 68)


@pytest.mark.parametrize("arguments", [{"pla4x": "val9z"}, '{"pla4x": "val9z"}', '{ "pla4x":"val9z" }'])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", '{"name": "fun7q", "arguments": {"pla4x": "val9z"}}'),
        ("Qwen3-Coder", "<parameter=pla4x>\nval9z\n</parameter>"),
        ("GLM-4.6", "<arg_key>pla4x</arg_key>\n<arg_value>val9z</arg_value>"),
        ("meta-llama-Llama-3.1-8B-Instruct", '{"name": "fun7q", "parameters": {"pla4x": "val9z"}}'),
        ("meetkai-functionary-medium-v3.2", "fun7q\n{"),
    ],
)
def test_calls_of_real_templates(real: dict[str, ChatTemplate], name: str, words: str, arguments: Any) -> None:
    assert words in real[name].render([USER, calling(arguments), RESULT])


CALLS = "{% for m in messages %}[{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
AS_OBJECT = CALLS + "{{ c.function.arguments | tojson }}{% endfor %}]{% endfor %}"
AS_TEXT = CALLS + "{{ c.function.arguments + '' }}{% endfor %}]{% endfor %}"


@pytest.mark.parametrize("source", [AS_OBJECT, AS_TEXT])
@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ('{"a": "é"}', '{"a": "é"}'),
        ({"a": "é"}, '{"a": "é"}'),
        ("", "{}"),
        ("  ", "{}"),
        (None, "{}"),
        ({}, "{}"),
        ('{"a": null}', '{"a": null}'),
    ],
)
def test_arguments_come_in_the_form_that_a_template_takes(source: str, given: Any, shown: str) -> None:
    assert ChatTemplate(source).render([USER, calling(given), RESULT]) == f"[b1x][fun7q{shown}][res5w]"


@pytest.mark.parametrize("given", ["not JSON", "[1]", "3", '{"cut'])
def test_arguments_that_are_no_object(given: str) -> None:
    assert ChatTemplate(AS_TEXT).render([USER, calling(given), RESULT]) == f"[b1x][fun7q{given}][res5w]"
    with pytest.raises(ChatTemplateError, match=r"messages\[1\].tool_calls\[0\].function.arguments must be"):
        ChatTemplate(AS_OBJECT).render([USER, calling(given), RESULT])


@pytest.mark.parametrize("bad", [7, [], True])
def test_arguments_of_another_type(bad: Any) -> None:
    with pytest.raises(ChatTemplateError, match=r"arguments must be a JSON text or an object, not"):
        ChatTemplate(AS_TEXT).render([USER, calling(bad), RESULT])


@pytest.mark.parametrize("bad", [{}, "x", [7], [{"id": "a"}], [{"function": {"arguments": "{}"}}]])
def test_calls_that_are_none(bad: Any) -> None:
    with pytest.raises(ChatTemplateError, match=r"messages\[1\].(tool_calls|content)"):
        ChatTemplate(AS_TEXT).render([USER, {"role": "assistant", "content": None, "tool_calls": bad}])


def test_what_is_left_out_is_named() -> None:
    first_only = (
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(first_only)
    assert template.render([SYSTEM, USER]) == "a1xb1x"
    with pytest.raises(ChatTemplateError, match=r"messages\[1\] \(role 'system'\): .* leaves out .* move it"):
        template.render([SYSTEM, LATER, USER])
    without_calls = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match=r"messages\[1\] \(role 'assistant'\)"):
        without_calls.render([USER, CALL, RESULT])


def test_trimming_and_thoughts_leave_nothing_out() -> None:
    source = "{% for m in messages %}{{ (m.content.split('</think>') | last) | trim | upper }}{% endfor %}"
    thoughtful = {"role": "assistant", "content": "<think>hm</think> c1x "}
    assert ChatTemplate(source).render([USER, thoughtful, AGAIN]) == "B1XC1XD1X"


def test_limits_come_before_the_work() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    roles = [{"role": f"role{i}", "content": "a"} for i in range(MAX_ROLES + 1)]
    parts = [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)
    for messages, words in (
        ([USER] * (MAX_MESSAGES + 1), f"at most {MAX_MESSAGES} are taken"),
        (roles, f"{MAX_ROLES + 1} roles; at most {MAX_ROLES}"),
        ([{"role": "user", "content": parts}], f"at most {MAX_PARTS} are taken"),
        ([{"role": "user", "content": parts[1:]}] * 5, f"{5 * MAX_PARTS} parts in all; at most {MAX_ALL_PARTS}"),
    ):
        with pytest.raises(ChatTemplateError, match=words):
            template.render(messages)


def test_a_shape_is_tried_once() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    template.render([USER, ANSWER, AGAIN])
    num_known = len(template._left_out)
    template.render([AGAIN, {"role": "assistant", "content": "other words"}, USER])
    assert len(template._left_out) == num_known
