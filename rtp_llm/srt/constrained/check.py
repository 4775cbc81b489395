"""What the client's side checks of a grammar before its request reaches the core."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rtp_llm.srt.configs.grammar_backends import LLGUIDANCE, XGRAMMAR
from rtp_llm.srt.constrained.backend import GrammarError
from rtp_llm.srt.constrained.spec import asked_grammar
from rtp_llm.srt.constrained.xgrammar_schema import is_taken, kept_schema
from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

MAX_REMEMBERED = 64


def checked_grammar(
    params: SamplingParams, tokenizer: Any, around: str | None = None, backend: str = LLGUIDANCE
) -> GrammarSpec | None:
    """Return the grammar that parameters ask for; None: the text is free.

    Args:
        around: see GrammarSpec.
        backend: the compiler's name (``--grammar-backend``).

    Raises:
        InvalidRequest: it is wrong or cannot be honoured wholly, or there is no tokenizer to apply it to.
    """
    asked = asked_grammar(params)
    if asked is None:
        return None
    name, spec = asked[0], replace(asked[1], around=around)
    if tokenizer is None:
        raise InvalidRequest(f"{name} needs a tokenizer, and the engine runs without one", name)
    if error := _error(replace(spec, around=None)) or (_xgrammar_error(spec) if backend == XGRAMMAR else None):
        raise InvalidRequest(f"{name}: {error}", name)
    return spec


def check_arguments(schema: Mapping[str, Any]) -> None:
    """Raise GrammarError if arguments of calls cannot be held to a schema."""
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    if error := _error(GrammarSpec("json_schema", text)):
        raise GrammarError(error)


def _xgrammar_error(spec: GrammarSpec) -> str | None:
    try:
        if is_taken(spec) and spec.kind == "json_schema":
            kept_schema(spec)
    except GrammarError as error:
        return str(error)
    return None


@lru_cache(MAX_REMEMBERED)
def _error(spec: GrammarSpec) -> str | None:
    """Return what is wrong with a grammar, None if nothing is."""
    from rtp_llm.srt.constrained.llguidance_backend import check_grammar  # a library that most servers never need

    try:
        check_grammar(spec)
    except GrammarError as error:
        return str(error)
    return None
