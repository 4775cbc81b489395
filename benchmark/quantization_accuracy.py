"""What quantization costs in accuracy: perplexity of a model on its own text, and right answers of the demo model.

    python benchmark/quantization_accuracy.py --model-path stories260K-hf

The text is drawn from the model in bfloat16, at temperature 1 and from fixed seeds, so that it is text which that model
finds as probable as it says. Every scheme then scores the same tokens. Skills are those of
scripts/demo_training/skills.py, asked with held-out questions; an answer is right if all of it is.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from rtp_llm import Engine
from rtp_llm.srt.configs.server_args import DEMO_MODEL

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from demo_training import skills as demo_skills

SCHEMES = (None, "fp8", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity and skills of quantized models, beside those in bfloat16.")
    parser.add_argument("--model-path", required=True, help="checkpoint whose perplexity is measured, on its own text")
    parser.add_argument("--texts", type=int, default=32, help="texts to draw")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each")
    parser.add_argument("--questions", type=int, default=40, help="questions of each of the demo model's skills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--step-tokens",
        type=int,
        help="score one text after the other, so many tokens in a step; products of few rows may be computed otherwise",
    )
    args = parser.parse_args()
    texts = draw_texts(args.model_path, args.texts, args.tokens, args.seed)
    prompts, answers, images = ask_skills(args.questions, args.seed)
    rows = []
    for scheme in SCHEMES:
        rows.append(
            (
                scheme or "bfloat16",
                perplexity(args.model_path, scheme, texts, args.step_tokens),
                right(scheme, prompts, answers, images),
            )
        )
    print(f"{len(texts)} texts of {args.tokens} tokens; {len(prompts)} questions; seed {args.seed}")
    show(rows)


def draw_texts(model_path: str, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Ids, the first token of each text included."""
    with start(model_path, None) as engine:
        first = [engine.tokenizer.bos_token_id]
        params = [
            {"temperature": 1.0, "max_new_tokens": num_tokens, "ignore_eos": True, "seed": seed + i}
            for i in range(count)
        ]
        return [
            first + result["output_ids"]
            for result in engine.generate(input_ids=[first] * count, sampling_params=params)
        ]


def perplexity(model_path: str, scheme: str | None, texts: list[list[int]], step_tokens: int | None) -> float:
    """exp of the mean negative log-probability of all tokens but the first of each text."""
    one_by_one = {} if step_tokens is None else {"chunked_prefill_size": step_tokens, "max_running_requests": 1}
    with start(model_path, scheme, **one_by_one) as engine:
        results = engine.generate(
            input_ids=texts, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
    scores = [entry[0] for result in results for entry in result["meta_info"]["input_token_logprobs"] if entry[0]]
    return math.exp(-sum(scores) / len(scores))


def ask_skills(questions: int, seed: int) -> tuple[list[str], list[str], list[list[Image.Image]]]:
    """Prompts to the demo model, what is right, and the images of each prompt."""
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    prompts, answers, images = [], [], []
    for name in demo_skills.SKILLS:
        for _ in range(questions):
            turns = demo_skills.held_out_conversation(name, rng)
            messages = demo_skills.as_messages(turns)
            prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            answers.append(turns[-1].answered)
            images.append(demo_skills.images(turns))
    return prompts, answers, images


def right(scheme: str | None, prompts: list[str], answers: list[str], images: list[list[Image.Image]]) -> float:
    """The share of prompts that the demo model answers with exactly these words, greedily."""
    with start(DEMO_MODEL, scheme) as engine:
        results = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 96}, image_data=images)
    return sum(result["text"] == answer for result, answer in zip(results, answers, strict=True)) / len(answers)


def start(model_path: str, scheme: str | None, **options: int) -> Any:
    return Engine(model_path=model_path, dtype="bfloat16", quantization=scheme, log_level="error", **options)


def show(rows: list[tuple[str, float, float]]) -> None:
    _, first_perplexity, first_right = rows[0]
    table = Table("weights", "perplexity", "of bfloat16", "skills right", "of bfloat16")
    for name, scored, answered in rows:
        relative = f"{scored / first_perplexity - 1:+.2%}", f"{answered / first_right - 1:+.2%}"
        table.add_row(name, f"{scored:.4f}", relative[0], f"{answered:.2%}", relative[1])
    Console().print(table)


if __name__ == "__main__":
    main()
