"""Conversations in plain data: the text around a prompt's messages, and the published formats.

In the manner of FastChat (Zheng et al. 2023) and SGLang, whose names of styles and fields these are. The registry of
conversations is ``rtp_llm.srt.conversation``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, auto
from typing import Any, NamedTuple

WITHOUT_NEWLINE_AFTER_IMAGE = ("qwen2-vl", "moss-vl", "unlimited-ocr")


class SeparatorStyle(IntEnum):
    """The order of separators, role names and messages."""

    ADD_COLON_SINGLE = auto()
    ADD_COLON_TWO = auto()
    ADD_COLON_SPACE_SINGLE = auto()
    NO_COLON_SINGLE = auto()
    NO_COLON_TWO = auto()
    ADD_NEW_LINE_SINGLE = auto()
    LLAMA2 = auto()
    LLAMA3 = auto()
    CHATML = auto()
    GEMMA3 = auto()
    MPT = auto()


class _Layout(NamedTuple):
    """One style. ``{role}``, ``{sep}`` stand for what the conversation has there."""

    opening: str  # before a message
    begins: str  # before the answer to generate
    ends: str = "{sep}"  # after a message
    system_ends: str = "{sep}"
    has_two: bool = False  # the second role's messages end with sep2 instead
    joins: bool = False  # the system prompt has opened the first message already
    strips: bool = False


_LLAMA3_HEAD = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_LAYOUTS = {
    SeparatorStyle.ADD_COLON_SINGLE: _Layout("{role}: ", "{role}:"),
    SeparatorStyle.ADD_COLON_TWO: _Layout("{role}: ", "{role}:", has_two=True),
    SeparatorStyle.ADD_COLON_SPACE_SINGLE: _Layout("{role}: ", "{role}: "),
    SeparatorStyle.NO_COLON_SINGLE: _Layout("{role}", "{role}", system_ends=""),
    SeparatorStyle.NO_COLON_TWO: _Layout("{role}", "{role}", system_ends="", has_two=True),
    SeparatorStyle.ADD_NEW_LINE_SINGLE: _Layout("{role}\n", "{role}\n"),
    SeparatorStyle.LLAMA2: _Layout("{role} ", "{role}", system_ends="", has_two=True, joins=True),
    SeparatorStyle.LLAMA3: _Layout(_LLAMA3_HEAD, _LLAMA3_HEAD, "<|eot_id|>", system_ends="", strips=True),
    SeparatorStyle.CHATML: _Layout("{role}\n", "{role}\n", "{sep}\n", "{sep}\n"),
    SeparatorStyle.GEMMA3: _Layout("{role}", "{role}", system_ends="", joins=True, strips=True),
    SeparatorStyle.MPT: _Layout("{role}", "{role}"),
}


@dataclass(frozen=True, slots=True)
class ImageData:
    """An image as a message names it."""

    url: Any
    detail: str = "auto"


@dataclass
class Conversation:
    """A prompt format, and the messages so far.

    Args:
        system_template: text around the system message; left out if there is none.
        system_message: the default.
        roles: names of the user and the assistant, as the style writes them.
        messages: ``[role, text]``; text None: the answer to generate.
        offset: how many of the messages are examples that belong to the template.
        sep, sep2: separators; their use depends on the style.
        stop_str: one string or several that end the assistant's turn.
        image_token, video_token, audio_token: placeholders that the model's processor knows.
        image_token_at_prefix: placeholders come before the message's text, wherever they stood.
        newline_after_image: a new line follows each placeholder; None: except in WITHOUT_NEWLINE_AFTER_IMAGE.
    """

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.ADD_COLON_SINGLE
    sep: str = "\n"
    sep2: str | None = None
    stop_str: str | Sequence[str] | None = None
    image_token: str = "<image>"
    video_token: str = "<video>"
    audio_token: str = "<audio>"
    image_data: list[ImageData] = field(default_factory=list)
    video_data: list[Any] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    stop_token_ids: Sequence[int] | None = None
    audio_data: list[Any] = field(default_factory=list)
    image_token_at_prefix: bool = False
    newline_after_image: bool | None = None

    def __post_init__(self) -> None:
        self.sep_style = SeparatorStyle(self.sep_style)
        self.messages = [list(message) for message in self.messages or ()]  # no list is shared; None is no messages
        for name in ("image_data", "video_data", "audio_data", "modalities"):
            setattr(self, name, list(getattr(self, name) or ()))
        if _LAYOUTS[self.sep_style].has_two and self.sep2 is None:
            raise ValueError(f"conversation {self.name!r}: {self.sep_style.name} needs sep2, which ends an answer")

    def get_prompt(self) -> str:
        """Return the text so far; it ends where the answer begins if the last message's text is None."""
        return "".join(self._pieces())

    def get_open_prompt(self) -> str:
        """Return the text so far, without the end of the last message, which will be continued."""
        return "".join(list(self._pieces())[:-1])

    def _pieces(self) -> Iterator[str]:
        """Yield the system prompt, then for each message its opening, its text, and its end."""
        layout = _LAYOUTS[self.sep_style]
        system = self._system_prompt()
        yield system + (layout.system_ends.format(sep=self.sep) if system else "")
        for i, (role, text) in enumerate(self.messages):
            if text is None:
                yield layout.begins.format(role=role)
                continue
            is_joined = layout.joins and system and i == 0 and role == self.roles[0]
            yield "" if is_joined else layout.opening.format(role=role)
            yield text.strip() if layout.strips else text
            yield layout.ends.format(sep=self.sep2 if layout.has_two and role == self.roles[1] else self.sep)

    def _system_prompt(self) -> str:
        if not self.system_message and "{system_message}" in self.system_template:
            return ""
        return self.system_template.replace("{system_message}", self.system_message)

    def set_system_message(self, system_message: str) -> None:
        self.system_message = system_message

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append([role, message])

    def append_image(self, url: Any, detail: str = "auto") -> None:
        self.image_data.append(ImageData(url, detail))

    def append_video(self, url: Any) -> None:
        self.video_data.append(url)

    def append_audio(self, url: Any) -> None:
        self.audio_data.append(url)

    def update_last_message(self, message: str) -> None:
        """Set the text of the last message, which was None so far."""
        self.messages[-1][1] = message

    def to_openai_api_messages(self) -> list[dict[str, str]]:
        """Return the messages, of roles system, user and assistant."""
        names = {self.roles[0]: "user", self.roles[1]: "assistant"}
        system = [{"role": "system", "content": self.system_message}] if self.system_message else []
        said = self.messages[self.offset :]
        return system + [{"role": names[role], "content": text} for role, text in said if text is not None]

    def copy(self) -> "Conversation":
        """Return an independent copy, with the messages but without the media."""
        return replace(self, image_data=[], video_data=[], audio_data=[], modalities=[])

    def dict(self) -> dict[str, Any]:
        return {
            "template_name": self.name,
            "system_message": self.system_message,
            "roles": self.roles,
            "messages": [list(message) for message in self.messages],
            "offset": self.offset,
        }

    def placeholder(self, kind: str) -> str:
        """Return the placeholder of a medium (``image``, ``video`` or ``audio``) in a message."""
        token = {"image": self.image_token, "video": self.video_token, "audio": self.audio_token}[kind]
        breaks = self.newline_after_image
        if breaks is None:
            breaks = self.name not in WITHOUT_NEWLINE_AFTER_IMAGE
        return token + ("\n" if breaks and kind != "audio" else "")


# Built in: the published formats of vision models, and the formats that they derive from

_CHATML_ROLES = ("<|im_start|>user", "<|im_start|>assistant")
_CHATML_SYSTEM = "<|im_start|>system\n{system_message}"
_HELPFUL = "You are a helpful assistant."
_LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n{system_message}<|eot_id|>"
_LLAMA3_STOP = ("<|end_of_text|>", "<|eot_id|>")

BUILT_IN = (
    Conversation(
        name="chatml",
        system_template=_CHATML_SYSTEM,
        system_message=_HELPFUL,
        roles=_CHATML_ROLES,
        sep_style=SeparatorStyle.CHATML,
        sep="<|im_end|>",
        stop_str=("<|endoftext|>", "<|im_end|>"),
    ),
    Conversation(  # LLaVA-OneVision, LLaVA-NeXT over Qwen
        name="chatml-llava",
        system_template=_CHATML_SYSTEM,
        system_message=_HELPFUL,
        roles=_CHATML_ROLES,
        sep_style=SeparatorStyle.CHATML,
        sep="<|im_end|>",
        stop_str=("<|endoftext|>", "<|im_end|>"),
    ),
    Conversation(  # Qwen2-VL, Qwen2.5-VL; Qwen3-VL has no system message of its own
        name="qwen2-vl",
        system_template=_CHATML_SYSTEM,
        system_message=_HELPFUL,
        roles=_CHATML_ROLES,
        sep_style=SeparatorStyle.ADD_NEW_LINE_SINGLE,
        sep="<|im_end|>\n",
        stop_str=("<|im_end|>",),
        image_token="<|vision_start|><|image_pad|><|vision_end|>",
        video_token="<|vision_start|><|video_pad|><|vision_end|>",
    ),
    Conversation(
        name="qwen3-vl",
        system_template=_CHATML_SYSTEM,
        roles=_CHATML_ROLES,
        sep_style=SeparatorStyle.ADD_NEW_LINE_SINGLE,
        sep="<|im_end|>\n",
        stop_str=("<|im_end|>",),
        image_token="<|vision_start|><|image_pad|><|vision_end|>",
        video_token="<|vision_start|><|video_pad|><|vision_end|>",
        newline_after_image=False,
    ),
    Conversation(
        name="internvl-2-5",
        system_template=_CHATML_SYSTEM,
        system_message="你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep_style=SeparatorStyle.MPT,
        sep="<|im_end|>\n",
        stop_str=("<|im_end|>", "<|action_end|>"),
        image_token="<IMG_CONTEXT>",
    ),
    Conversation(  # LLaVA 1.5: images before the text
        name="vicuna_v1.1",
        system_message="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        sep_style=SeparatorStyle.ADD_COLON_TWO,
        sep=" ",
        sep2="</s>",
        image_token_at_prefix=True,
    ),
    Conversation(
        name="llama-2",
        system_template="[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n",
        roles=("[INST]", "[/INST]"),
        sep_style=SeparatorStyle.LLAMA2,
        sep=" ",
        sep2=" </s><s>",
        stop_str=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    Conversation(  # Pixtral, Mistral Small 3.1 and later
        name="mistral",
        system_template="[SYSTEM_PROMPT]{system_message}[/SYSTEM_PROMPT]",
        roles=("[INST]", ""),
        sep_style=SeparatorStyle.NO_COLON_TWO,
        sep="[/INST]",
        sep2="</s>",
        stop_str=("[INST]", "[/INST]"),
        image_token="[IMG]",
        newline_after_image=False,
    ),
    Conversation(
        name="llama_3_vision",
        system_template=_LLAMA3_SYSTEM,
        roles=("user", "assistant"),
        sep_style=SeparatorStyle.LLAMA3,
        stop_str=_LLAMA3_STOP,
        image_token="<|image|>",
        newline_after_image=False,
    ),
    Conversation(
        name="llava_llama_3",
        system_template=_LLAMA3_SYSTEM,
        system_message="You are a helpful language and vision assistant. You are able to understand the visual content "
        "that the user provides, and assist the user with a variety of tasks using natural language.",
        roles=("user", "assistant"),
        sep_style=SeparatorStyle.LLAMA3,
        stop_str=_LLAMA3_STOP,
    ),
    Conversation(
        name="gemma-it",
        system_template="<start_of_turn>user\n{system_message}\n\n",
        roles=("<start_of_turn>user\n", "<start_of_turn>model\n"),
        sep_style=SeparatorStyle.GEMMA3,
        sep="<end_of_turn>\n",
        stop_str=("<end_of_turn>",),
        image_token="<start_of_image>",
        newline_after_image=False,
    ),
)

# Regular expressions on a model's name, and the built-in format of such models.
FORMAT_OF_NAME = (
    (r"internvl", "internvl-2-5"),
    (r"qwen3[._-]?vl", "qwen3-vl"),
    (r"qwen2(\.5)?[._-]?vl", "qwen2-vl"),
    (r"llava[._-]?onevision|llava.*qwen", "chatml-llava"),
    (r"llama.*3\.2.*vision", "llama_3_vision"),
    (r"llava.*llama-?3", "llava_llama_3"),
    (r"vicuna|llava-(v)?1\.5", "vicuna_v1.1"),
    (r"llama-2.*chat|codellama.*instruct", "llama-2"),
    (r"pixtral|(mistral|mixtral).*instruct", "mistral"),
    (r"gemma-?3", "gemma-it"),
)
