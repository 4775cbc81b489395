"""/v1/responses: OpenAI's Responses API, a conversation of items, over the same answers as chat completions."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, event, unless_disconnected
from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer
from rtp_llm.srt.entrypoints.chat_request import ChatRequest, answers_to, encoded_chat, thinking_variables
from rtp_llm.srt.entrypoints.errors import ApiError, error_event
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import InputTokens
from rtp_llm.srt.entrypoints.openai.responses.items import Conversation, conversation_of, input_items
from rtp_llm.srt.entrypoints.openai.responses.protocol import (
    Item,
    NamedFunction,
    ResponsesRequest,
    SchemaFormat,
    check_includes,
)
from rtp_llm.srt.entrypoints.openai.responses.running import RunningResponse, new_response_id
from rtp_llm.srt.entrypoints.openai.responses.store import ResponseStore, StoredResponse
from rtp_llm.srt.entrypoints.openai.responses.writer import StreamEvent
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, request_names
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

# Names that errors have for fields -> the request's.
NAMES = {name: "input" for name in ("messages", "input_ids", "image_data", "video_data")}
NAMES |= {"max_new_tokens": "max_output_tokens", "response_format": "text"}
Includes = Annotated[list[str] | None, Query()]


class ResponsesEndpoint:
    def __init__(self, serving: Serving) -> None:
        args = serving.args
        self._serving = serving
        self._store = ResponseStore(args.max_stored_responses, args.max_stored_responses_mb * 2**20)
        self._running: dict[str, RunningResponse] = {}  # those that are streamed

    async def create(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation of items. Without ``max_output_tokens`` the answer may fill the context."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        with serving.admission(1, "input"):
            response_id = new_response_id()
            with request_names(NAMES):
                conversation, items = self._conversation(body)
                answer = await self._answer(body, conversation, response_id, request)
            if answer is None:
                return disconnected_response()
            call = serving.start([answer.completion])
        response = RunningResponse(response_id, body, items, answer, serving.model_name)
        if body.stream:
            return EventStream(call, self._events(call, response), end=b"")
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        check_not_failed([answer.completion])
        for _ in response.advance(answer.completion.text):
            pass
        self._keep(response)
        return JSON(response.snapshot())

    def _former_items(self, response_id: str | None) -> list[Item]:
        if response_id is None:
            return []
        stored = self._store.get(response_id)
        if stored is None:
            message = f"there is no response {response_id[:64]!a} to go on from: {self._what_is_kept(response_id)}"
            raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
        return stored.items

    async def _answer(
        self, body: ResponsesRequest, conversation: Conversation, response_id: str, request: Request
    ) -> ChatAnswer | None:
        asked = replace(self._chat_request(body, conversation), options={"rid": response_id})
        with conversation.named():
            answers = await answers_to(self._serving, asked, request.receive)
        return None if answers is None else answers[0]

    async def count_tokens(self, body: ResponsesRequest, request: Request) -> Response:
        """Return the number of tokens of the prompt that the same body would have in /v1/responses."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        with request_names(NAMES):
            conversation, _ = self._conversation(body)
            with conversation.named():
                counting = encoded_chat(serving, self._chat_request(body, conversation))
                prompt = await unless_disconnected(request.receive, counting)
        if prompt is None:
            return disconnected_response()
        return JSON(InputTokens(object="response.input_tokens", input_tokens=len(prompt.input_ids)))

    def _conversation(self, body: ResponsesRequest) -> tuple[Conversation, list[Item]]:
        """Return the conversation, and its items, those of the responses before included."""
        former = self._former_items(body.previous_response_id)
        items = [*former, *input_items(body, self._store.item)]
        return conversation_of(body.instructions, items, len(former)), items

    def _chat_request(self, body: ResponsesRequest, conversation: Conversation) -> ChatRequest:
        return ChatRequest(
            messages=conversation.messages,
            sampling_params=self._sampling_params(body),
            **body.tool_fields(),
            has_single_call=isinstance(body.tool_choice, NamedFunction) or body.parallel_tool_calls is False,
            variables=self._variables(body),
        )

    def _sampling_params(self, body: ResponsesRequest) -> SamplingParams:
        given = {"temperature": body.temperature, "top_p": body.top_p, "response_format": _response_format(body)}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams.from_dict(
            self._serving.sampling_defaults | given | {"max_new_tokens": body.max_output_tokens}
        )

    def _variables(self, body: ResponsesRequest) -> dict[str, Any]:
        effort = body.reasoning.effort if body.reasoning else None
        if effort is None:
            return {}
        variables = thinking_variables(self._serving.template, effort != "none", effort)
        if not variables and effort != "none":
            raise InvalidRequest("reasoning.effort: the model's chat template has no such setting", "reasoning")
        return variables

    async def _events(self, call: LiveCall, response: RunningResponse) -> AsyncGenerator[bytes, None]:
        """Yield the stream's events, numbered."""
        self._running[response.id] = response
        number = 0
        try:
            async for told in self._told(call, response):
                yield event({"type": told["type"], "sequence_number": number, **told}, told["type"])
                number += 1
        finally:
            del self._running[response.id]

    async def _told(self, call: LiveCall, response: RunningResponse) -> AsyncGenerator[StreamEvent, None]:
        async with error_event() as failure:
            for told in response.begin():
                yield told
            async for _, delta in call.deltas():
                check_not_failed(call.completions)
                news = list(response.advance(delta.text))
                if response.status != "in_progress":
                    self._keep(response)  # before the client can know that it has ended
                for told in news:
                    yield told
        if failure.error is not None:
            for told in response.fail(failure.error.message):
                yield told

    def _keep(self, response: RunningResponse) -> None:
        if response.is_kept:
            self._store.add(response.stored())

    async def retrieve(
        self,
        response_id: str,
        stream: bool | None = None,
        starting_after: int | None = None,
        include: Includes = None,
    ) -> Response:
        """Return a stored response, or one that is being streamed, as of now."""
        if stream or starting_after is not None:
            name = "stream" if stream else "starting_after"
            raise ApiError(
                400, f"{name} is not supported: events come only to the request that made the response", name
            )
        with request_names({}):
            check_includes(include or ())
        running = self._running.get(response_id)
        if running is not None and running.is_kept:
            return JSON(running.snapshot())
        return JSON(self._stored(response_id).response)

    async def delete(self, response_id: str) -> Response:
        """Forget a stored response. Later ones that went on from it keep its items."""
        if response_id in self._running:
            raise ApiError(400, "the response is still being made: cancel it first", "response_id")
        self._stored(response_id)
        self._store.delete(response_id)
        return JSON({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str) -> Response:
        """End a response that is being streamed: it keeps what it has said so far."""
        running = self._running.get(response_id)
        if running is None:
            status = self._stored(response_id).response["status"]
            raise ApiError(400, f"the response has ended, as {status}: there is nothing to cancel", "response_id")
        if running.status == "in_progress":
            running.is_cancelled = True
            self._serving.core.client.abort(response_id)
        return JSON(running.snapshot())

    async def input_items(
        self,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        include: Includes = None,
    ) -> Response:
        """Return the items that a response answered, those of the responses before it included."""
        with request_names({}):
            check_includes(include or ())
        running = self._running.get(response_id)
        items = running.items if running is not None and running.is_kept else self._stored(response_id).input
        ordered = list(items) if order == "asc" else list(reversed(items))
        page = _page_after(ordered, after)
        data = page[:limit]
        return JSON(
            {
                "object": "list",
                "data": data,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(page) > len(data),
            }
        )

    def _stored(self, response_id: str) -> StoredResponse:
        stored = self._store.get(response_id)
        if stored is None:
            message = f"there is no response {response_id[:64]!a} here: {self._what_is_kept(response_id)}"
            raise ApiError(404, message, "response_id", "response_not_found")
        return stored

    def _what_is_kept(self, response_id: str) -> str:
        if response_id in self._running:
            return "it is still being made"
        return (
            f"the last {self._store.max_responses} are kept, within {self._serving.args.max_stored_responses_mb} MiB "
            "(--max-stored-responses, --max-stored-responses-mb), and none with store: false"
        )


def _page_after(items: Sequence[Item], after: str | None) -> Sequence[Item]:
    if after is None:
        return items
    places = (i for i, item in enumerate(items) if item["id"] == after)
    i = next(places, None)
    if i is None:
        raise ApiError(400, f"after: there is no item {after[:64]!a}", "after")
    return items[i + 1 :]


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    """Return ``text.format`` in the form of chat completions."""
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if isinstance(form, SchemaFormat):
        return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}
    return {"type": "json_object"}
