"""How often a sampled text changes where nothing but last digits of its logits did.

    python benchmark/sampling_stability.py --model-path CHECKPOINT --temperature 0.7 1.5

A prompt is computed as a whole, found in the prefix cache, or computed together with the half of an answer (as after a
retraction, or the death of a core): the same numbers up to the order of their sums. For each seed the three texts are
compared.
"""

import argparse
from typing import Any

from rtp_llm import Engine
from rtp_llm.srt.configs.server_args import DEMO_MODEL

TEXT = "The sun rises in the east and sets in the west. Water boils at one hundred degrees. A week has seven days. "


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model-path", default=DEMO_MODEL)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--temperature", type=float, nargs="+", default=[0.7, 1.5])
    options.add_argument("--seeds", type=int, default=90)
    options.add_argument("--prompt-tokens", type=int, default=300)
    options.add_argument("--new-tokens", type=int, default=64)
    return options


def changed(engine: Engine, prompt_ids: list[int], params: dict[str, Any], salt: str) -> tuple[bool, bool]:
    """Whether the text differs with the prompt from the cache, and where its second half is computed anew."""

    def output_ids(ids: list[int], salt: str) -> list[int]:
        result = engine.generate(input_ids=ids, sampling_params=params, cache_salt=salt)
        assert isinstance(result, dict)
        return result["output_ids"]

    cold = output_ids(prompt_ids, salt)
    half = len(cold) // 2
    resumed = output_ids(prompt_ids + cold[:half], salt + "-resumed")
    return output_ids(prompt_ids, salt) != cold, resumed[: len(cold) - half] != cold[half:]


def main() -> None:
    args = parser().parse_args()
    with Engine(model_path=args.model_path, dtype=args.dtype) as engine:
        ids = engine.tokenizer_manager.encode(TEXT * (1 + args.prompt_tokens // 16))[: args.prompt_tokens]
        print(f"{len(ids)} prompt tokens, {args.new_tokens} new ones, {args.dtype}, {args.seeds} seeds")
        for temperature in args.temperature:
            params = {"temperature": temperature, "max_new_tokens": args.new_tokens, "ignore_eos": True}
            found = [
                changed(engine, ids, params | {"seed": seed}, f"{temperature}-{seed}") for seed in range(args.seeds)
            ]
            warm, resumed = (sum(column) for column in zip(*found, strict=True))
            print(f"temperature {temperature}: {warm} texts change with the cache, {resumed} when resumed")


if __name__ == "__main__":
    main()
