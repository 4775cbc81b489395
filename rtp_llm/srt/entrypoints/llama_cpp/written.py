"""A completion in llama.cpp's form, as a whole and in parts."""

from collections.abc import Sequence
from typing import Any, Literal, cast

from rtp_llm.srt.entrypoints.llama_cpp.protocol import CompletionOptions, LlamaCompletion, Timings, TokenProbability
from rtp_llm.srt.entrypoints.llama_cpp.settings import generation_settings
from rtp_llm.srt.entrypoints.openai.logprobs import LOWEST, TokenTexts
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.managers.detokenizer import Completion, Delta
from rtp_llm.srt.plan import TokenLogprob


class CompletionWriter:
    """Writes one completion of a call.

    Args:
        index: of the completion in its call.
    """

    def __init__(
        self, serving: Serving, body: CompletionOptions, index: int, completion: Completion, texts: TokenTexts
    ) -> None:
        self._serving = serving
        self._body = body
        self._index = index
        self._completion = completion
        self._texts = texts

    def part(self, delta: Delta) -> LlamaCompletion:
        """Return what is new in a stream."""
        part = self._head(delta.text, delta.token_ids, is_end=False)
        if self._body.n_probs:
            part["completion_probabilities"] = [self._probability(item) for item in delta.logprobs]
        return part

    def whole(self, text: str, ids: Sequence[int]) -> LlamaCompletion:
        """Return a finished completion with this text, which is empty at a stream's end."""
        completion = self._completion
        params, seed = completion.request.spec.params, completion.request.spec.seed
        stop_type, word = _stop(completion)
        answer: LlamaCompletion = {
            **self._head(text, list(ids) if self._body.return_tokens else [], is_end=True),
            "model": self._serving.model_name,
            "generation_settings": {
                **generation_settings(params, seed),
                "stream": bool(self._body.stream),
                "n_probs": self._body.n_probs or 0,
            },
            "prompt": self._serving.manager.decode(completion.request.prompt_ids, skip_special_tokens=False),
            "has_new_line": "\n" in completion.text,
            "truncated": stop_type == "limit" and self._is_full(),
            "stop_type": stop_type,
            "stopping_word": word,
            "tokens_cached": completion.cached_tokens,
            "timings": self._timings(),
        }
        if self._body.n_probs and not self._body.stream:
            answer["completion_probabilities"] = [self._probability(item) for item in completion.logprobs]
        names = self._body.response_fields
        if names and self._body.stream:
            names = ["stop", *names]  # by which a client knows the end
        return chosen_fields(answer, names)

    def _head(self, text: str, ids: list[int], is_end: bool) -> LlamaCompletion:
        return {
            "index": self._index,
            "content": text,
            "tokens": ids,
            "stop": is_end,
            "tokens_predicted": len(self._completion.output_ids),
            "tokens_evaluated": self._completion.prompt_tokens,
        }

    def _is_full(self) -> bool:
        num_tokens = self._completion.prompt_tokens + len(self._completion.output_ids)
        return num_tokens >= self._serving.manager.max_req_len

    def _probability(self, item: TokenLogprob) -> TokenProbability:
        top = item.top[: self._body.n_probs]
        return {
            **self._entry(item.token_id, item.logprob),
            "top_logprobs": [self._entry(token_id, logprob) for logprob, token_id in top],
        }

    def _entry(self, token_id: int, logprob: float) -> TokenProbability:
        text, utf8 = self._texts.text(token_id), self._texts.utf8(token_id)
        return {"id": token_id, "token": text, "bytes": utf8, "logprob": max(logprob, LOWEST)}

    def _timings(self) -> Timings:
        """Return the times of the prompt, until the first token, without waiting in the queue; and of the others."""
        completion = self._completion
        prompt_ms, predicted_ms = 1000 * completion.prompt_time_s, 1000 * completion.output_time_s
        prompt_n, predicted_n = completion.prompt_tokens - completion.cached_tokens, len(completion.output_ids)
        return {
            "cache_n": completion.cached_tokens,
            "prompt_n": prompt_n,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
            "prompt_per_second": _ratio(1000 * prompt_n, prompt_ms),
            "predicted_n": predicted_n,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": _ratio(predicted_ms, predicted_n),
            "predicted_per_second": _ratio(1000 * predicted_n, predicted_ms),
        }


def _ratio(value: float, by: float) -> float:
    return value / by if by else 0.0


def _stop(completion: Completion) -> tuple[Literal["eos", "limit", "word"], str]:
    """Return why a completion ended, and the word by which it did. An aborted one has been cut."""
    reason = completion.finish_reason
    if reason is None or reason.type != "stop":
        return "limit", ""
    return ("word", reason.matched) if isinstance(reason.matched, str) else ("eos", "")


def chosen_fields(answer: LlamaCompletion, names: Sequence[str] | None) -> LlamaCompletion:
    """Return an answer with these fields alone, as far as there are such; without names, all of them.

    ``a/b`` names the member b of the object a, and is also its name in what is returned.
    """
    if not names:
        return answer
    chosen: dict[str, Any] = {}
    for name in names:
        value: Any = answer
        for part in name.split("/"):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is not ...:
            chosen[name] = value
    return cast(LlamaCompletion, chosen)
