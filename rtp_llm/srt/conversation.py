"""From messages to the prompt: the choice of a model's chat template, and conversations in plain data.

    template = load_chat_template(tokenizer, server_args.chat_template)   # once; None: there is none
    prompt = template.prompt(messages)                                    # per request, from any thread
    ids = tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)["input_ids"]

A template is Jinja (``chat/template.py``), mostly the tokenizer's own, or a ``Conversation`` (``chat/formats.py``):
separators and role names around the messages. A model whose tokenizer has no template, or one without a place for
images, registers a Conversation in its own file:

    register_conv_template(Conversation(name="mine", roles=("Q", "A"), sep_style=SeparatorStyle.ADD_COLON_SINGLE))
    register_conv_template_matching_function(lambda path: "mine" if "my-model" in path else None)
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtp_llm.srt.chat.formats import BUILT_IN, FORMAT_OF_NAME, Conversation, ImageData, SeparatorStyle
from rtp_llm.srt.chat.messages import (
    ALL_MEDIA,
    TEXT_ONLY,
    ChatPrompt,
    ChatTemplateError,
    MediaPart,
    MediaRules,
    Message,
    checked_messages,
    sources_of,
)
from rtp_llm.srt.chat.template import TEXT_BETWEEN_PARTS, ChatTemplate, check_options

logger = logging.getLogger(__name__)

NO_CHAT_TEMPLATE = (
    "the tokenizer has no chat template, so messages cannot be turned into a prompt; start with "
    "--chat-template FILE.jinja, or send a text to be continued (/v1/completions, rtp-llm generate)"
)
PROCESSOR_TEMPLATE_FILE = "chat_template.json"  # of processors in older checkpoints
MAX_IMAGES_WITHOUT_NEWLINES = 16  # with more images than this, each text of a message begins a new line


__all__ = [
    "ChatPrompt",
    "ChatTemplate",
    "ChatTemplateError",
    "Conversation",
    "ConversationTemplate",
    "ImageData",
    "MediaRules",
    "SeparatorStyle",
    "chat_template_exists",
    "chat_templates",
    "generate_chat_conv",
    "get_conv_template_by_model_path",
    "load_chat_template",
    "register_conv_template",
    "register_conv_template_matching_function",
]

# The registry: of this process only. Prompts are made in the client's process.

MatchingFunction = Callable[[str], str | None]

chat_templates: dict[str, Conversation] = {conversation.name: conversation for conversation in BUILT_IN}
_matching_functions: list[MatchingFunction] = []


def register_conv_template(template: Conversation, override: bool = False) -> None:
    """Register a conversation. A second one of the same name is an AssertionError, unless ``override`` is set."""
    if not override and template.name in chat_templates:
        raise AssertionError(f"{template.name} has been registered.")
    chat_templates[template.name] = template


def register_conv_template_matching_function(function: MatchingFunction) -> MatchingFunction:
    """Register ``function(model_path)``, which returns the name of a model's conversation, or None.

    Registered functions come before the tokenizer's template and before built-in conversations. May be used as a
    decorator.
    """
    _matching_functions.append(function)
    return function


def get_conv_template_by_model_path(model_path: str) -> str | None:
    """Return the first name from the matching functions, in order of registration, else a built-in one."""
    return _registered_match(model_path) or _built_in_match(model_path)


def _registered_match(model_path: str) -> str | None:
    for function in _matching_functions:
        name = function(model_path)
        if name is not None:
            if name not in chat_templates:
                raise ChatTemplateError(
                    f"a matching function names the conversation {name!r} for {model_path}, and there is no such; "
                    f"have {', '.join(chat_templates)}",
                    "chat_template",
                )
            return name
    return None


def chat_template_exists(template_name: str) -> bool:
    return template_name in chat_templates


# From a request to a conversation


def generate_chat_conv(request: Any, template_name: str) -> Conversation:
    """Return a request's messages in the format of a registered conversation, ready for the answer.

    Args:
        request: has ``messages``, as attribute or key: dicts, or objects with ``model_dump``.

    Raises:
        ChatTemplateError: the format has no place for a message; it is a ValueError.
        KeyError: there is no such conversation.
    """
    messages = request["messages"] if isinstance(request, Mapping) else request.messages
    plain = [_plain(message) for message in messages] if isinstance(messages, (list, tuple)) else messages
    conversation = chat_templates[template_name].copy()
    for i, message in enumerate(checked_messages(plain, ALL_MEDIA)):
        _append(conversation, f"messages[{i}]", message, is_first=i == 0)
    conversation.append_message(conversation.roles[1], None)
    return conversation


def _plain(message: Any) -> Any:
    return message.model_dump(exclude_none=True) if hasattr(message, "model_dump") else message


def _append(conversation: Conversation, where: str, message: dict[str, Any], is_first: bool) -> None:
    role, content = message["role"], message.get("content")
    if content is None:
        raise ChatTemplateError(f"{where}: conversation {conversation.name!r} needs content", "messages")
    if role in ("system", "developer"):
        if not is_first:
            raise ChatTemplateError(
                f"{where}: conversation {conversation.name!r} takes one system message, before all others", "messages"
            )
        conversation.set_system_message(_only_text(where, role, content))
    elif role == "user":
        conversation.append_message(conversation.roles[0], _user_text(conversation, content))
    elif role == "assistant":
        conversation.append_message(conversation.roles[1], _only_text(where, role, content))
    else:
        raise ChatTemplateError(
            f"Unknown role: {role} ({where}; conversation {conversation.name!r} knows system, user and assistant)",
            "messages",
        )


def _only_text(where: str, role: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(isinstance(part, MediaPart) for part in content):
        raise ChatTemplateError(f"{where}: in messages of role {role!r} this conversation takes text only", "messages")
    return TEXT_BETWEEN_PARTS.join(part["text"] for part in content)


def _user_text(conversation: Conversation, content: Any) -> str:
    """Return the text with placeholders, and add the media to the conversation."""
    if isinstance(content, str):
        return content
    num_images = sum(isinstance(part, MediaPart) and part.kind == "image" for part in content)
    before_text = "\n" if num_images > MAX_IMAGES_WITHOUT_NEWLINES else ""
    prefix: list[str] = []
    pieces: list[str] = []
    for part in content:
        if isinstance(part, MediaPart):
            _add_media(conversation, part)
            (prefix if conversation.image_token_at_prefix else pieces).append(conversation.placeholder(part.kind))
        else:
            pieces.append(before_text + part["text"])
    return "".join([*prefix, *pieces])


def _add_media(conversation: Conversation, part: MediaPart) -> None:
    if part.kind == "image":
        conversation.append_image(part.source, part.detail)
        conversation.modalities.append(part.kind)
    elif part.kind == "video":
        conversation.append_video(part.source)
    else:
        conversation.append_audio(part.source)


class ConversationTemplate:
    """A registered conversation with the interface of ChatTemplate. Thread-safe."""

    def __init__(self, name: str, bos_token: str | None = None) -> None:
        self.name = name
        self._bos_token = bos_token

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the text of ``prompt`` for messages without media."""
        return self.prompt(messages, **options).text

    def prompt(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        media: MediaRules = TEXT_ONLY,
    ) -> ChatPrompt:
        """Render as ChatTemplate.prompt does. There are no tools and no variables."""
        checked = checked_messages(messages, media)
        check_options(checked, add_generation_prompt, continue_final_message)
        if tools:
            raise ChatTemplateError(f"conversation {self.name!r} has no place for tools", "tools")
        for name in chat_template_kwargs or {}:
            raise ChatTemplateError(f"conversation {self.name!r} does not use {name!r}", "chat_template_kwargs")
        conversation = generate_chat_conv({"messages": messages}, self.name)
        if not add_generation_prompt:
            conversation.messages.pop()
        text = conversation.get_open_prompt() if continue_final_message else conversation.get_prompt()
        stop = conversation.stop_str
        return ChatPrompt(
            text,
            sources_of(checked, "image"),
            sources_of(checked, "video"),
            add_special_tokens=not (self._bos_token and text.startswith(self._bos_token)),
            stop=[stop] if isinstance(stop, str) else list(stop or []),
            stop_token_ids=list(conversation.stop_token_ids or []),
        )

    @property
    def text(self) -> str:
        """The text that tells the form of the model's answers: none."""
        return ""

    @property
    def variables(self) -> frozenset[str]:
        """The variables that a request may set: none."""
        return frozenset()

    def uses(self, name: str) -> bool:
        """Return False: there are no variables for ``chat_template_kwargs``."""
        return False

    def takes(self, kind: str) -> bool:
        return True


Template = ChatTemplate | ConversationTemplate


# The choice of a template


def load_chat_template(
    tokenizer: Any,
    chat_template: str | None = None,
    model_path: str | None = None,
    directory: str | None = None,
    is_multimodal: bool = False,
) -> Template | None:
    """Return a model's chat template; None if there is none (NO_CHAT_TEMPLATE says what to do then).

    Unless ``chat_template`` names one, it is the first of these: the conversation that a registered matching function
    names; the tokenizer's own template, or the processor's, if it has a place for images or the model takes none; the
    built-in conversation for models of this name.

    Args:
        tokenizer: a transformers tokenizer, or None.
        chat_template: the name of a registered conversation; a ``.jinja`` file; a ``.json`` file, with a template under
            ``chat_template`` or the description of a conversation; or the name of one of the tokenizer's several
            templates. None: as above; of the tokenizer's several templates, ``default``.
        model_path: the model's name for matching functions.
        directory: the checkpoint's.
        is_multimodal: the model takes media.

    Raises:
        ChatTemplateError: the template does not exist, or is not valid.
    """
    if tokenizer is None:
        if chat_template is not None:
            raise ChatTemplateError("a chat template needs a tokenizer, and there is none", "chat_template")
        return None
    own = getattr(tokenizer, "chat_template", None) or {}
    named = {"default": own} if isinstance(own, str) else dict(own)
    special_tokens = getattr(tokenizer, "special_tokens_map", {})
    bos_token = special_tokens.get("bos_token")
    if chat_template is not None:
        if chat_template_exists(chat_template):
            return ConversationTemplate(chat_template, bos_token)
        if chat_template in named:
            return ChatTemplate(named[chat_template], special_tokens, adds_special_tokens=is_multimodal)
        source = _read(chat_template, sorted(named))
        if isinstance(source, Conversation):
            register_conv_template(source, override=True)
            return ConversationTemplate(source.name, bos_token)
        return ChatTemplate(source, special_tokens, adds_special_tokens=is_multimodal)
    if model_path is not None and (name := _registered_match(model_path)) is not None:
        return ConversationTemplate(name, bos_token)
    if is_multimodal and not named:
        named = _of_processor(directory)
    default = _default(named)
    template = None
    if default is not None:
        template = ChatTemplate(default, special_tokens, named.get("tool_use"), adds_special_tokens=is_multimodal)
        if not is_multimodal or template.takes("image"):
            return template
    if model_path is not None and (name := _built_in_match(model_path)) is not None:
        why = "has no place for images" if template else "is missing"
        logger.warning("the model's own chat template %s: the conversation %r is used instead", why, name)
        return ConversationTemplate(name, bos_token)
    return template


def _default(named: dict[str, str]) -> str | None:
    if "default" in named or len(named) < 2:
        return next(iter([named["default"]] if "default" in named else named.values()), None)
    logger.warning("the tokenizer has several chat templates and no default; name one: %s", ", ".join(sorted(named)))
    return None


def _of_processor(directory: str | None) -> dict[str, str]:
    path = Path(directory or "", PROCESSOR_TEMPLATE_FILE)
    source = _read(str(path), []) if directory is not None and path.is_file() else None
    return {"default": source} if isinstance(source, str) else {}


def _read(chat_template: str, names: list[str]) -> "str | Conversation":
    path = Path(chat_template)
    if not path.is_file():
        known = f"the tokenizer has {', '.join(names)}" if names else "the tokenizer has none"
        raise ChatTemplateError(
            f"chat template {chat_template!r} is neither a file nor the name of one of the tokenizer's ({known}) or of "
            f"a conversation ({', '.join(chat_templates)})",
            "chat_template",
        )
    try:
        text = path.read_text(encoding="utf-8")
        return text if path.suffix != ".json" else _from_json(path, json.loads(text))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ChatTemplateError(f"cannot read the chat template {path}: {error}", "chat_template") from error


def _from_json(path: Path, content: Any) -> "str | Conversation":
    if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
        return content["chat_template"]
    if not isinstance(content, dict):
        raise ChatTemplateError(f"{path} has no Jinja template under the key 'chat_template'", "chat_template")
    return _described(path, content)


_DESCRIPTION = {"name": True, "system": True, "user": True, "assistant": True, "sep_style": True, "stop_str": True} | {
    "sep": False,
    "sep2": False,
    "system_message": False,
    "image_token": False,
    "video_token": False,
}


def _described(path: Path, content: dict[str, Any]) -> Conversation:
    """Read ``{"name", "system", "user", "assistant", "sep_style", "stop_str"[, "sep", "system_message", ...]}``; the
    system message stands on the line after ``system``, unless that holds ``{system_message}``."""
    missing = [key for key, is_needed in _DESCRIPTION.items() if is_needed and key not in content]
    unknown = sorted(set(content) - set(_DESCRIPTION))
    wrong = [key for key, value in content.items() if not isinstance(value, str) and key != "stop_str"]
    if missing or unknown or wrong:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown key {unknown[0]!r}" if unknown else ""
        raise ChatTemplateError(
            f"{path} has no Jinja template under the key 'chat_template', and as the description of a conversation it "
            f"{what or f'must have a string under {wrong[0]!r}'}; keys: {', '.join(_DESCRIPTION)}",
            "chat_template",
        )
    stop = content["stop_str"]
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(item, str) for item in stop)):
        raise ChatTemplateError(f"{path}: stop_str must be a string or a list of strings", "chat_template")
    style = content["sep_style"].upper()
    if style not in SeparatorStyle.__members__:
        known = ", ".join(SeparatorStyle.__members__)
        raise ChatTemplateError(f"{path}: unknown sep_style {content['sep_style']!r}; have {known}", "chat_template")
    system = content["system"]
    optional = {key: content[key] for key, is_needed in _DESCRIPTION.items() if not is_needed and key in content}
    try:
        return Conversation(
            name=content["name"],
            system_template=system if "{system_message}" in system else system + "\n{system_message}",
            roles=(content["user"], content["assistant"]),
            sep_style=SeparatorStyle[style],
            stop_str=stop,
            **optional,
        )
    except ValueError as error:
        raise ChatTemplateError(f"{path}: {error}", "chat_template") from error


def _built_in_match(model_path: str) -> str | None:
    matches = (name for pattern, name in FORMAT_OF_NAME if re.search(pattern, model_path, re.IGNORECASE))
    return next(matches, None)
