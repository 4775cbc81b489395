"""Checks of a conversation's messages, which separate text and media.

A message's content is a string or a list of parts. Media come in OpenAI's parts (``image_url``, ``video_url``) or in
those of transformers (``image``, ``video``); they are fetched and decoded elsewhere (``multimodal.media``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

Message = Mapping[str, Any]

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
SPEAKS_WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
VIDEO_OPTIONS = ("fps", "max_frames", "min_frames")
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of a message
MAX_ALL_PARTS = 16_384  # of all messages
MAX_ROLES = 16  # each new one costs a few renderings of the template
DETAILS = ("auto", "low", "high")
KINDS = {"image": ("an image", "images"), "video": ("a video", "videos"), "audio": ("audio", "audio")}
KIND_OF_TYPE = {
    "image_url": "image",
    "image": "image",
    "video_url": "video",
    "video": "video",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
}


class ChatTemplateError(InvalidRequest):
    """Messages that a template does not take, or a template that does not work. ``param``: the wrong field."""


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image, video or sound in a message's content.

    Args:
        kind: one of KINDS.
        source: URL, ``data:`` URI, path, base64 text, bytes, or an image itself.
        detail: one of DETAILS.
        options: a video's fields of VIDEO_OPTIONS.
        where: its place, for error messages, such as ``messages[2].content[1]``.
    """

    kind: str
    source: Any
    detail: str
    where: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def described_source(self) -> Any:
        """Return the source with its detail and options, in the form that ``multimodal.media`` takes."""
        asked = dict(self.options) | ({"detail": "low"} if self.detail == "low" else {})
        return {"url": self.source, **asked} if asked else self.source


@dataclass(frozen=True, slots=True)
class MediaRules:
    """The media that a request may hold.

    Args:
        kinds: those of KINDS that the model takes.
        limits: how many of a kind a request may have; kinds not named: any number.
    """

    kinds: frozenset[str] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)

    def check_kind(self, kind: str, where: str) -> None:
        """Raise ChatTemplateError if the model does not take this kind."""
        if kind not in self.kinds:
            taken = ["text", *(KINDS[name][1] for name in KINDS if name in self.kinds)]
            takes = f"{', '.join(taken[:-1])} and {taken[-1]}" if self.kinds else "text only"
            raise ChatTemplateError(f"{where} is {KINDS[kind][0]}, and this model takes {takes}", "messages")

    def check_numbers(self, messages: Sequence[Message]) -> None:
        """Raise ChatTemplateError if checked messages hold more of a kind than allowed."""
        counts = dict.fromkeys(KINDS, 0)
        for part in media_of(messages):
            counts[part.kind] += 1
            limit = self.limits.get(part.kind)
            if limit is not None and counts[part.kind] > limit:
                total = sum(other.kind == part.kind for other in media_of(messages))
                raise ChatTemplateError(
                    f"{part.where}: the messages hold {total} {KINDS[part.kind][1]}, and this server takes at most "
                    f"{limit} in a request (--limit-mm-data-per-request)",
                    "messages",
                )


TEXT_ONLY = MediaRules()
ALL_MEDIA = MediaRules(frozenset(KINDS))


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A prompt rendered from messages.

    Args:
        text: the prompt, with a placeholder for each of the media.
        image_data: sources of the images, in the order of their placeholders.
        video_data: sources of the videos, likewise.
        add_special_tokens: whether the tokenizer adds its own around the text.
        stop: strings that end the assistant's turn, beside the model's own end tokens.
        stop_token_ids: ids that end it.
    """

    text: str
    image_data: list[Any] = field(default_factory=list)
    video_data: list[Any] = field(default_factory=list)
    add_special_tokens: bool = False
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)

    @property
    def has_media(self) -> bool:
        return bool(self.image_data or self.video_data)


def media_of(messages: Sequence[Message]) -> Iterator[MediaPart]:
    """Yield the media of checked messages, in order."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, MediaPart))


def sources_of(messages: Sequence[Message], kind: str) -> list[Any]:
    return [part.described_source for part in media_of(messages) if part.kind == kind]


def checked_messages(messages: Any, media: MediaRules = TEXT_ONLY) -> list[dict[str, Any]]:
    """Return copies of the messages, without fields that are None, and with media parts as MediaPart.

    Raises:
        ChatTemplateError: a message or part is wrong; it says which, and how.
    """
    if not isinstance(messages, (list, tuple)):
        raise ChatTemplateError(f"messages must be a list, not {type(messages).__name__}", "messages")
    if not messages:
        raise ChatTemplateError("messages is empty: there must be at least one", "messages")
    if len(messages) > MAX_MESSAGES:
        raise ChatTemplateError(f"there are {len(messages)} messages; at most {MAX_MESSAGES} are taken", "messages")
    num_parts = sum(_num_parts(message) for message in messages)
    if num_parts > MAX_ALL_PARTS:
        raise ChatTemplateError(
            f"the messages have {num_parts} parts in all; at most {MAX_ALL_PARTS} are taken", "messages"
        )
    checked = [_checked_message(f"messages[{i}]", message, media) for i, message in enumerate(messages)]
    roles = {message["role"] for message in checked}
    if len(roles) > MAX_ROLES:
        raise ChatTemplateError(f"the messages have {len(roles)} roles; at most {MAX_ROLES} are taken", "messages")
    media.check_numbers(checked)
    return checked


def _num_parts(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    return len(content) if isinstance(content, (list, tuple)) else 0


def _checked_message(where: str, message: Any, media: MediaRules) -> dict[str, Any]:
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
    if isinstance(content, (list, tuple)) and not content:
        content = ""
    if content is not None and not isinstance(content, str):
        content = _checked_parts(f"{where}.content", content, media)
    return {name: value for name, value in {**message, "content": content}.items() if value is not None}


def _checked_parts(where: str, parts: Any, media: MediaRules) -> list[dict[str, str] | MediaPart]:
    if not isinstance(parts, (list, tuple)):
        raise ChatTemplateError(f"{where} must be a string or a list of parts, not {_short(parts)}", "messages")
    if len(parts) > MAX_PARTS:
        raise ChatTemplateError(f"{where} has {len(parts)} parts; at most {MAX_PARTS} are taken", "messages")
    return [_checked_part(f"{where}[{i}]", part, media) for i, part in enumerate(parts)]


def _checked_part(where: str, part: Any, media: MediaRules) -> dict[str, str] | MediaPart:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ChatTemplateError(
            f'{where} must be an object such as {{"type": "text", "text": "..."}}, not {_short(part)}', "messages"
        )
    kind = KIND_OF_TYPE.get(part["type"])
    if kind is not None:
        media.check_kind(kind, where)
        return _checked_media(where, kind, {name: value for name, value in part.items() if value is not None})
    if part["type"] != "text":
        raise ChatTemplateError(
            f"{where} has type {part['type'][:40]!r}, which is not supported; known: text, image_url, video_url, "
            "image, video",
            "messages",
        )
    if not isinstance(part.get("text"), str):
        raise ChatTemplateError(f"{where}.text must be a string, not {_short(part.get('text'))}", "messages")
    _check_names(where, part, {"type", "text"}, "a text part has only text")
    return dict(part)


def _checked_media(where: str, kind: str, part: Mapping[str, Any]) -> MediaPart:
    """Check ``{"type": "image_url", "image_url": URL or {"url", "detail"}}``, or ``{"type": "image", ...}`` with one
    of ``url``, ``path``, ``base64`` and ``image``; videos and sounds likewise."""
    name = part["type"]
    if name != kind:  # image_url, video_url, audio_url, input_audio
        holder = part.get(name)
        _check_names(where, part, {"type", name}, f"such a part has only {name}")
        if not isinstance(holder, Mapping):
            return MediaPart(kind, _source(f"{where}.{name}", holder), "auto", where)
        known = {"url", *{"image": ("detail",), "video": VIDEO_OPTIONS}.get(kind, ())}
        _check_names(f"{where}.{name}", holder, known, f"it may have {' and '.join(sorted(known, reverse=True))}")
        detail = holder.get("detail") or "auto"
        if detail not in DETAILS:
            raise ChatTemplateError(
                f"{where}.{name}.detail must be one of {', '.join(DETAILS)}, not {_short(detail)}", "messages"
            )
        options = {key: holder[key] for key in VIDEO_OPTIONS if holder.get(key) is not None}
        return MediaPart(kind, _source(f"{where}.{name}.url", holder.get("url")), detail, where, options)
    names = (kind, "url", "path", "base64")
    _check_names(where, part, {"type", *names}, f"such a part has one of {', '.join(names)}")
    given = [name for name in names if name in part]
    if len(given) != 1:
        raise ChatTemplateError(
            f"{where} must have one of {', '.join(names)}, and has {' and '.join(given) or 'none'}", "messages"
        )
    return MediaPart(kind, _source(f"{where}.{given[0]}", part[given[0]]), "auto", where)


def _source(where: str, value: Any) -> Any:
    """Check a source: a string or, from callers in this process, bytes or an image; no other JSON value."""
    if isinstance(value, str) and value.strip():
        return value
    if value is None or isinstance(value, (str, bool, int, float, list, tuple, Mapping)):
        raise ChatTemplateError(f"{where} must be a URL or data: URI, not {_short(value)}", "messages")
    return value


def _check_names(where: str, part: Mapping[str, Any], known: set[str], hint: str) -> None:
    if unknown := sorted(set(map(str, part)) - known):
        raise ChatTemplateError(f"{where} has the unknown field {unknown[0]!r}; {hint}", "messages")


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
