"""Which tools a model sees, and which of them it may or must call: what the dialects' choices have in common."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

from rtp_llm.srt.sampling_params import InvalidRequest

Tools = Sequence[Mapping[str, Any]]  # ``{"type": "function", "function": {"name", "parameters"}}`` each


class Choice(NamedTuple):
    """``mode``: the model may call, sees no tools, or must call; ``names``: of what it may call, None: of all."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None


class SaysChoice(Protocol):
    """A choice that is an object of a request."""

    def choice(self) -> Choice: ...


class ToolFields(TypedDict):
    """Fields of ChatRequest."""

    tools: Tools
    must_call: bool
    callable_names: frozenset[str] | None
    strict: frozenset[str]


def choice_of(said: Literal["auto", "none", "required"] | SaysChoice | None) -> Choice:
    """Return what a request's ``tool_choice`` says."""
    if said is None or isinstance(said, str):
        return Choice(said or "auto")
    return said.choice()


def check_choice(choice: Choice, tools: Tools, required: str = "required") -> None:
    """Raise InvalidRequest if what is chosen is not there. ``required``: how the dialect says so."""
    known = {tool["function"]["name"] for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise InvalidRequest(f"tool_choice names {name[:64]!r}, which is not in tools", "tool_choice")
    if choice.mode == "required" and not tools:
        raise InvalidRequest(f"tool_choice is {required!r}, but there are no tools", "tool_choice")


def tool_fields(choice: Choice, tools: Tools, strict: Iterable[str]) -> ToolFields:
    """Return what a checked choice means.

    Args:
        strict: names of the tools whose arguments must fit their schemas.
    """
    shown = [] if choice.mode == "none" else tools
    names = None if choice.names is None or not shown else frozenset(choice.names)
    return {
        "tools": shown,
        "must_call": choice.mode == "required",
        "callable_names": names,
        "strict": frozenset(strict) if shown else frozenset(),
    }
