"""Requests with a common prefix, with and without reading it once for all of them, taking turns (A B A B).

    python benchmark/shared_prefix.py --model-path DIR --num-prompts 32 --prefix-len 1024

The prefix is in the cache before anything is timed; each round has fresh own tokens, generates greedily and never stops
early. Prints each round, and the median of the rounds' ratios.
"""

import argparse
import random
import statistics
import time

import torch

from rtp_llm import Engine


def make_engine(args: argparse.Namespace, disable_prefix_sharing: bool) -> Engine:
    tokens_of_all = args.num_prompts * (args.own_len + args.output_len)
    return Engine(
        model_path=args.model_path,
        dtype=args.dtype,
        device="cpu",
        skip_tokenizer_init=True,
        max_total_tokens=2 * (args.prefix_len + tokens_of_all),
        disable_prefix_sharing=disable_prefix_sharing,
    )


def seconds(engine: Engine, prompts: list[list[int]], output_len: int) -> float:
    params = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
    start = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start


def compare(args: argparse.Namespace, sharing: Engine, apart: Engine) -> None:
    draw = random.Random(args.seed)
    vocab_size = sharing.model_config.vocab_size
    prefix = [draw.randrange(vocab_size) for _ in range(args.prefix_len)]
    for engine in (sharing, apart):
        seconds(engine, [[*prefix, 0, 1]], 2)
    num_tokens, ratios = args.num_prompts * args.output_len, []
    for number in range(args.rounds):
        prompts = [
            [*prefix, *(draw.randrange(vocab_size) for _ in range(args.own_len))] for _ in range(args.num_prompts)
        ]
        once, each = seconds(sharing, prompts, args.output_len), seconds(apart, prompts, args.output_len)
        ratios.append(each / once)
        print(
            f"round {number + 1}: read once {num_tokens / once:.1f} tokens/s, read by each {num_tokens / each:.1f}, "
            f"ratio {ratios[-1]:.2f}"
        )
    print(f"once / each: {statistics.median(ratios):.2f} (median of {args.rounds} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what reading a shared prefix once is worth.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--prefix-len", type=int, default=1024, help="tokens that all prompts begin with")
    parser.add_argument("--own-len", type=int, default=32, help="further tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=32, help="tokens to generate for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.model_path}, {args.dtype}, {torch.get_num_threads()} threads")
    with make_engine(args, False) as sharing, make_engine(args, True) as apart:
        compare(args, sharing, apart)


if __name__ == "__main__":
    main()
