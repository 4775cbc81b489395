"""What transformers answers: the logits that end each prompt, and the text that follows.

    python3 scripts/playground/reference_hf.py --model-path MODEL --model-type text
    python3 scripts/playground/reference_hf.py --model-path MODEL --model-type mllm --image IMAGE

To be compared with ``python3 -m rtp_llm.bench_one_batch --correct --model MODEL``: same prompts, same dtype, same rule
for the end of a text (there is none), so the texts are equal and the logits differ by rounding. In 16 bits rounding may
decide a near tie and with it the rest of a text; both commands say where. ``--dtype float32`` decides.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rtp_llm.tools.reference import (
    IMAGE_PROMPTS,
    MAX_NEW_TOKENS,
    Extras,
    TransformersModel,
    encode,
    logits_text,
    near_ties,
    read_images,
    read_prompts,
    ties_text,
    whole_text,
)

EXIT_ERROR = 2


def show_text_model(args: argparse.Namespace) -> None:
    if args.image:
        raise ValueError("--image means something only with --model-type mllm")
    prompts = read_prompts(args.prompt_filename)
    model = TransformersModel(args.model_path, args.dtype, args.device, args.trust_remote_code)
    show(model, [(encode(model.tokenizer, prompt), {}) for prompt in prompts], args.max_new_tokens)


def show_multimodal_model(args: argparse.Namespace) -> None:
    prompts, images = read_prompts(args.prompt_filename, IMAGE_PROMPTS), read_images(args.image)
    model = TransformersModel(args.model_path, args.dtype, args.device, args.trust_remote_code)
    if not model.takes_images:
        name = type(model.model).__name__
        raise ValueError(
            f"{args.model_path} ({name}) takes no images; use --model-type text. (Its forward has no `pixel_values`.)"
        )
    show(model, [model.encode_chat(prompt, images) for prompt in prompts], args.max_new_tokens)


def show(model: TransformersModel, prompts: Sequence[tuple[list[int], Extras]], max_new_tokens: int) -> None:
    """Prompts as ids and what goes with them."""
    ties = []
    for i, (prompt_ids, extras) in enumerate(prompts):
        output_ids, output_logits = model.generate(prompt_ids, max_new_tokens, extras)
        ties.append(near_ties(output_logits, model.model.dtype))
        logits = model.prompt_logits(prompt_ids, extras)[-1].float()
        print(f"\n========== Prompt {i} ==========")
        print("prefill logits (final)", logits_text(logits))
        print(whole_text(model.tokenizer, prompt_ids, output_ids))
    if note := ties_text(ties, model.model.dtype):
        print(f"\n{note}")


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
    parser.add_argument("--prompt-filename", metavar="TEXT", help="file with one prompt per line; unset: built-in ones")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="TEXT",
        help="mllm: image that stands before every prompt; may be repeated; unset: a drawn one",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        MODEL_TYPES[args.model_type](args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"reference_hf: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
