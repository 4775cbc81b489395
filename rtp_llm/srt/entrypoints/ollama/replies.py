"""An answer in Ollama's form: the objects of its stream, or the one object that is all of it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer, read_arguments
from rtp_llm.srt.entrypoints.ollama.protocol import (
    AnsweredCall,
    AnswerMessage,
    Metrics,
    TokenLogprob,
)
from rtp_llm.srt.managers.detokenizer import Completion, Delta
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning
from rtp_llm.srt.plan import TokenLogprob as CoreLogprob

Fields = dict[str, Any]
Logprobs = Callable[[Sequence[CoreLogprob]], list[TokenLogprob]]
Layout = Callable[[AnswerMessage], Fields]


def chat_layout(message: AnswerMessage) -> Fields:
    return {"message": message}


def generate_layout(message: AnswerMessage) -> Fields:
    thinking: Fields = {"thinking": message["thinking"]} if "thinking" in message else {}
    return {"response": message["content"], **thinking}


def message_of(content: str = "", thinking: str = "", calls: Sequence[AnsweredCall] = ()) -> AnswerMessage:
    message: AnswerMessage = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = list(calls)
    return message


def timestamp(seconds: float | None = None) -> str:
    """Return a time in the form of RFC 3339. ``seconds``: since 1970; None: now."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


class MessageWriter:
    """Turns the events of one answer into messages, which together are the whole one. A call comes when it is
    complete."""

    def __init__(self) -> None:
        self._call: CallBegin | None = None
        self._arguments = ""

    def write(self, events: Iterable[Event]) -> Iterator[AnswerMessage]:
        for event in events:
            if isinstance(event, Content):
                yield message_of(content=event.text)
            elif isinstance(event, Reasoning):
                yield message_of(thinking=event.text)
            elif isinstance(event, CallBegin):
                self._call, self._arguments = event, ""
            elif isinstance(event, Arguments):
                self._arguments += event.text
            else:
                assert isinstance(event, CallEnd)  # the last kind
                yield from self.close()

    def close(self) -> Iterator[AnswerMessage]:
        """Yield the call that is open, if one is: if the text has ended, what is complete of it."""
        call, self._call = self._call, None
        if call is not None:
            arguments = read_arguments(self._arguments)
            yield message_of(
                calls=[{"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": arguments}}]
            )


class Reply:
    """One answer.

    Args:
        model: its name, as the request has it.
        started_s: when the request came, by ``time.perf_counter``. The answer must have been submitted just now.
        logprobs: turns those of tokens into Ollama's; None: they are not wanted.
        gives_context: the last object has the ids of prompt and answer.
    """

    def __init__(
        self,
        answer: ChatAnswer,
        model: str,
        layout: Layout,
        started_s: float,
        logprobs: Logprobs | None = None,
        gives_context: bool = False,
    ) -> None:
        self._answer = answer
        self._model = model
        self._layout = layout
        self._prepared_s = time.perf_counter() - started_s
        self._logprobs = logprobs
        self._gives_context = gives_context
        self._writer = MessageWriter()

    def parts(self, delta: Delta) -> Iterator[Fields]:
        """Yield what the next part of the text says; once the completion has finished, also what is left to say."""
        messages = list(self._writer.write(self._answer.events(delta.text)))
        if self._answer.completion.finished:
            messages += self._writer.close()
        logprobs = self._logprobs(delta.logprobs) if self._logprobs is not None else []
        if logprobs and not messages:
            messages = [message_of()]
        for message in messages:
            yield self._object(message, {"done": False} | ({"logprobs": logprobs} if logprobs else {}))
            logprobs = []

    def end(self) -> Fields:
        """Return the last object of a stream."""
        return self._object(message_of(), self._end_fields())

    def whole(self) -> Fields:
        """Return a finished answer as one object."""
        completion = self._answer.completion
        messages = [*self._writer.write(self._answer.events(completion.text)), *self._writer.close()]
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        content = "".join(message["content"] for message in messages)
        thinking = "".join(message.get("thinking", "") for message in messages)
        logprobs = {} if self._logprobs is None else {"logprobs": self._logprobs(completion.logprobs)}
        return self._object(message_of(content, thinking, calls), self._end_fields() | logprobs)

    def _object(self, message: AnswerMessage, fields: Fields) -> Fields:
        return {"model": self._model, "created_at": timestamp(), **self._layout(message), **fields}

    def _end_fields(self) -> Fields:
        completion = self._answer.completion
        context = [*completion.request.prompt_ids, *completion.output_ids]
        return {
            "done": True,
            "done_reason": done_reason(completion),
            **({"context": context} if self._gives_context else {}),
            **metrics(completion, self._prepared_s),
        }


def done_reason(completion: Completion) -> str:
    """Return why a finished answer ended; what was aborted has been cut."""
    reason = completion.finish_reason
    return "stop" if reason is not None and reason.type == "stop" else "length"


def metrics(completion: Completion, prepared_s: float) -> Metrics:
    """Return counts and durations of a finished answer. ``prepared_s``: seconds before it was submitted."""
    prompt_s, output_s = completion.prompt_time_s, completion.output_time_s
    return {
        "total_duration": _nanoseconds(prepared_s + completion.latency_s),
        "load_duration": _nanoseconds(prepared_s + completion.latency_s - prompt_s - output_s),
        "prompt_eval_count": completion.prompt_tokens,
        "prompt_eval_cached_count": completion.cached_tokens,
        "prompt_eval_duration": _nanoseconds(prompt_s),
        "eval_count": len(completion.output_ids),
        "eval_duration": _nanoseconds(output_s),
    }


def _nanoseconds(seconds: float) -> int:
    """Return at least 1: clients divide by it."""
    return max(round(seconds * 1e9), 1)
