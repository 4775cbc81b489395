"""Chat templates in Jinja: from messages to the prompt's text.

A template is a program that comes with the checkpoint or from the operator, never from a request. It runs in
transformers' sandbox, which allows no attributes outside the data and no changes to it. The sandbox cannot prevent
endless loops: the server ends them (``--template-timeout``), and ``template_sizes.py`` limits sizes that a request may
set. Messages are data: Jinja in them is text. Control tokens of the tokenizer in them (``<|im_end|>``) are read as
such, though, as in other engines; therefore roles, which templates put between control tokens, are plain words.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from rtp_llm.srt.chat.histories import (
    CALL_FORMS,
    CallForm,
    Twin,
    find_call_form,
    in_form,
    modern,
    shape_of,
    with_thinking,
)
from rtp_llm.srt.chat.messages import (
    KINDS,
    TEXT_ONLY,
    ChatPrompt,
    ChatTemplateError,
    MediaPart,
    MediaRules,
    Message,
    checked_messages,
    media_of,
    sources_of,
)
from rtp_llm.srt.chat.template_sizes import check_sizes, read_variables

TEXT_BETWEEN_PARTS = "\n"  # for templates that take strings only
RESERVED = ("conversations", "messages", "tools", "documents", "chat_template", "return_assistant_tokens_mask") + (
    "continue_final_message",
    "add_generation_prompt",
)
MAX_ERROR_CHARS = 400
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "required": []}


class ChatTemplate:
    """One Jinja template, and the forms of messages that it takes, found by trial. Thread-safe.

    Args:
        source: the template.
        special_tokens: variables that the template sees, such as ``bos_token``.
        tool_use: the template for requests with tools, if the tokenizer has one.
        adds_special_tokens: the tokenizer adds its own around a prompt that does not begin with ``bos_token``, as
            processors of models with media do (tokenizers' ``apply_chat_template`` never does).

    Raises:
        ChatTemplateError: the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, Any] | None = None,
        tool_use: str | None = None,
        adds_special_tokens: bool = False,
    ) -> None:
        self.source = source
        self.tool_use = tool_use
        self._special_tokens = dict(special_tokens or {})
        self._adds_special_tokens = adds_special_tokens
        self._roles: dict[tuple[str, str], _Role] = {}
        self._places: dict[tuple[str, str, str], _Place | None] = {}
        self._call_forms: dict[str, CallForm] = {}
        self._left_out: dict[tuple[Any, ...], int | None] = {}  # shape -> the first message not shown completely
        for template in filter(None, (source, tool_use)):
            _check_syntax(template)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the text of ``prompt`` for messages without media. ``options`` are those of ``prompt``, and variables
        of the template, such as ``enable_thinking``."""
        named = {name: options.pop(name) for name in PROMPT_OPTIONS & options.keys()}
        variables = {**(named.pop("chat_template_kwargs", None) or {}), **options}
        return self.prompt(messages, chat_template_kwargs=variables, **named).text

    def prompt(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        media: MediaRules = TEXT_ONLY,
    ) -> ChatPrompt:
        """Render messages as transformers does, and collect their media.

        Args:
            messages: ``{"role", "content", ...}``. Content is a string or a list of parts, text or media; the
                template gets it in the form that it handles for that role. Further fields are passed on, except
                None. Role ``developer`` becomes ``system`` for templates that do not know it.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: leave the last message open, to be continued. Excludes ``add_generation_prompt``.
            tools: JSON schemas of functions.
            chat_template_kwargs: further variables of the template, such as ``enable_thinking``; it must use them.
            media: the media that messages may hold.

        Raises:
            ChatTemplateError: names the wrong message, or quotes the template's own error.
        """
        source = self.tool_use if tools and self.tool_use else self.source
        if tools and not _mentions(source, "tools"):
            raise ChatTemplateError("the model's chat template has no place for tools", "tools")
        variables = chat_template_kwargs or {}
        _check_kwargs(source, variables)
        checked = checked_messages(messages, media)
        check_options(checked, add_generation_prompt, continue_final_message)
        fitted = [self._fit(source, i, message) for i, message in enumerate(checked)]
        options = {
            **variables,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": list(tools) if tools else None,
        }
        text = self._run_with_tools(source, fitted, options)
        self._check_complete(source, fitted, options)
        self._check_shown(source, checked, text, options)
        return ChatPrompt(
            text, sources_of(checked, "image"), sources_of(checked, "video"), self._wants_special_tokens(text)
        )

    @property
    def text(self) -> str:
        """The text that tells the form of the model's answers: of all its templates."""
        return self.source + (self.tool_use or "")

    @property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads and that something else sets."""
        return frozenset(name for source in (self.source, self.tool_use) if source for name in read_variables(source))

    def uses(self, name: str) -> bool:
        """Return whether ``chat_template_kwargs`` may set a variable of this name."""
        return name in RESERVED or any(_mentions(source, name) for source in (self.source, self.tool_use) if source)

    def takes(self, kind: str) -> bool:
        """Return whether the template shows media of this kind, one of KINDS, in a user's message."""
        place = self._place(self.source, "user", kind)
        return place is not None and place.num_chars > 0

    def _wants_special_tokens(self, text: str) -> bool:
        bos = self._special_tokens.get("bos_token")
        return self._adds_special_tokens and not (bos and text.startswith(str(bos)))

    def _run_with_tools(self, source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        try:
            return self._run(source, messages, **options)
        except ChatTemplateError as error:
            if not options["tools"] and self._works_with_tools(source, messages, options):
                raise ChatTemplateError(
                    "the chat template works only with tools, and there are none", "tools"
                ) from error
            raise

    def _works_with_tools(self, source: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> bool:
        try:
            self._run(source, messages, **{**options, "tools": [ANY_TOOL]})
        except ChatTemplateError:
            return False
        return True

    def _fit(self, source: str, i: int, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message in the template's form."""
        message = with_thinking(source, modern(source, message))
        role = _known_role(source, message["role"])
        takes = self._role(source, role)
        if not takes.strings and not takes.parts:
            raise ChatTemplateError(
                f"messages[{i}]: the model's chat template leaves out messages of role {role!r}; use another role",
                "messages",
            )
        fitted = in_form({**message, "role": role}, self._call_form(source, message), f"messages[{i}]")
        content = message.get("content")
        if isinstance(content, str) and not takes.strings:
            fitted["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and any(isinstance(part, MediaPart) for part in content):
            fitted["content"] = [self._fit_part(source, role, part) for part in content]
        elif isinstance(content, list) and not takes.parts:
            fitted["content"] = TEXT_BETWEEN_PARTS.join(part["text"] for part in content)
        return fitted

    def _call_form(self, source: str, message: Mapping[str, Any]) -> CallForm:
        if not message.get("tool_calls"):
            return CALL_FORMS[0]
        if source not in self._call_forms:
            self._call_forms[source] = find_call_form(partial(self._run, source, add_generation_prompt=False))
        return self._call_forms[source]

    def _check_complete(self, source: str, fitted: list[dict[str, Any]], options: Mapping[str, Any]) -> None:
        """Raise for a conversation of which the template would silently leave something out."""
        shape = (source, bool(options["tools"]), shape_of(fitted))
        if shape not in self._left_out:
            twin = Twin(fitted, self._call_forms.get(source, CALL_FORMS[0]))
            try:
                left_out = twin.left_out(
                    self._run(source, twin.messages, **{**options, "continue_final_message": False})
                )
            except ChatTemplateError:  # it depends on the content: it has accepted the real messages
                left_out = []
            if len(self._left_out) >= MAX_KNOWN_SHAPES:
                self._left_out.clear()
            self._left_out[shape] = left_out[0] if left_out else None
        first = self._left_out[shape]
        if first is not None:
            raise ChatTemplateError(
                f"messages[{first}] (role {fitted[first]['role']!r}): the model's chat template leaves out what it "
                "says at this place; move it, or merge it with a message that is shown",
                "messages",
            )

    def _fit_part(self, source: str, role: str, part: Any) -> dict[str, Any]:
        if not isinstance(part, MediaPart):
            return part
        place = self._place(source, role, part.kind)
        if place is None:
            raise ChatTemplateError(
                f"{part.where} is {KINDS[part.kind][0]}, and the model's chat template has no place for "
                f"{KINDS[part.kind][1]} in messages of role {role!r}",
                "messages",
            )
        return place.part

    def _place(self, source: str, role: str, kind: str) -> "_Place | None":
        key = (source, role, kind)
        if key in self._places:
            return self._places[key]
        place = self._try_media(source, role, kind)
        if len(self._places) < MAX_KNOWN_ROLES:
            self._places[key] = place
        return place

    def _try_media(self, source: str, role: str, kind: str) -> "_Place | None":
        """Render a message of two words, with and without media between them, and compare.

        A template that refuses such a message is assumed to have a place: the real message will show.
        """
        words = [{"type": "text", "text": WORD}, {"type": "text", "text": WORD}]
        refused = None
        for part in _forms_of(kind):
            try:
                bare = self._run(source, _trial(role, words), add_generation_prompt=False)
                text = self._run(source, _trial(role, [words[0], part, words[1]]), add_generation_prompt=False)
            except ChatTemplateError as error:
                if type(error.__cause__) is TemplateError:
                    refused = _Place(part, 0)
                continue
            if text.lower().count(WORD) == 2 and len(text) > len(bare) and not PRINTED_PART.search(text):
                return _Place(part, len(text) - len(bare))
        return refused

    def _check_shown(self, source: str, messages: list[dict[str, Any]], text: str, options: Mapping[str, Any]) -> None:
        """Check that all media are shown: some templates show those of the last message only, or of the first."""
        places = [
            self._place(source, _known_role(source, message["role"]), part.kind)
            for message in messages
            for part in media_of([message])
        ]
        lengths = [place.num_chars for place in places if place is not None]
        if not lengths:
            return
        try:
            bare = self._run(
                source, [self._fit(source, i, _without_media(m)) for i, m in enumerate(messages)], **options
            )
        except ChatTemplateError:  # it takes such messages only with their media
            return
        missing = sum(lengths) - (len(text) - len(bare))
        if 2 * missing > min(lengths):  # spaces around parts may differ
            raise ChatTemplateError(
                f"the model's chat template does not show all of the {len(lengths)} media of these messages; "
                "try them in the last message",
                "messages",
            )

    def _role(self, source: str, role: str) -> "_Role":
        key = (source, role)
        if key in self._roles:
            return self._roles[key]
        takes = self._try_role(source, role)
        if len(self._roles) < MAX_KNOWN_ROLES:
            self._roles[key] = takes
        return takes

    def _try_role(self, source: str, role: str) -> "_Role":
        """Render a word in a message of this role, as a string and as a list of parts, and look for it."""
        strings = self._shows_word(source, role, WORD)
        parts = self._shows_word(source, role, [{"type": "text", "text": WORD}])
        if strings is None and parts is None:  # refused both: the real messages will get the template's own error
            return _Role(strings=True, parts=False)
        if role in CALLED and not strings and not parts:  # shown only after calls of an unknown shape
            return _Role(strings=True, parts=False)
        return _Role(strings=bool(strings), parts=bool(parts))

    def _shows_word(self, source: str, role: str, content: Any) -> bool | None:
        """Return whether the template shows WORD; None: it refuses the messages."""
        try:
            text = self._run(source, _trial(role, content), add_generation_prompt=False)
        except ChatTemplateError:
            return None
        return WORD in text.lower() and not WORD_IN_A_LIST.search(text)

    def _run(self, source: str, messages: list[dict[str, Any]], /, **options: Any) -> str:
        try:
            variables = {**self._special_tokens, **options}
            texts, _ = render_jinja_template(conversations=[messages], chat_template=source, **variables)
        except Exception as error:  # a template may raise anything
            raise _template_error(error, options) from error
        return texts[0]


PROMPT_OPTIONS = {"add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs", "media"}
CALLED = ("tool", "function")
MAX_KNOWN_SHAPES = 256
MAX_KNOWN_ROLES = 64  # role names come from requests
ANY_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": NO_PARAMETERS}}
WORD = "xylophone7q"
WORD_IN_A_LIST = re.compile(rf"""["']:\s*["']{WORD}""")  # the list was printed as it is
PRINTED_PART = re.compile(r"""["']type["']\s*:""")


@dataclass(frozen=True, slots=True)
class _Role:
    """The kinds of content that a template takes in a role's messages."""

    strings: bool
    parts: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """A part by which a template shows a medium, and the number of characters that it adds; 0: the template refuses
    the trial."""

    part: dict[str, Any]
    num_chars: int


def _forms_of(kind: str) -> list[dict[str, Any]]:
    """Return a medium's parts: that of transformers, and OpenAI's, whose source is empty."""
    return [{"type": kind}, {"type": f"{kind}_url", f"{kind}_url": {"url": ""}}]


def _without_media(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    left = [part for part in content if not isinstance(part, MediaPart)]
    return {**message, "content": left or [{"type": "text", "text": ""}]}


def _trial(role: str, content: Any) -> list[dict[str, Any]]:
    """Return a plausible conversation with one message of ``role``."""
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


def _check_kwargs(source: str, kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in RESERVED:
            raise ChatTemplateError(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
        if not _mentions(source, name):
            raise ChatTemplateError(f"the model's chat template does not use {name!r}", "chat_template_kwargs")
    if kwargs:
        check_sizes(source, kwargs)


def _known_role(source: str, role: str) -> str:
    return "system" if role == "developer" and not _mentions(source, "developer") else role


def _mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def check_options(messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool) -> None:
    """Raise ChatTemplateError if checked messages cannot end as the options want."""
    if not continue_final_message:
        return
    if add_generation_prompt:
        raise ChatTemplateError(
            "continue_final_message goes on with the last message and add_generation_prompt begins a new one: "
            "set only one of them",
            "continue_final_message",
        )
    last = messages[-1]
    if last["role"] != "assistant" or not last.get("content"):
        raise ChatTemplateError(
            "continue_final_message needs a last message of role assistant with content to go on from; "
            f"messages[{len(messages) - 1}] has role {last['role']!r}"
            + ("" if last.get("content") else " and no content"),
            "continue_final_message",
        )


def _check_syntax(source: str) -> None:
    """Compile the template as rendering will (the result is cached there)."""
    try:
        render_jinja_template(conversations=[], chat_template=source)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}", "chat_template"
        ) from error


def _template_error(error: Exception, options: Mapping[str, Any]) -> ChatTemplateError:
    """Return the error of a template, in its own words if it raised one."""
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
