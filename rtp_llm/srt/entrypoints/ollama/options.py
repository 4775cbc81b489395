"""From Ollama's ``options`` and ``format`` to sampling parameters, and to limits of the answer."""

from typing import Any

from rtp_llm.srt.entrypoints.ollama.protocol import AskingBody, Options
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

# Engine's name -> Ollama's, where they differ, and back for errors.
NAMES = {"repetition_penalty": "repeat_penalty", "json_schema": "format", "response_format": "format"}
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # and what none is
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", *PENALTIES)
RANDOM_SEED = -1
NO_OPTIONS = Options.model_validate({})


def sampling_params(serving: Serving, body: AskingBody) -> SamplingParams:
    """Return what a request asks for. Raise InvalidRequest for what cannot be done.

    What it leaves out is as the checkpoint's ``generation_config.json`` has it. The number of tokens is ``most_new``'s.
    """
    options = body.options or NO_OPTIONS
    check_context(serving, options)
    given = {name: getattr(options, NAMES.get(name, name)) for name in SAMPLING}
    if given["seed"] == RANDOM_SEED:
        given["seed"] = None
    given = serving.sampling_defaults | {name: value for name, value in given.items() if value is not None}
    given |= _penalties(options, given) | _form(body)
    return SamplingParams.from_dict(given)


def most_new(options: Options | None) -> int | None:
    """Return the most tokens of the answer; fewer are generated where the context ends. None: no limit beside that."""
    asked = None if options is None else options.num_predict
    return None if asked is None or asked < 0 else asked


def context_length(serving: Serving) -> int:
    """Return the most tokens that prompt and answer may have together."""
    return min(serving.manager.context_length, serving.manager.max_req_len)


def check_context(serving: Serving, options: Options) -> None:
    """Raise InvalidRequest if the options ask for a longer context than there is."""
    limit = context_length(serving)
    if options.num_ctx is not None and options.num_ctx > limit:
        raise InvalidRequest(
            f"options.num_ctx is {options.num_ctx}, and a request may have {limit} tokens here: ask for at most that, "
            "or start the server with more (--context-length, --max-total-tokens)",
            "options",
        )


def _penalties(options: Options, given: dict[str, Any]) -> dict[str, float]:
    """Return the penalties that take the place of those given: none, if they would look at no token."""
    last_n = options.repeat_last_n
    if last_n == 0:
        return PENALTIES
    if last_n not in (None, -1) and any(given.get(name, none) != none for name, none in PENALTIES.items()):
        raise InvalidRequest(
            f"options.repeat_last_n is {last_n}, and penalties look at all of the text here: give -1, or leave it out",
            "options",
        )
    if options.penalize_newline is False and given.get("repetition_penalty", 1.0) != 1.0:
        raise InvalidRequest(
            "options.penalize_newline=false is not supported with a repeat_penalty: leave it out", "options"
        )
    return {}


def _form(body: AskingBody) -> dict[str, Any]:
    if body.format is None:
        return {}
    return {"response_format": {"type": "json_object"}} if body.format == "json" else {"json_schema": body.format}
