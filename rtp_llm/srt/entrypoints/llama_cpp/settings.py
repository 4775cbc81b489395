"""Sampling parameters under llama.cpp's names."""

from typing import Any

from rtp_llm.srt.sampling_params import SamplingParams


def generation_settings(params: SamplingParams, seed: int | None) -> dict[str, Any]:
    """Return what a text is generated with.

    Args:
        seed: None: each request gets another one, which is -1 in llama.cpp.
    """
    most = -1 if params.max_new_tokens is None else params.max_new_tokens
    return {
        "seed": -1 if seed is None else seed,
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),  # 0: all
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repeat_last_n": -1,  # the whole text
        "repeat_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": params.stop,
        "max_tokens": most,
        "n_predict": most,
        "ignore_eos": params.ignore_eos,
        "logit_bias": [{"token": token_id, "bias": bias} for token_id, bias in params.logit_bias.items()],
        "grammar": params.ebnf or "",
    }
