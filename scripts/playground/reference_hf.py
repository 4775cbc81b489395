"""What transformers answers: the logits that end each prompt, and the text that follows.

    python3 scripts/playground/reference_hf.py --model-path MODEL --model-type text

To be compared with ``python3 -m rtp_llm.bench_one_batch --correct --model MODEL``: same prompts, same dtype, same rule
for the end of a text (there is none), so the texts are equal and the logits differ by rounding.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from rtp_llm.reference import MAX_NEW_TOKENS, TransformersModel, encode, logits_text, read_prompts, whole_text
from rtp_llm.srt.configs.model_config import ModelConfig

EXIT_ERROR = 2


def show_text_model(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompt_filename)
    model = TransformersModel(args.model_path, args.dtype, args.device, args.trust_remote_code)
    for i, prompt in enumerate(prompts):
        prompt_ids = encode(model.tokenizer, prompt)
        output_ids, _ = model.generate(prompt_ids, args.max_new_tokens)
        logits = model.prompt_logits(prompt_ids)[-1].float()
        print(f"\n========== Prompt {i} ==========")
        print("prefill logits (final)", logits_text(logits))
        print(whole_text(model.tokenizer, prompt_ids, output_ids))


def show_multimodal_model(args: argparse.Namespace) -> None:
    config = ModelConfig.from_pretrained(args.model_path, trust_remote_code=args.trust_remote_code)
    name = ", ".join(config.architectures)
    if type(config.hf_config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{args.model_path} ({name}) takes no images; use --model-type text")
    raise NotImplementedError(f"multimodal models such as {args.model_path} ({name}) are not supported yet")


MODEL_TYPES: dict[str, Callable[[argparse.Namespace], None]] = {
    "text": show_text_model,
    "mllm": show_multimodal_model,
    "vlm": show_multimodal_model,
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print what transformers answers.")
    parser.add_argument("--model-path", required=True, metavar="TEXT", help="checkpoint directory, or hub id")
    parser.add_argument("--model-type", default="text", choices=MODEL_TYPES, help="vlm is another name of mllm")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="tokens per prompt")
    parser.add_argument("--dtype", default="auto", metavar="TEXT", help="auto: the checkpoint's, as in the server")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="unset: cuda where there is a GPU, else cpu")
    parser.add_argument("--prompt-filename", metavar="TEXT", help="file with one prompt per line; unset: three prompts")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        MODEL_TYPES[args.model_type](args)
    except (ValueError, OSError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        print(f"reference_hf: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
