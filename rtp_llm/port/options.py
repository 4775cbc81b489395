"""The flags of ``rtp-llm port``."""

import argparse

EPILOG = """\
The output is one file that imports torch, transformers and rtp_llm only: what it uses of other model files is taken
along. The report says what was done, what to look at and what cannot be ported; each such place carries a "# PORT:"
comment. Exit status: 0 nothing is left, 1 something is left or differs, 2 the file cannot be ported.

example:
  rtp-llm port vllm/model_executor/models/olmoe.py -o my_models/olmoe.py --arch OlmoeForCausalLM
  rtp-llm verify CHECKPOINT --model-class my_models/olmoe.py:OlmoeForCausalLM
"""


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("file", metavar="FILE", help="model file of vLLM or SGLang, among its siblings")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="file to write, - for stdout; unset: a file of the same name, here"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument(
        "--arch", metavar="NAME", help="port only this architecture, as config.json names it; unset: all of the file"
    )
    parser.add_argument(
        "--from", dest="engine", choices=("vllm", "sglang"), help="whose file it is; unset: found by its imports"
    )
    parser.add_argument(
        "--check",
        metavar="CONFIG",
        help="compare the output with transformers: on a tiny random checkpoint of the structure that this config.json "
        "has, in float32, one by one, batched, in chunks, from a warm cache, for a second turn and in pages",
    )
    parser.add_argument("--check-two-ranks", action="store_true", help="with --check: on two ranks, too")
    parser.set_defaults(log_level="warning")
