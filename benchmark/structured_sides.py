"""The engines of structured_peers.py, each in a process of its own, in its own environment.

    python -m benchmark.structured_sides SIDE CHECKPOINT TOKENIZER REQUESTS ROUNDS

Prints one line of JSON: what was measured. Whatever engines print goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

NUM_ITEMS = 12  # of the array that each request fills
FIRST_TOKENS = 5  # times that each time to a first token is measured
PROMPT_LEN = 64
MOST_TOKENS = 1024
Schema = dict[str, Any]


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
    def generate(self, prompts: list[list[int]], lengths: list[int] | None, form: Schema | None) -> list[list[int]]:
        """Return the ids of the answers, drawn at temperature 1 with seeds 0, 1, ...

        Args:
            lengths: of each answer, which no end of text ends; None: as long as the form, or the most tokens, have it.
        """
        ...


class Ours:
    def __init__(self, backend: str, checkpoint: str, tokenizer: str) -> None:
        from rtp_llm import Engine

        self._engine: Any = Engine(
            model_path=checkpoint, tokenizer_path=tokenizer, dtype="bfloat16", device="cpu", grammar_backend=backend
        )

    def generate(self, prompts: list[list[int]], lengths: list[int] | None, form: Schema | None) -> list[list[int]]:
        self._engine.flush_cache()
        bound = {"structured_outputs": {"json": form, "disable_any_whitespace": True}} if form is not None else {}
        params = [
            {"max_new_tokens": MOST_TOKENS if lengths is None else lengths[i], "seed": i, "temperature": 1.0}
            | bound
            | ({} if lengths is None else {"ignore_eos": form is None})
            for i in range(len(prompts))
        ]
        return [result["output_ids"] for result in self._engine.generate(input_ids=prompts, sampling_params=params)]


class Vllm:
    def __init__(self, backend: str, checkpoint: str, tokenizer: str) -> None:
        from vllm import LLM

        self._llm: Any = LLM(
            checkpoint,
            tokenizer=tokenizer,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_model_len=2048,
            max_num_seqs=64,
            structured_outputs_config={
                "backend": backend,
                "disable_any_whitespace": backend in ("xgrammar", "guidance"),
            },
        )

    def generate(self, prompts: list[list[int]], lengths: list[int] | None, form: Schema | None) -> list[list[int]]:
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
        return [list(result.outputs[0].token_ids) for result in self._llm.generate(asked, params, use_tqdm=False)]


def main(argv: Sequence[str]) -> None:
    side, checkpoint, tokenizer, num_requests, num_rounds = argv
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, _, backend = side.partition(":")
    engine: Engine = (Ours if name == "ours" else Vllm)(backend, checkpoint, tokenizer)
    print(json.dumps(measured(engine, int(num_requests), int(num_rounds))), file=answers)
    answers.flush()
    os._exit(0)  # engines' threads need not end


def measured(engine: Engine, num_requests: int, num_rounds: int) -> dict[str, Any]:
    timed(engine, prompts(1, 99), [8], None)  # what is compiled or loaded at the first request
    first_form_s = timed(engine, prompts(1, 98), None, schema(1))[0]
    rounds = []
    for round_ in range(num_rounds):
        asked = prompts(num_requests, round_)
        bound_s, texts = timed(engine, asked, None, schema())
        lengths = [len(ids) for ids in texts]
        free_s, _ = timed(engine, asked, lengths, None)
        rounds.append({"tokens": sum(lengths), "bound_s": bound_s, "free_s": free_s})
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
) -> tuple[float, list[list[int]]]:
    start_s = time.perf_counter()
    ids = engine.generate(asked, lengths, form)
    seconds = time.perf_counter() - start_s
    assert lengths is None or [len(each) for each in ids] == lengths, "an answer has another length"
    return seconds, ids


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(sys.argv[1:])
