"""One response while it is being made: its object as of now, and the events of its stream."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from uuid import uuid4

from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer
from rtp_llm.srt.entrypoints.openai.responses.protocol import Item, ResponseObject, ResponsesRequest, ResponseUsage
from rtp_llm.srt.entrypoints.openai.responses.store import StoredResponse
from rtp_llm.srt.entrypoints.openai.responses.writer import OutputWriter, StreamEvent

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
STATUSES: dict[str, Status] = {"stop": "completed", "length": "incomplete", "abort": "cancelled"}  # by finish reasons
LAST_EVENTS = {"completed": "response.completed", "failed": "response.failed"}  # of others: response.incomplete


def new_response_id() -> str:
    return f"resp_{uuid4().hex}"


class RunningResponse:
    """A response that is being made.

    Args:
        items: all that it answers, those of the responses before included.
    """

    def __init__(
        self, response_id: str, body: ResponsesRequest, items: Sequence[Item], answer: ChatAnswer, model: str
    ) -> None:
        self.id = response_id
        self.items = items
        self.is_cancelled = False
        self.error: dict[str, str] | None = None
        self._body = body
        self._answer = answer
        self._model = model
        self._writer = OutputWriter()
        self._created_at = int(time.time())
        self._completed_at: int | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the request wants it to be stored."""
        return self._body.store is not False

    @property
    def status(self) -> Status:
        if self.error is not None:
            return "failed"
        if self.is_cancelled:
            return "cancelled"
        reason = self._answer.completion.finish_reason
        return "in_progress" if reason is None else STATUSES[reason.type]

    def begin(self) -> Iterator[StreamEvent]:
        """Yield the first events."""
        for kind in ("response.created", "response.in_progress"):
            yield {"type": kind, "response": self.snapshot()}

    def advance(self, text: str) -> Iterator[StreamEvent]:
        """Take the next part of the answer's text; yield its events, the last ones too once it has finished."""
        for event in self._answer.events(text):
            yield from self._writer.write(event)
        if self._answer.completion.finished:
            yield from self._end()

    def fail(self, message: str) -> Iterator[StreamEvent]:
        """Yield the events of an answer that cannot be completed."""
        self.error = {"code": "server_error", "message": message}
        yield from self._end()

    def _end(self) -> Iterator[StreamEvent]:
        self._completed_at = int(time.time())
        yield from self._writer.finish(is_complete=self.status == "completed")
        yield {"type": LAST_EVENTS.get(self.status, "response.incomplete"), "response": self.snapshot()}

    def stored(self) -> StoredResponse:
        return StoredResponse(self.snapshot(), self.items)

    def snapshot(self) -> ResponseObject:
        """Return the object as of now."""
        body, status = self._body, self.status
        params = self._answer.completion.request.spec.params
        text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {}
        reasoning = body.reasoning
        response: ResponseObject = {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": self._completed_at if status == "completed" else None,
            "status": status,
            "background": False,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self._writer.output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": self.is_kept,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": _shown_choice(body),
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
        }
        if body.user is not None:
            response["user"] = body.user
        return response

    def _usage(self) -> ResponseUsage:
        completion = self._answer.completion
        output_tokens = len(completion.output_ids)
        return {
            "input_tokens": completion.prompt_tokens,
            "input_tokens_details": {"cached_tokens": completion.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._answer.reasoning_tokens},
            "total_tokens": completion.prompt_tokens + output_tokens,
        }


def _shown_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    return "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump()
