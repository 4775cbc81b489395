"""Fields that other servers know and this one does not support, and their neutral values.

Clients often send every field that they know, at its default. A neutral value changes nothing and is left out of the
body; any other value of such a field is an error that names it. Hints may be ignored: any value is accepted, and
logged once.
"""

import logging
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

logger = logging.getLogger(__name__)

strict_requests: ContextVar[bool] = ContextVar("strict_requests", default=False)  # of the request being read

ALWAYS: tuple[Any, ...] = (None, False, "", [], {}, "none")  # neutral in any field

# Fields of older forms of the API, and what says the same here.
INSTEAD = {
    "function_call": "give tool_choice",
    "functions": "give tools",
    "guided_choice": 'give structured_outputs: {"choice": [...]}',
    "guided_decoding_backend": "the server's --grammar-backend says which it is",
    "guided_grammar": 'give structured_outputs: {"grammar": ...}',
    "guided_json": 'give structured_outputs: {"json": ...}, or response_format',
    "guided_regex": 'give structured_outputs: {"regex": ...}',
    "guided_whitespace_pattern": 'give structured_outputs: {"json": ..., "whitespace_pattern": ...}',
}
HINTS = frozenset({"store", "service_tier", "verbosity", "prediction", "cache_control"})

# Name -> neutral values beside ALWAYS.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "custom_params": (),
    "detokenize": (True,),
    "early_stopping": (),
    "length_penalty": (1.0, 1),
    "logits_processors": (),
    "sampling_seed": (),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "stream_interval": (1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
}
_REQUEST: dict[str, tuple[Any, ...]] = {
    "background": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "conversation_id": (),
    "custom_labels": (),
    "custom_logit_processor": (),
    "data_parallel_rank": (),
    "extra_key": (),
    "input_embeds": (),
    "log_metrics": (True,),
    "lora_path": (),
    "modalities": (["text"],),
    "no_logs": (),
    "prompt_embeds": (),
    "require_reasoning": (),
    "return_bytes": (),
    "return_cached_tokens_details": (),
    "return_entropy": (),
    "return_hidden_states": (),
    "return_routed_experts": (),
    "routed_dp_rank": (),
    "session_params": (),
}
LLAMA_CPP: dict[str, tuple[Any, ...]] = {
    "adaptive_target": (-1,),
    "backend_sampling": (),
    "dry_allowed_length": (2,),
    "dry_base": (1.75,),
    "dry_multiplier": (0,),
    "dry_penalty_last_n": (-1, 0, 64),
    "dry_sequence_breakers": (["\n", ":", '"', "*"],),
    "dynatemp_exponent": (1,),
    "dynatemp_range": (0,),
    "grammar_lazy": (),
    "id_slot": (-1,),
    "lora": (),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_eta": (0.1,),
    "mirostat_tau": (5,),
    "n_cache_reuse": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "post_sampling_probs": (),
    "return_progress": (),
    "samplers": (),
    "sse_ping_interval": (-1,),
    "t_max_predict_ms": (-1, 0),
    "t_max_prompt_ms": (-1, 0),
    "timings_per_token": (),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "verbose": (),
    "xtc_probability": (0,),
    "xtc_threshold": (0.1,),
}
OPENAI = {
    **LLAMA_CPP,
    **_SAMPLING,
    **_REQUEST,
    "audio": (),
    "cache_prompt": (True,),
    "documents": (),
    "function_call": (),
    "functions": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "logprob_token_ids": (),
    "max_thinking_tokens": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "moderation": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "reasoning_format": ("auto",),
    "repetition_detection": (),
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "suffix": (),
    "thinking_budget": (),
    "thinking_token_budget": (),
    "tool_choice": ("auto",),
    "tools": (),
    "vllm_xargs": (),
    "web_search_options": (),
}
_OF_CHATS = (
    "include_reasoning",
    "max_thinking_tokens",
    "reasoning_effort",
    "separate_reasoning",
    "stream_reasoning",
    "thinking_budget",
    "thinking_token_budget",
    "tool_choice",
    "tools",
)
CHAT = {
    **{name: values for name, values in OPENAI.items() if name not in _OF_CHATS},
    "add_special_tokens": (),
    "best_of": (1,),
    "echo": (),
}
GENERATE = {**_REQUEST, "max_dynamic_patch": (), "min_dynamic_patch": (), "image_max_dynamic_patch": ()}
SAMPLING_PARAMS = _SAMPLING
TOKENIZE: dict[str, tuple[Any, ...]] = {
    "documents": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "return_token_strs": (),
    "tools": (),
}
MESSAGES: dict[str, tuple[Any, ...]] = {
    "billing_policy": (),
    "compaction": (),
    "container": (),
    "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "diagnostics": (),
    "fallback_credit_token": (),
    "fallbacks": (),
    "inference_geo": (),
    "mcp_servers": (),
    "output_format": (),
    "prefill": (),
    "speed": ("standard",),
}
OLLAMA_CHAT: dict[str, tuple[Any, ...]] = {"_debug_render_only": ()}
OLLAMA_GENERATE: dict[str, tuple[Any, ...]] = {
    **OLLAMA_CHAT,
    "height": (0,),
    "steps": (0,),
    "template": (),
    "width": (0,),
}
OLLAMA_OPTIONS: dict[str, tuple[Any, ...]] = {
    "embedding_only": (),
    "logits_all": (),
    "mirostat": (0,),
    "tfs_z": (1.0, 1),
    "typical_p": (1.0, 1),
    "vocab_only": (),
}
OLLAMA_SHOW: dict[str, tuple[Any, ...]] = {"options": (), "system": (), "template": ()}
RESPONSES: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background_options": (),
    "context_management": (),
    "conversation": (),
    "image": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "top_logprobs": (0,),
}
RESPONSES_ITEMS: dict[str, tuple[Any, ...]] = {
    "async": (),
    "caller": ({"type": "direct"},),
    "file_id": (),
    "namespace": (),
    "prompt_cache_breakpoint": (),
}
RESPONSES_REASONING: dict[str, tuple[Any, ...]] = {
    "context": ("auto",),
    "generate_summary": ("auto",),
    "mode": ("standard",),
}
RESPONSES_TOOL: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (),
    "defer_loading": (),
    "output_schema": (),
}
LLAMA_CPP_PROMPT: dict[str, tuple[Any, ...]] = {"multimodal_data": ()}

# With --strict-requests: neutral values beside null.
STRICT: dict[str, tuple[Any, ...]] = {
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

_logged: set[str] = set()


def without_neutral(
    values: Mapping[str, Any],
    unsupported: Mapping[str, tuple[Any, ...]],
    where: str = "",
    supported: Collection[str] = (),
) -> dict[str, Any]:
    """Return a JSON object without its neutral fields. With --strict-requests, only values in STRICT are neutral.

    Args:
        unsupported: name of an unsupported field -> its neutral values.
        where: prefix of a field's name in messages, such as ``sampling_params.``.
        supported: fields that are no hints here, though elsewhere they are.

    Raises:
        InvalidRequest: an unsupported field has another value. Unknown fields are kept.
    """
    strict = strict_requests.get()
    kept = {name: value for name, value in values.items() if value is not None}
    for name in list(kept):
        if name in supported or (name not in unsupported and name not in HINTS):
            continue
        value = kept[name]
        neutral = STRICT.get(name, ()) if strict else (*ALWAYS, *unsupported.get(name, ()))
        if not any(_same(value, other) for other in neutral):
            if name not in HINTS or strict:
                instead = f": {INSTEAD[name]}" if name in INSTEAD else " with this value"
                raise InvalidRequest(f"{where}{name} is not supported{instead}", name)
            _log_once(name)
        del kept[name]
    return kept


def _same(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; false is not 0, nor true 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _log_once(name: str) -> None:
    if name not in _logged:
        _logged.add(name)
        logger.info("requests set %s, which changes nothing here (said once)", name)
