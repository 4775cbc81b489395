"""What is asked of a chat's thinking: that it ends after so many tokens."""

from rtp_llm.srt.chat.messages import ChatPrompt
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.parser.choose import begins_thinking
from rtp_llm.srt.parser.formats import Format, Thinking
from rtp_llm.srt.request_spec import ThinkingSpec
from rtp_llm.srt.sampling_params import InvalidRequest

BUDGET = "thinking_budget"  # also the variable by which templates tell the model


def thinking_spec(serving: Serving, chat: ChatPrompt, budget: int | None, continued: str | None) -> ThinkingSpec | None:
    """Return what the core must know of an answer's thinking; None: nothing.

    Args:
        budget: the most tokens of it; None: any number.
        continued: see ``begins_thinking``.

    Raises:
        InvalidRequest: there is a budget, and the form of the model's thinking is not known.
    """
    if budget is None:
        return None
    form = serving.answer_format
    thinking = None if serving.response_template is not None else _thinking_of(form)
    if thinking is None:
        raise InvalidRequest(
            f"{BUDGET}: the form of this model's thinking is not known from its chat template: start the server with "
            "--reasoning-parser, or leave it out",
            BUDGET,
        )
    calls = form.calls.triggers if form.calls is not None and thinking.ends_at_call else ()
    return ThinkingSpec(
        open=thinking.open,
        close=thinking.close,
        others=calls,
        anywhere=thinking.anywhere,
        is_open=begins_thinking(form, chat.text, continued),
        budget=budget,
        end_ids=tuple(serving.manager.encode(thinking.end or thinking.close, add_special_tokens=False)),
    )


def may_think(serving: Serving) -> bool:
    """Return False if all that the model says is the answer itself, as far as is known."""
    return serving.response_template is not None or _thinking_of(serving.answer_format) is not None


def _thinking_of(form: Format) -> Thinking | None:
    channels = form.channels
    if channels is None:
        return form.thinking
    opening = f"{channels.channel}{channels.thinking[0]}{channels.message}"
    return Thinking(opening, channels.ends[0], anywhere=True)
