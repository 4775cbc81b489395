"""Our offline engine against transformers' generate on one checkpoint, in one run, taking turns (A B A B).

    python benchmark/offline_throughput.py --model-path DIR --num-prompts 8 --input-len 128 --output-len 32

Both get the same random ids, generate greedily and never stop early. transformers gets all prompts in one batch, which
is its best case (equal lengths, no padding). Prints each round, and the median of the rounds' ratios.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from rtp_llm import Engine

Answers = list[list[int]]


def transformers_runner(args: argparse.Namespace) -> Callable[[Answers], Answers]:
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model_path, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: Answers) -> Answers:
        ids = torch.tensor(prompts, device=args.device)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.output_len, do_sample=False
            )
        return output[:, args.input_len :].tolist()

    return run


def our_runner(args: argparse.Namespace, engine: Engine) -> Callable[[Answers], Answers]:
    params = {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}

    def run(prompts: Answers) -> Answers:
        return [result["output_ids"] for result in engine.generate(input_ids=prompts, sampling_params=params)]

    return run


def timed(run: Callable[[Answers], Answers], prompts: Answers) -> tuple[float, Answers]:
    start = time.perf_counter()
    answers = run(prompts)
    return time.perf_counter() - start, answers


def compare(args: argparse.Namespace, ours: Callable[[Answers], Answers], theirs: Callable[[Answers], Answers]) -> None:
    vocab_size = transformers.AutoConfig.from_pretrained(args.model_path).get_text_config().vocab_size
    draw = random.Random(args.seed)
    num_tokens = args.num_prompts * (args.input_len + args.output_len)
    ratios = []
    for number in range(args.rounds + 1):  # fresh prompts each round, so that the prefix cache helps nobody
        prompts = [[draw.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(args.num_prompts)]
        their_time, their_answers = timed(theirs, prompts)
        our_time, our_answers = timed(ours, prompts)
        if number == 0:
            continue  # warming up
        same = sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
        ratios.append(their_time / our_time)
        print(
            f"round {number}: transformers {num_tokens / their_time:.1f} tokens/s, ours {num_tokens / our_time:.1f}, "
            f"ratio {ratios[-1]:.2f}; {same} of {args.num_prompts} answers equal"
        )
    print(f"ours / transformers: {statistics.median(ratios):.2f} (median of {args.rounds} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare offline throughput with transformers on one checkpoint.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=32, help="tokens to generate for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.model_path} on {args.device}, {args.dtype}, {torch.get_num_threads()} threads")
    with Engine(
        model_path=args.model_path,
        dtype=args.dtype,
        device=args.device,
        skip_tokenizer_init=True,
        max_total_tokens=max(4096, 2 * args.num_prompts * (args.input_len + args.output_len)),
    ) as engine:
        compare(args, our_runner(args, engine), transformers_runner(args))


if __name__ == "__main__":
    main()
