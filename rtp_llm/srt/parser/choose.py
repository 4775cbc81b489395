"""The choice of a model's format: by name, or by its chat template's text."""

from rtp_llm.srt.parser.formats import Channels, Format
from rtp_llm.srt.parser.tables import (
    CALLS_OF_TEMPLATE,
    REASONING_PARSERS,
    THINKING_OF_TEMPLATE,
    TOOL_CALL_PARSERS,
)


def choose_format(template: str, tool_call_parser: str | None = None, reasoning_parser: str | None = None) -> Format:
    """Return the format of a model's answers.

    Args:
        template: the text of its chat template, by which what is not named is found.
        tool_call_parser, reasoning_parser: names in the tables; ``none``: not looked for; None: by the template.
    """
    calls_name = tool_call_parser or find_name(template, CALLS_OF_TEMPLATE)
    thinking_name = reasoning_parser or find_name(template, THINKING_OF_TEMPLATE)
    calls = TOOL_CALL_PARSERS[calls_name]
    thinking = REASONING_PARSERS[thinking_name]
    if isinstance(calls, Channels) or thinking.channels is not None:
        return Format(channels=calls if isinstance(calls, Channels) else thinking.channels)
    return Format(thinking.thinking, calls, thinking.hidden)


def find_name(template: str, table: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    """Return the name in the first row of which all texts occur in the template; ``none`` if there is none."""
    return next((name for name, texts in table if all(text in template for text in texts)), "none")


def begins_thinking(form: Format, prompt: str, continued: str | None = None) -> bool:
    """Return whether an answer begins with thinking whose opening tag is not part of it.

    Args:
        prompt: the text before the answer.
        continued: the beginning of the answer, if the prompt ends with one.
    """
    thinking = form.thinking
    if thinking is None:
        return False
    if continued is not None:
        return continued.rfind(thinking.open) > continued.rfind(thinking.close)
    end = prompt.rstrip()
    return end.endswith(thinking.open.rstrip()) or (thinking.is_implied and not end.endswith(thinking.close))


def may_open_thinking(form: Format, prompt: str) -> bool:
    """Return whether an answer may begin with thinking, and the tag or the header that opens it.

    Args:
        prompt: the text before the answer.
    """
    if form.channels is not None:
        return True
    return form.thinking is not None and not prompt.rstrip().endswith(form.thinking.close.rstrip())
