"""Steps with prompts replayed from recordings, beside the same steps with the Python of the layers, in turns (A B A B).

    python benchmark/prompt_replay.py --model-path DIR_OR_GGUF --lens 16 64 128 512

One engine in one process answers prompts of each length with and without its recorder, after as many as it needs to
record them. Prints for each length the medians of the times to the first token, in milliseconds, and the median of the
turns' ratios. ``RTP_LLM_CPU_ISA`` names another instruction set than the best.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from rtp_llm import Engine
from rtp_llm.srt.devices.cpu.build import isa
from rtp_llm.srt.devices.cpu.graphs import RECORD_AT

MOST_TOKENS = 8192


def first_token_ms(engine: Engine, prompt: list[int]) -> float:
    start = time.perf_counter()
    engine.generate(input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 1})
    return (time.perf_counter() - start) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--quantization", help="as of the server; default: as the checkpoint is")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--lens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="tokens of prompts")
    parser.add_argument("--turns", type=int, default=8, help="of each length; default: %(default)s")
    args = parser.parse_args(arguments)
    options = {"quantization": args.quantization} if args.quantization else {}
    options |= {"dtype": args.dtype, "cpu_threads": args.threads, "max_total_tokens": MOST_TOKENS}
    with Engine(args.model_path, inline=True, skip_tokenizer_init=True, **options) as engine:
        runner = engine._runner.core.executor.worker.runner
        recorder = runner.recorder
        if recorder is None:
            sys.exit("steps of this model are not recorded on this device")
        draw, size = random.Random(0), engine.model_config.vocab_size
        print(f"{isa()}, {args.threads} threads")
        for length in args.lens:
            times: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(-RECORD_AT - 1, args.turns):
                for replays in (True, False):
                    runner.recorder = recorder if replays else None
                    taken = first_token_ms(engine, [draw.randrange(size) for _ in range(length)])
                    times[replays] += [taken] if turn >= 0 else []
            ratios = [plain / replayed for replayed, plain in zip(times[True], times[False], strict=True)]
            print(
                f"{length} tokens: replayed {statistics.median(times[True]):.1f} ms, "
                f"with Python {statistics.median(times[False]):.1f} ms, {statistics.median(ratios):.2f} times as fast "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
