"""Parts that chat and text completions share."""

import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any
from uuid import uuid4

from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import CLIENT_CLOSED_REQUEST
from rtp_llm.srt.entrypoints.openai.logprobs import TokenTexts
from rtp_llm.srt.entrypoints.openai.protocol import FinishReason, GenerationBody, Usage
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.sampling_params import SamplingParams

# max_tokens and min_tokens have other names in SamplingParams
SAMPLING_FIELDS = tuple(item.name for item in fields(SamplingParams) if item.name in GenerationBody.model_fields)


class OpenAIEndpoint:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._token_texts: TokenTexts | None = None

    @property
    def token_texts(self) -> TokenTexts:
        if self._token_texts is None:
            self._token_texts = TokenTexts(self._serving.manager.tokenizer)
        return self._token_texts

    def _sampling_params(self, body: GenerationBody, max_tokens: int | None) -> SamplingParams:
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
        given |= {"ebnf": body.grammar} if body.grammar else {}
        lengths = {"max_new_tokens": max_tokens, "min_new_tokens": body.min_tokens}
        return SamplingParams.from_dict(self._serving.sampling_defaults | given | lengths)

    def _head(self, body: GenerationBody, prefix: str, kind: str) -> dict[str, Any]:
        """Return the fields that an answer and each of its chunks begin with."""
        return {
            "id": f"{prefix}-{body.rid or uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._serving.model_name,
            "system_fingerprint": self._serving.fingerprint,
        }


class StreamUsage:
    """The usage fields of a stream's chunks."""

    def __init__(
        self,
        body: GenerationBody,
        completions: Iterable[Completion],
        num_choices: int,
        reasoning_tokens: Callable[[], int] = int,
    ) -> None:
        options = body.stream_options
        self.at_end = options is not None and options.include_usage
        self.continuous = options is not None and options.continuous_usage_stats
        self._completions = list(completions)
        self._num_choices = num_choices
        self._reasoning_tokens = reasoning_tokens

    def chunk_fields(self) -> dict[str, Usage | None]:
        if self.continuous:
            return {"usage": self.current()}
        return {"usage": None} if self.at_end else {}

    def current(self) -> Usage:
        return usage(self._completions, self._num_choices, self._reasoning_tokens())


def usage(completions: list[Completion], num_choices: int, reasoning_tokens: int = 0) -> Usage:
    """Return the usage of a request. Each ``num_choices`` completions in a row share a prompt, counted once."""
    firsts = completions[::num_choices]
    prompt_tokens = sum(completion.prompt_tokens for completion in firsts)
    completion_tokens = sum(len(completion.output_ids) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(completion.cached_tokens for completion in firsts)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def finish_reason(completion: Completion) -> FinishReason | None:
    return None if completion.finish_reason is None else completion.finish_reason.type


def disconnected_response() -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
