"""From the core's token ids to the caller's result.

Ids are taken one by one, however they were grouped into messages: so the text, and where it stops, depend on the ids
alone.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rtp_llm.srt.managers.completion_text import CompletionText
from rtp_llm.srt.managers.incremental_text import Decoder
from rtp_llm.srt.messages import FinishReason, GenerateRequest, TokenOutput
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.request_spec import LogprobSpec


@dataclass(slots=True)
class Delta:
    """The new, certain part of a completion since its last delta. All deltas together are the whole."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]


class Completion:
    """The outputs of one request, and the result made of them.

    Feed it the core's messages with ``add`` until ``finished``. The core does not
    know of stop strings: when one ends the completion, the caller aborts the request, and later messages are ignored.
    The id by which the core stopped must come in the same message as the reason.

    Args:
        detokenizer: None: results have no text.
        tags: special tokens in these are part of the text even if special tokens are not: the text will be parsed.
    """

    def __init__(self, request: GenerateRequest, detokenizer: "Detokenizer | None", tags: tuple[str, ...] = ()) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._text = None if detokenizer is None else detokenizer.completion_text(request, tags)
        self._text_starts: list[int] = []  # of the ids in the text
        self._output_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._cached_tokens = 0
        self.prompt_tokens = len(request.prompt_ids)  # the core's count replaces it
        self._num_retractions = 0
        self._queue_time_s = 0.0
        self._start_s = time.perf_counter()
        self._first_s: float | None = None  # when the first token came, from _start_s on
        self._latency_s = 0.0
        self._num_taken_chars = 0
        self._num_taken_tokens = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text so far, without an end that may be the beginning of a stop string."""
        text = self._text
        return "" if text is None else text.text if self.finished else text.certain()

    @property
    def output_ids(self) -> Sequence[int]:
        return self._output_ids

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """Log-probabilities, one per output id, if requested."""
        return self._logprobs

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        """Log-probabilities of the prompt's tokens from ``logprob_start_len + 1`` on, as far as they came."""
        return self._prompt_logprobs

    @property
    def queue_time_s(self) -> float:
        """Seconds from arrival in the core to first admission."""
        return self._queue_time_s

    @property
    def latency_s(self) -> float:
        """Seconds from the completion's construction to its end; 0 before that."""
        return self._latency_s

    @property
    def output_time_s(self) -> float:
        """Seconds from the first token of a finished completion to its end."""
        return 0.0 if self._first_s is None else self._latency_s - self._first_s

    @property
    def prompt_time_s(self) -> float:
        """Seconds of a finished completion until its first token, or its end, without those in the core's queue."""
        return max(self._latency_s - self.output_time_s - self._queue_time_s, 0.0)

    @property
    def cached_tokens(self) -> int:
        return self._cached_tokens

    def take_delta(self) -> Delta:
        """Return what is new since the last call. Text, ids and logprobs that a stop string may cut are held back."""
        chars, tokens = self._num_taken_chars, self._num_taken_tokens
        text = self.text
        end = len(self._output_ids)
        if not self.finished and self._text is not None:
            end = self._text.num_certain_tokens
        self._num_taken_chars, self._num_taken_tokens = len(text), end
        return Delta(text[chars:], self._output_ids[tokens:end], self._logprobs[tokens:end])

    def add(self, output: TokenOutput) -> None:
        if self.finished:
            return
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        self.prompt_tokens = output.prompt_tokens or self.prompt_tokens
        self._num_retractions = max(self._num_retractions, output.num_retractions)
        self._queue_time_s = output.queue_time_s
        self._prompt_logprobs += output.prompt_logprobs
        if output.token_ids and self._first_s is None:
            self._first_s = time.perf_counter() - self._start_s
        self._output_ids += output.token_ids
        self._logprobs += output.logprobs
        reason = output.finish_reason
        if self._text is not None:
            reason = self._add_text(self._text, output) or reason
        if reason is not None:
            self.finish_reason = reason
            self._latency_s = time.perf_counter() - self._start_s

    def _add_text(self, text: CompletionText, output: TokenOutput) -> FinishReason | None:
        reason = output.finish_reason
        by_id = reason is not None and reason.type == "stop" and isinstance(reason.matched, int)
        for token_id in output.token_ids[:-1] if by_id else output.token_ids:
            self._text_starts.append(len(text.text))
            text.push(token_id)
            if text.matched is not None:
                return self._cut(text)
        if by_id:
            text.push_last(output.token_ids[-1])
        elif reason is not None:
            text.flush()
        return self._cut(text) if text.matched is not None else None

    def _cut(self, text: CompletionText) -> FinishReason:
        del self._output_ids[text.num_tokens :]
        del self._logprobs[text.num_tokens :]
        return FinishReason("stop", matched=text.matched)

    def num_tokens_within(self, spans: Sequence[tuple[int, int]]) -> int:
        """Return the number of ids that begin within parts ``[start, end)`` of the text, in order."""
        starts = self._text_starts[: len(self._output_ids)]
        return sum(bisect_left(starts, end) - bisect_left(starts, start) for start, end in spans)

    def result(self) -> dict[str, Any]:
        """Return the result so far in SGLang's form: ``{"text", "output_ids", "meta_info"}``.

        Texts of successive calls extend each other. Logprob entries are tuples ``(logprob, token id, text or None)``,
        present only if asked for; the first prompt entry has no logprob, and None in place of its alternatives.
        """
        return {
            "text": self.text,
            "output_ids": list(self._output_ids),
            "meta_info": self._meta_info(),
        }

    def _meta_info(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self.request.rid,
            "finish_reason": self.finish_reason and self.finish_reason.to_dict(),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self._output_ids),
            "cached_tokens": self._cached_tokens,
            "num_retractions": self._num_retractions,
        }
        if self.finished:
            meta["e2e_latency"] = self._latency_s
        if self.request.spec.logprobs is not None:
            meta |= self._logprob_lists(self.request.spec.logprobs)
        return meta

    def _logprob_lists(self, asked: LogprobSpec) -> dict[str, Any]:
        start_len = asked.logprob_start_len
        first = self.request.prompt_ids[start_len : start_len + 1] if start_len >= 0 else []
        lists: dict[str, Any] = {
            "input_token_logprobs": [self._entry(None, token_id) for token_id in first]
            + [self._entry(item.logprob, item.token_id) for item in self._prompt_logprobs],
            "output_token_logprobs": [self._entry(item.logprob, item.token_id) for item in self._logprobs],
        }
        if asked.top_logprobs_num:
            lists["input_top_logprobs"] = [None] * len(first) + [self._entries(i.top) for i in self._prompt_logprobs]
            lists["output_top_logprobs"] = [self._entries(item.top) for item in self._logprobs]
        if asked.token_ids_logprob:
            lists["input_token_ids_logprobs"] = [None] * len(first) + [
                self._entries(item.chosen) for item in self._prompt_logprobs
            ]
            lists["output_token_ids_logprobs"] = [self._entries(item.chosen) for item in self._logprobs]
        return lists

    def _entries(self, pairs: list[tuple[float, int]]) -> list[tuple[float | None, int, str | None]]:
        return [self._entry(logprob, token_id) for logprob, token_id in pairs]

    def _entry(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        asked = self.request.spec.logprobs
        if asked is not None and asked.return_text_in_logprobs and self._detokenizer is not None:
            return logprob, token_id, self._detokenizer.token_text(token_id)
        return logprob, token_id, None


class Detokenizer:
    """The tokenizer's decoders, with and without special tokens, which all requests share."""

    def __init__(self, tokenizer: Any) -> None:
        self._plain = Decoder(tokenizer, skip_special_tokens=True)
        self._with_special = Decoder(tokenizer, skip_special_tokens=False)
        self._with_tags = lru_cache(maxsize=8)(lambda tags: Decoder(tokenizer, skip_special_tokens=True, kept=tags))

    def completion_text(self, request: GenerateRequest, tags: tuple[str, ...] = ()) -> CompletionText:
        """``tags``: special tokens in these are not skipped."""
        skipping = self._with_tags(tags) if tags else self._plain
        shown = skipping if request.spec.params.skip_special_tokens else self._with_special
        return CompletionText(shown, self._with_special, request.prompt_ids, request.spec.params)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return (self._plain if skip_special_tokens else self._with_special)(ids)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token alone, for logprob entries."""
        return self._with_special([token_id])
