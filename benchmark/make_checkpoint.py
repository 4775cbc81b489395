"""Makes a checkpoint of the Qwen3 shape with random weights, so that speed can be measured without a download.

    python benchmark/make_checkpoint.py --size small --out checkpoint

The folder has configuration and weights but no tokenizer: benchmarks speak in ids.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    | dict(num_key_value_heads=2, head_dim=32, vocab_size=4096),
    "small": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8)
    | dict(num_key_value_heads=4, head_dim=64, vocab_size=32000),
    # the shape of Qwen3-0.6B
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)
    | dict(num_key_value_heads=8, head_dim=128, vocab_size=151936),
}


def make_checkpoint(size: str, folder: Path, dtype: str, seed: int = 0) -> int:
    """Writes the checkpoint and returns its number of parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **SIZES[size],
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint of the Qwen3 shape with random weights.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_parameters = make_checkpoint(args.size, args.out, args.dtype, args.seed)
    print(f"{args.out}: {num_parameters / 1e6:.1f} million parameters, {args.dtype}")


if __name__ == "__main__":
    main()
