"""Chat templates: from messages to the text that the model continues.

    template = load_chat_template(tokenizer, server_args.chat_template)   # once; None: the tokenizer has none
    text = template.render(messages)                                      # per request, from any thread
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]          # as transformers' apply_chat_template does

A template is a program in Jinja that comes with the checkpoint or from whoever starts the server, never from a request.
It runs in transformers' sandbox: no attribute that leads out of the data, no changes to it. Endless loops cannot be
prevented there. Messages are data: Jinja in them is text. What they hold of the tokenizer's control tokens
(``<|im_end|>``) is read as such, though, as everywhere in the field; roles, which templates paste between control
tokens, are plain words for that reason.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from rtp_llm.srt.sampling_params import InvalidRequest

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]

NO_CHAT_TEMPLATE = (
    "the tokenizer has no chat template, so messages cannot be turned into a prompt; start with "
    "--chat-template FILE.jinja, or send a text to be continued (/v1/completions, rtp-llm generate)"
)
TEXT_BETWEEN_PARTS = "\n"  # where a template takes strings only
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
RESERVED = ("conversations", "messages", "tools", "documents", "chat_template", "return_assistant_tokens_mask") + (
    "continue_final_message",
    "add_generation_prompt",
)
MAX_ERROR_CHARS = 400
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "required": []}


class ChatTemplateError(InvalidRequest):
    """Messages that a template does not take, or a template that does not work. ``param`` is what is to blame."""


class ChatTemplate:
    """One Jinja template, with what it was found to take. Thread-safe.

    Args:
        source: the template.
        special_tokens: variables that the template sees, such as ``bos_token``.
        tool_use: the template for requests with tools, where the tokenizer has one of its own for them.

    Raises:
        ChatTemplateError: the template is not valid Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any] | None = None, tool_use: str | None = None
    ) -> None:
        self.source = source
        self.tool_use = tool_use
        self._special_tokens = dict(special_tokens or {})
        self._roles: dict[tuple[str, str], _Role] = {}
        for template in filter(None, (source, tool_use)):
            _check_syntax(template)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt, to be encoded without further special tokens. What transformers makes of the same messages.

        Args:
            messages: ``{"role", "content", ...}``. Content is a string or a list of ``{"type": "text", "text"}``; the
                template gets it in the form that it handles for that role. Further fields go along as they are, but for
                those that are None. Role ``developer`` becomes ``system`` for templates that do not know it.
            add_generation_prompt: end with what makes the assistant speak.
            continue_final_message: leave the last message open, to be continued. Excludes ``add_generation_prompt``.
            tools: JSON schemas of functions.
            chat_template_kwargs: further variables of the template, such as ``enable_thinking``; it must use them. What
                comes from a request belongs here, where any name is safe.
            variables: the same, one by one.

        Raises:
            ChatTemplateError: says which message is wrong, or what the template said.
        """
        if add_generation_prompt and continue_final_message:
            raise ChatTemplateError(
                "continue_final_message goes on with the last message and add_generation_prompt begins a new one: "
                "set only one of them",
                "continue_final_message",
            )
        source = self.tool_use if tools and self.tool_use else self.source
        if tools and not _mentions(source, "tools"):
            raise ChatTemplateError("the model's chat template has no place for tools", "tools")
        variables = {**(chat_template_kwargs or {}), **variables}
        _check_kwargs(source, variables)
        fitted = [self._fit(source, i, message) for i, message in enumerate(_checked(messages))]
        if continue_final_message:
            _check_continuable(fitted)
        options = variables | {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        try:
            return self._run(source, fitted, tools=list(tools) if tools else None, **options)
        except ChatTemplateError as error:
            if not tools and self._works_with_tools(source, fitted, options):
                raise ChatTemplateError(
                    "the chat template works only with tools, and there are none", "tools"
                ) from error
            raise

    def _works_with_tools(self, source: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> bool:
        try:
            self._run(source, messages, tools=[ANY_TOOL], **options)
        except ChatTemplateError:
            return False
        return True

    def _fit(self, source: str, i: int, message: dict[str, Any]) -> dict[str, Any]:
        """The message in the form that the template takes."""
        role = message["role"]
        if role == "developer" and not _mentions(source, "developer"):
            role = "system"
        takes = self._role(source, role)
        if not takes.strings and not takes.parts:
            raise ChatTemplateError(
                f"messages[{i}]: the model's chat template leaves out messages of role {role!r}; use another role",
                "messages",
            )
        fitted = {**message, "role": role}
        content = message.get("content")
        if isinstance(content, str) and not takes.strings:
            fitted["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not takes.parts:
            fitted["content"] = TEXT_BETWEEN_PARTS.join(part["text"] for part in content)
        return fitted

    def _role(self, source: str, role: str) -> "_Role":
        key = (source, role)
        if key in self._roles:
            return self._roles[key]
        takes = self._try_role(source, role)
        if len(self._roles) < MAX_KNOWN_ROLES:
            self._roles[key] = takes
        return takes

    def _try_role(self, source: str, role: str) -> "_Role":
        """Renders a word in a message of this role, as a string and as a list of parts, and looks for it."""
        strings = self._shows_word(source, role, WORD)
        parts = self._shows_word(source, role, [{"type": "text", "text": WORD}])
        if strings is None and parts is None:  # refused as such: the real messages will get the template's own words
            return _Role(strings=True, parts=False)
        if role in CALLED and not strings and not parts:  # shown only after calls of a shape that we cannot guess
            return _Role(strings=True, parts=False)
        return _Role(strings=bool(strings), parts=bool(parts))

    def _shows_word(self, source: str, role: str, content: Any) -> bool | None:
        """None: the template refuses the messages."""
        try:
            text = self._run(source, _trial(role, content), add_generation_prompt=False)
        except ChatTemplateError:
            return None
        return WORD in text.lower() and not WORD_IN_A_LIST.search(text)

    def _run(self, source: str, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            variables = {**self._special_tokens, **options}
            texts, _ = render_jinja_template(conversations=[messages], chat_template=source, **variables)
        except Exception as error:  # whatever a template may do
            raise _told(error, options) from error
        return texts[0]


CALLED = ("tool", "function")
MAX_KNOWN_ROLES = 64  # role names come from requests
ANY_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": NO_PARAMETERS}}
WORD = "xylophone7q"
WORD_IN_A_LIST = re.compile(rf"""["']:\s*["']{WORD}""")  # the list itself was printed


@dataclass(frozen=True, slots=True)
class _Role:
    """What a template takes as the content of a role's messages."""

    strings: bool
    parts: bool


def _trial(role: str, content: Any) -> list[dict[str, Any]]:
    """A plausible conversation with one message of ``role``."""
    user = {"role": "user", "content": "Hi"}
    tried = {"role": role, "content": content}
    if role == "user":
        return [tried]
    if role == "assistant":
        return [user, tried, user]
    if role in CALLED:
        call = {"name": "f", "arguments": {}}
        calls = [{"id": "call00000", "type": "function", "function": call}]
        named = {**tried, "name": "f", "tool_call_id": "call00000"}
        return [user, {"role": "assistant", "content": "", "tool_calls": calls}, named]
    return [tried, user]


def load_chat_template(tokenizer: Any, chat_template: str | None = None) -> ChatTemplate | None:
    """The template that a model is talked to with; None if there is none (NO_CHAT_TEMPLATE says what to do then).

    Args:
        tokenizer: a transformers tokenizer, or None.
        chat_template: a file (``.jinja``, or ``.json`` with the template under ``chat_template``), or the name of one
            of the tokenizer's several templates; None: its own, or the one that is named ``default``.

    Raises:
        ChatTemplateError: there is no such template, or it is not valid Jinja.
    """
    if tokenizer is None:
        if chat_template is not None:
            raise ChatTemplateError("a chat template needs a tokenizer, and there is none", "chat_template")
        return None
    own = tokenizer.chat_template or {}
    named = {"default": own} if isinstance(own, str) else dict(own)
    special_tokens = tokenizer.special_tokens_map
    if chat_template is None:
        source = _default(named)
        return None if source is None else ChatTemplate(source, special_tokens, named.get("tool_use"))
    if chat_template in named:
        return ChatTemplate(named[chat_template], special_tokens)
    return ChatTemplate(_read(chat_template, sorted(named)), special_tokens)


def _default(named: dict[str, str]) -> str | None:
    if "default" in named or len(named) < 2:
        return next(iter([named["default"]] if "default" in named else named.values()), None)
    logger.warning("the tokenizer has several chat templates and no default; name one: %s", ", ".join(sorted(named)))
    return None


def _read(chat_template: str, names: list[str]) -> str:
    path = Path(chat_template)
    if not path.is_file():
        known = f"the tokenizer has {', '.join(names)}" if names else "the tokenizer has none"
        raise ChatTemplateError(
            f"chat template {chat_template!r} is neither a file nor the name of one of the tokenizer's ({known})",
            "chat_template",
        )
    try:
        text = path.read_text(encoding="utf-8")
        return text if path.suffix != ".json" else _from_json(path, json.loads(text))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ChatTemplateError(f"cannot read the chat template {path}: {error}", "chat_template") from error


def _from_json(path: Path, content: Any) -> str:
    if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
        return content["chat_template"]
    raise ChatTemplateError(
        f"{path} has no Jinja template under the key 'chat_template'. Descriptions by system, user, assistant and "
        "sep_style are not supported; write the template as a .jinja file",
        "chat_template",
    )


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, without the fields that are None."""
    if not isinstance(messages, (list, tuple)):
        raise ChatTemplateError(f"messages must be a list, not {type(messages).__name__}", "messages")
    if not messages:
        raise ChatTemplateError("messages is empty: there must be at least one", "messages")
    return [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _checked_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(
            f"{where} must be an object with role and content, not {type(message).__name__}", "messages"
        )
    role = message.get("role")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise ChatTemplateError(
            f"{where}.role must be a word such as system, user or assistant, not {_short(role)}", "messages"
        )
    content = message.get("content")
    if content is None and not (role == "assistant" and any(message.get(name) for name in SPEAKS_WITHOUT_CONTENT)):
        raise ChatTemplateError(f"{where}.content is missing", "messages")
    if content is not None and not isinstance(content, str):
        content = _checked_parts(f"{where}.content", content)
    return {name: value for name, value in {**message, "content": content}.items() if value is not None}


SPEAKS_WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _checked_parts(where: str, parts: Any) -> list[dict[str, str]]:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ChatTemplateError(
            f"{where} must be a string or a list of parts (at least one), not {_short(parts)}", "messages"
        )
    return [_checked_part(f"{where}[{i}]", part) for i, part in enumerate(parts)]


def _checked_part(where: str, part: Any) -> dict[str, str]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ChatTemplateError(
            f'{where} must be an object such as {{"type": "text", "text": "..."}}, not {_short(part)}', "messages"
        )
    if part["type"] != "text":
        raise ChatTemplateError(
            f"{where} has type {part['type']!r}, which is not supported; only text parts are", "messages"
        )
    if not isinstance(part.get("text"), str):
        raise ChatTemplateError(f"{where}.text must be a string, not {_short(part.get('text'))}", "messages")
    if unknown := sorted(set(part) - {"type", "text"}):
        raise ChatTemplateError(f"{where} has the unknown field {unknown[0]!r}; a text part has only text", "messages")
    return dict(part)


def _check_kwargs(source: str, kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in RESERVED:
            raise ChatTemplateError(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
        if not _mentions(source, name):
            raise ChatTemplateError(f"the model's chat template does not use {name!r}", "chat_template_kwargs")


def _mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _check_continuable(messages: list[dict[str, Any]]) -> None:
    last = messages[-1]
    if last["role"] != "assistant" or not last.get("content"):
        raise ChatTemplateError(
            "continue_final_message needs a last message of role assistant with content to go on from; "
            f"messages[{len(messages) - 1}] has role {last['role']!r}"
            + ("" if last.get("content") else " and no content"),
            "continue_final_message",
        )


def _check_syntax(source: str) -> None:
    """Compiles the template as rendering will (the result is cached there)."""
    try:
        render_jinja_template(conversations=[], chat_template=source)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}", "chat_template"
        ) from error


def _told(error: Exception, options: Mapping[str, Any]) -> ChatTemplateError:
    """What went wrong in a template, in its own words where it has some."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= MAX_ERROR_CHARS else said[:MAX_ERROR_CHARS] + "..."
    if isinstance(error, SecurityError):
        return ChatTemplateError(f"the chat template did something that the sandbox forbids: {said}")
    if isinstance(error, UndefinedError):
        return ChatTemplateError(f"the chat template uses something that is not there: {said}", "messages")
    if type(error) is TemplateError:  # the template's own raise_exception
        return ChatTemplateError(f"the chat template refuses these messages: {said}", "messages")
    if isinstance(error, ValueError) and options.get("continue_final_message"):
        return ChatTemplateError(
            "the chat template changes the last message, so it cannot be continued", "continue_final_message"
        )
    return ChatTemplateError(f"the chat template fails on these messages: {type(error).__name__}: {said}", "messages")


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
