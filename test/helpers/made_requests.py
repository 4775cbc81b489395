"""Descriptions and requests for tests that talk to a part behind the edge, where they are made of a Prompt."""

from dataclasses import replace
from typing import Any

from rtp_llm.srt.messages import GenerateRequest
from rtp_llm.srt.request_spec import LogprobSpec, RequestSpec
from rtp_llm.srt.sampling_params import DEFAULT_MAX_NEW_TOKENS, SamplingParams

LOGPROBS = ("logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_text_in_logprobs")
BESIDE = ("output_ids", "num_prompt_logprobs")


def request_spec(params: SamplingParams | None = None, seed: int = 0, **options: Any) -> RequestSpec:
    """A description. ``options`` are fields of RequestSpec or, with ``return_logprob``, of LogprobSpec."""
    params = params or SamplingParams()
    if params.max_new_tokens is None:
        params = replace(params, max_new_tokens=DEFAULT_MAX_NEW_TOKENS)
    logprobs = LogprobSpec(**{name: options.pop(name) for name in LOGPROBS if name in options})
    return RequestSpec(params, seed, logprobs if options.pop("return_logprob", False) else None, **options)


def generate_request(
    rid: str, prompt_ids: list[int], params: SamplingParams | None = None, seed: int = 0, **options: Any
) -> GenerateRequest:
    """A request. ``options`` are further fields of it, or those of its description."""
    beside = {name: options.pop(name) for name in BESIDE if name in options}
    return GenerateRequest(rid, prompt_ids, request_spec(params, seed, **options), **beside)
