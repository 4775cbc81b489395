"""Options of a call beside its prompt and its sampling parameters: declared once, and checked.

The offline API takes these options as keywords, ``/generate`` as fields of its body, and OpenAI's endpoints those that
they know. Their values become part of a RequestSpec.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from inspect import Parameter, signature
from typing import Annotated, Any, TypedDict, TypeVar, get_args, get_type_hints
from uuid import uuid4

from rtp_llm.srt.request_spec import LogprobSpec
from rtp_llm.srt.sampling_params import InvalidRequest, check_vocabulary, token_ids

Function = TypeVar("Function", bound=Callable[..., Any])


class GenerateOptions(TypedDict, total=False):
    """Options of a call. Each is one value for all prompts, or a list of one for each. None: unset."""

    return_logprob: Annotated[
        bool | Sequence[bool] | None, "put log-probabilities of the output tokens into ``meta_info``"
    ]
    logprob_start_len: Annotated[
        int | Sequence[int] | None, "and those of the prompt's tokens from this position on; -1 or unset: none of them"
    ]
    top_logprobs_num: Annotated[int | Sequence[int] | None, "alternatives per position, best first"]
    token_ids_logprob: Annotated[
        Sequence[int] | Sequence[Sequence[int] | None] | None, "ids whose log-probability is wanted at every position"
    ]
    return_text_in_logprobs: Annotated[bool | Sequence[bool] | None, "entries carry their token's text"]
    rid: Annotated[str | Sequence[str] | None, "the request's name, unique among the running ones"]
    cache_salt: Annotated[str | Sequence[str] | None, "prompts share cached prefixes only with those of the same salt"]
    image_data: Annotated[
        Any,
        "what the prompt's image placeholders stand for, one or a list: paths, URLs, ``data:`` URIs, bytes or PIL "
        "images; for a list of prompts, a list of as many of these",
    ]
    video_data: Annotated[Any, "likewise, of videos"]
    audio_data: Annotated[Any, "likewise, of sounds"]
    priority: Annotated[
        int | Sequence[int] | None,
        'lower ones are scheduled earlier; other than 0 only with ``schedule_policy="priority"``',
    ]


OPTION_NAMES = tuple(GenerateOptions.__annotations__)
LISTS = ("token_ids_logprob",)  # a list of numbers is one value of these


def takes_options(function: Function) -> Function:
    """Decorate a function that ends in ``**options: Unpack[GenerateOptions]``: show each option in its signature, and
    in its docstring in place of the line about ``options``."""
    hints = get_type_hints(GenerateOptions, include_extras=True)
    shown = {name: get_args(hint) for name, hint in hints.items()}
    own = signature(function)
    parameters = [item for item in own.parameters.values() if item.kind is not Parameter.VAR_KEYWORD]
    parameters += [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=shown[name][0]) for name in shown]
    described: Any = function
    described.__signature__ = own.replace(parameters=parameters)
    lines = (function.__doc__ or "").splitlines(keepends=True)
    place = next((i for i, line in enumerate(lines) if line.lstrip().startswith("options:")), None)
    if place is not None:
        indent = lines[place][: lines[place].index("options:")]
        lines[place] = "".join(f"{indent}{name}: {text}.\n" for name, (_, text) in shown.items())
        described.__doc__ = "".join(lines)
    return function


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for a keyword that is not an option."""
    for name in options:
        if name not in OPTION_NAMES:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}; options are {list(OPTION_NAMES)}")


def per_prompt(name: str, option: Any, num_prompts: int) -> Sequence[Any]:
    """Return an option's value for each prompt: given as a list of as many, or one for all."""
    if not isinstance(option, (list, tuple)) or (
        name in LISTS and not any(item is None or isinstance(item, (list, tuple)) for item in option)
    ):
        if name == "rid" and option is not None:
            raise InvalidRequest(f"rid must be a list of {num_prompts} names for {num_prompts} prompts", "rid")
        return [option] * num_prompts
    if len(option) != num_prompts:
        raise InvalidRequest(f"{name} is a list of {len(option)} values for {num_prompts} prompts", name)
    return option


# Checks of one prompt's options; each raises InvalidRequest.


def logprob_spec(options: GenerateOptions, prompt_len: int, vocab_size: int, has_text: bool) -> LogprobSpec | None:
    """Return the log-probabilities to compute; None: none. ``has_text``: there is a tokenizer."""
    start = options.get("logprob_start_len")
    asked = LogprobSpec(
        logprob_start_len=-1 if start is None else _in_range("logprob_start_len", start, -1, prompt_len),
        top_logprobs_num=_in_range("top_logprobs_num", options.get("top_logprobs_num") or 0, 0, vocab_size),
        token_ids_logprob=tuple(token_ids("token_ids_logprob", options.get("token_ids_logprob") or [])),
        return_text_in_logprobs=_flag("return_text_in_logprobs", options.get("return_text_in_logprobs")),
    )
    check_vocabulary("token_ids_logprob", asked.token_ids_logprob, vocab_size)
    if asked.return_text_in_logprobs and not has_text:
        raise InvalidRequest(
            "texts of logprobs need a tokenizer, and the engine runs without one", "return_text_in_logprobs"
        )
    if _flag("return_logprob", options.get("return_logprob")):
        return asked
    for name, unset in asdict(LogprobSpec()).items():
        if getattr(asked, name) != unset:
            raise InvalidRequest(f"{name} is given, but no logprobs are asked for: set return_logprob", name)
    return None


def priority(options: GenerateOptions, takes_priorities: bool) -> int:
    """Return a request's priority. ``takes_priorities``: the scheduler uses them; otherwise only 0 is taken."""
    given = options.get("priority")
    number = 0 if given is None else _in_range("priority", given, -(2**63), 2**63 - 1)
    if number and not takes_priorities:
        raise InvalidRequest(
            f"priority is {number}, but requests are not scheduled by priority here: leave it out, or start with "
            "--schedule-policy priority",
            "priority",
        )
    return number


def cache_salt(options: GenerateOptions) -> str:
    return _string("cache_salt", options.get("cache_salt")) or ""


def rids(options: GenerateOptions, n: int) -> list[str]:
    """Return the ids of a prompt's ``n`` requests."""
    rid = _string("rid", options.get("rid"))
    if rid is None:
        return [uuid4().hex for _ in range(n)]
    if not rid:
        raise InvalidRequest("rid must not be empty", "rid")
    return [rid] if n == 1 else [f"{rid}-{i}" for i in range(n)]


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {type(value).__name__}", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} is not valid Unicode: character {error.start} is the lone surrogate {value[error.start]!a}", name
        ) from None


def _string(name: str, value: Any) -> str | None:
    if value is not None:
        check_text(name, value)
    return value


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {value!r}", name)
    return value is True


def _in_range(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, not {value!r}", name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, not {value}", name)
    return value
