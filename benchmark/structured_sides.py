"""The engines of structured_peers.py, each in a process of its own, in its own environment.

    python -m benchmark.structured_sides JOB

JOB is the JSON of a ``Job``. Prints one line of JSON: what was measured. Whatever engines print goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

NUM_ITEMS = 12  # of the array that each request fills
FIRST_TOKENS = 5  # times that each time to a first token is measured
PROMPT_LEN = 64
MOST_TOKENS = 1024
Schema = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one side does.

    Args:
        side: ``ours`` or ``vllm``, a colon, and the name of its grammar back end.
        requests: streams at once.
        rounds: turns of streams under a schema and free ones.
        quantization: of ours, as of the server.
    """

    side: str
    checkpoint: str
    tokenizer: str
    requests: int
    rounds: int
    threads: int
    quantization: str | None = None


class Answer(NamedTuple):
    ids: list[int]
    text: str


def schema(number: int = 0) -> Schema:
    """Return a schema of some 200 tokens of text; another one for each number."""
    item = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["small", "large", f"other {number}"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
            "known": {"type": "boolean"},
        },
        "required": ["name", "kind", "count", "known"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": NUM_ITEMS, "maxItems": NUM_ITEMS}


class Engine(Protocol):
    def generate(self, prompts: list[list[int]], lengths: list[int] | None, form: Schema | None) -> list[Answer]:
        """Return the answers, drawn at temperature 1 with seeds 0, 1, ...

        Args:
            lengths: of each answer, which no end of text ends; None: as long as the form, or the most tokens, have it.
        """
        ...


class Ours:
    def __init__(self, backend: str, job: Job) -> None:
        from rtp_llm import Engine

        self._engine: Any = Engine(
            model_path=job.checkpoint,
            tokenizer_path=job.tokenizer,
            quantization=job.quantization,
            dtype="bfloat16",
            device="cpu",
            cpu_threads=job.threads,
            grammar_backend=backend,
        )

    def generate(self, prompts: list[list[int]], lengths: list[int] | None, form: Schema | None) -> list[Answer]:
        self._engine.flush_cache()
        bound = {"structured_outputs": {"json": form, "disable_any_whitespace": True}} if form is not None else {}
        params = [
            {"max_new_tokens": MOST_TOKENS if lengths is None else lengths[i], "seed": i, "temperature": 1.0}
            | bound
            | ({} if lengths is None else {"ignore_eos": form is None})
            for i in range(len(prompts))
        ]
        results = self._engine.generate(input_ids=prompts, sampling_params=params)
        return [Answer(result["output_ids"], result["text"]) for result in results]


class Vllm:
    """Quantises no plain checkpoint for a CPU at load: weights are bfloat16."""

    def __init__(self, backend: str, job: Job) -> None:
        from vllm import LLM

        self._llm: Any = LLM(
            job.checkpoint,
            tokenizer=job.tokenizer,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_model_len=2048,
            max_num_seqs=64,
            structured_outputs_config={
                "backend": backend,
                "disable_any_whitespace": backend in ("xgrammar", "guidance"),
            },
        )

    def generate(self, prompts: list[list[int]], lengths: list[int] | None, form: Schema | None) -> list[Answer]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        params = [
            SamplingParams(
                temperature=1.0,
                seed=i,
                max_tokens=MOST_TOKENS if lengths is None else lengths[i],
                ignore_eos=lengths is not None and form is None,
                structured_outputs=None if form is None else StructuredOutputsParams(json=form),
            )
            for i in range(len(prompts))
        ]
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = [result.outputs[0] for result in self._llm.generate(asked, params, use_tqdm=False)]
        return [Answer(list(output.token_ids), output.text) for output in outputs]


def main(argv: Sequence[str]) -> None:
    job = Job(**json.loads(argv[0]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, _, backend = job.side.partition(":")
    engine: Engine = (Ours if name == "ours" else Vllm)(backend, job)
    print(json.dumps(measured(engine, job.requests, job.rounds)), file=answers)
    answers.flush()
    os._exit(0)  # engines' threads need not end


def measured(engine: Engine, num_requests: int, num_rounds: int) -> dict[str, Any]:
    timed(engine, prompts(1, 99), [8], None)  # what is compiled or loaded at the first request
    first_form_s = timed(engine, prompts(1, 98), None, schema(1))[0]
    rounds = []
    for round_ in range(num_rounds):
        asked = prompts(num_requests, round_)
        bound_s, bound = timed(engine, asked, None, schema())
        lengths = [len(answer.ids) for answer in bound]
        free_s, _ = timed(engine, asked, lengths, None)
        num_right = sum(is_right(answer.text) for answer in bound)
        rounds.append({"tokens": sum(lengths), "bound_s": bound_s, "free_s": free_s, "right": num_right})
    forms = {"free": [None], "used before": [schema()], "new": [schema(100 + i) for i in range(FIRST_TOKENS)]}
    firsts = {
        name: [timed(engine, prompts(1, 50 + i), [1], given[i % len(given)])[0] for i in range(FIRST_TOKENS)]
        for name, given in forms.items()
    }
    return {"rounds": rounds, "first_token_s": firsts, "first_form_s": first_form_s}


def prompts(count: int, round_: int) -> list[list[int]]:
    return [[100 + round_, *range(200 + i, 199 + PROMPT_LEN + i)] for i in range(count)]


def timed(
    engine: Engine, asked: list[list[int]], lengths: list[int] | None, form: Schema | None
) -> tuple[float, list[Answer]]:
    start_s = time.perf_counter()
    answers = engine.generate(asked, lengths, form)
    seconds = time.perf_counter() - start_s
    assert lengths is None or [len(each.ids) for each in answers] == lengths, "an answer has another length"
    return seconds, answers


def is_right(text: str) -> bool:
    """Return whether a text is what ``schema()`` says. One that was cut at the most tokens is not."""
    try:
        items = json.loads(text)
    except ValueError:
        return False
    return isinstance(items, list) and len(items) == NUM_ITEMS and all(map(_is_item, items))


def _is_item(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"name", "kind", "count", "known"}
        and isinstance(item["name"], str)
        and len(item["name"]) <= 24
        and item["kind"] in ("small", "large", "other 0")
        and type(item["count"]) is int
        and 0 <= item["count"] <= 9999
        and type(item["known"]) is bool
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(sys.argv[1:])
