"""Conversations with tool calls, and the check that a template shows all of a conversation.

Clients write a call's arguments as a JSON string. Most templates want the object, some the string: given the other,
they fail, or silently encode twice. So a trial conversation is rendered in each form (``CALL_FORMS``), and the first
that is shown right is used.

Templates also silently leave out messages, such as a second system message. So a twin of the conversation, of the
same shape but with a distinctive word for each content, is rendered and searched for these words.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtp_llm.srt.chat.messages import ChatTemplateError

Render = Callable[[list[dict[str, Any]]], str]

ARGUMENT, RESULT = "zq900001x", "zq900002x"  # words that occur in no template
FUNCTION_ROLE = re.compile(r"""role[^%}\n]*['"]function['"]""")
THINKING = ("reasoning_content", "reasoning", "thinking")  # names of an assistant's thinking in messages
FORMER_CALL_ID = "call00000"  # for calls without an id: some templates want nine letters and digits
TWIN_WORD = re.compile(r"zq\d+x")
ENCODED_TWICE = re.compile(r'\\"|\{\{')
SPELLED_NULL = re.compile(r"\b(None|null)\b")


@dataclass(frozen=True, slots=True)
class CallForm:
    """The form in which a template takes an assistant's calls.

    Args:
        as_object: arguments are an object, else the JSON text of one.
        empty: the content of a message that consists of calls.
    """

    as_object: bool
    empty: str | None


CALL_FORMS = tuple(CallForm(as_object, empty) for empty in ("", None) for as_object in (True, False))


def find_call_form(render: Render) -> CallForm:
    """Return the form in which a template shows a call and its result right; the first form if there is none."""
    shown: list[CallForm] = []
    for form in CALL_FORMS:
        try:
            text = render(_trial(form))
        except ChatTemplateError:
            continue
        if ARGUMENT not in text or RESULT not in text:
            continue
        if not ENCODED_TWICE.search(text) and not (form.empty is None and SPELLED_NULL.search(text)):
            return form
        shown.append(form)
    return shown[0] if shown else CALL_FORMS[0]


def _trial(form: CallForm) -> list[dict[str, Any]]:
    function = {"name": "find", "arguments": _written({"place": ARGUMENT, "number": 3}, form)}
    call = {"id": FORMER_CALL_ID, "type": "function", "function": function}
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": form.empty, "tool_calls": [call]},
        {"role": "tool", "name": "find", "tool_call_id": FORMER_CALL_ID, "content": RESULT},
        {"role": "assistant", "content": "Found"},
        {"role": "user", "content": "Good"},
    ]


def _written(arguments: Mapping[str, Any], form: CallForm) -> Any:
    return dict(arguments) if form.as_object else json.dumps(arguments, ensure_ascii=False)


def modern(source: str, message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with ``tool_calls`` and role ``tool`` in place of OpenAI's former ``function_call`` and role
    ``function``, unless the template knows only these."""
    if message["role"] == "function" and not FUNCTION_ROLE.search(source):
        return {**message, "role": "tool", "tool_call_id": message.get("tool_call_id") or FORMER_CALL_ID}
    call = message.get("function_call")
    is_known = "function_call" in source and "tool_calls" not in source
    if not call or message.get("tool_calls") or is_known:
        return message
    kept = {name: value for name, value in message.items() if name != "function_call"}
    return {**kept, "tool_calls": [{"id": FORMER_CALL_ID, "type": "function", "function": call}]}


def with_thinking(source: str, message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant's message with its thinking under a name that the template reads, if it has another one.

    Beside content and calls it stays as it is: templates refuse the three together, where they do not know its name.
    """
    given = next((name for name in THINKING if isinstance(message.get(name), str) and message[name]), None)
    if given is None or message["role"] != "assistant" or (message.get("content") and message.get("tool_calls")):
        return message
    known = [name for name in THINKING if re.search(rf"\b{name}\b", source)]
    return message if given in known or not known else {**message, known[0]: message[given]}


def in_form(message: dict[str, Any], form: CallForm, where: str) -> dict[str, Any]:
    """Return the message with its calls in the template's form.

    Raises:
        ChatTemplateError: a call is malformed, or its arguments are no JSON object and the template wants one.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, (list, tuple)):
        raise ChatTemplateError(f"{where}.tool_calls must be a list of calls", "messages")
    formed = [_call_in_form(call, form, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return {**message, "content": message.get("content") or form.empty, "tool_calls": formed}


def _call_in_form(call: Any, form: CallForm, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(
            f'{where} must be an object such as {{"type": "function", "function": {{"name", "arguments"}}}}', "messages"
        )
    arguments = _arguments_in_form(function.get("arguments"), form, f"{where}.function.arguments")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _arguments_in_form(given: Any, form: CallForm, where: str) -> Any:
    """Return a call's arguments in the template's form; null and an empty text are an empty object."""
    if isinstance(given, str) and given.strip():
        try:
            parsed = json.loads(given)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            if not form.as_object:
                return given
            raise ChatTemplateError(f"{where} must be the JSON text of an object, not {given[:40]!r}", "messages")
        return parsed if form.as_object else given
    if given is None or isinstance(given, str):
        given = {}
    if not isinstance(given, Mapping):
        raise ChatTemplateError(f"{where} must be a JSON text or an object, not {type(given).__name__}", "messages")
    return _written(given, form)


def shape_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Return what decides whether a template shows a conversation: roles and kinds of content, without words."""
    return tuple(
        (message["role"], _shape_of_content(message.get("content")), len(message.get("tool_calls") or ()))
        for message in messages
    )


def _shape_of_content(content: Any) -> Any:
    if isinstance(content, list):
        return tuple(bool(part.get("text")) if part.get("type") == "text" else part.get("type") for part in content)
    return content if content is None else bool(content.strip())


class Twin:
    """A conversation of the same shape as ``messages`` (as the template gets them), with a word for each content.

    Attributes:
        messages: the twin.
    """

    def __init__(self, messages: Sequence[dict[str, Any]], form: CallForm) -> None:
        self._owners: list[int] = []  # per word, its message
        self._form = form
        self.messages = [self._twin(i, message) for i, message in enumerate(messages)]

    def left_out(self, text: str) -> list[int]:
        """Return the indices of messages that the rendered twin does not show completely."""
        found = {int(word[2:-1]) for word in TWIN_WORD.findall(text.lower())}
        return sorted({owner for number, owner in enumerate(self._owners) if number not in found})

    def _twin(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        twin: Any
        if isinstance(content, list):
            twin = [self._twin_part(i, part) for part in content]
        else:
            twin = self._word(i) if content and content.strip() else content
        calls = message.get("tool_calls")
        if not calls:
            return {**message, "content": twin}
        return {**message, "content": twin, "tool_calls": [self._twin_call(i, call) for call in calls]}

    def _twin_part(self, i: int, part: dict[str, Any]) -> dict[str, Any]:
        is_text = part.get("type") == "text" and isinstance(part.get("text"), str) and part["text"].strip()
        return {**part, "text": self._word(i)} if is_text else part

    def _twin_call(self, i: int, call: dict[str, Any]) -> dict[str, Any]:
        arguments = _written({"value": self._word(i)}, self._form)
        return {**call, "function": {**call["function"], "name": self._word(i), "arguments": arguments}}

    def _word(self, i: int) -> str:
        self._owners.append(i)
        return f"zq{len(self._owners) - 1}x"
