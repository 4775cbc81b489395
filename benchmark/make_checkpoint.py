"""Makes a checkpoint with random weights in a real model's shape, so that speed can be measured without a download.

    python benchmark/make_checkpoint.py --size small --out checkpoint
    python benchmark/make_checkpoint.py --size llama-1b --dtype bfloat16 --tokenizer --out llama-1b

The folder has configuration and weights. Benchmarks speak in ids and need no tokenizer; --tokenizer adds one, with a
made-up word for every id, for servers that do not start without. No end of sequence is named anywhere, so that nothing
stops early; who compares engines has to ignore it all the same, since some of them fall back on an id of their own.
"""

import argparse
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

UNKNOWN = "<unk>"


def qwen3(**shape: int) -> Qwen3Config:
    return Qwen3Config(
        **shape,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def llama(tied: bool = True, **shape: int) -> LlamaConfig:
    return LlamaConfig(
        **shape,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def qwen3_5(**shape: int) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        **shape,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
    )


def lfm2(attention_layers: list[int], **shape: int) -> Lfm2Config:
    """With two sizes that published checkpoints have and vLLM reads; transformers has the hidden size for them."""
    published = {name: shape["hidden_size"] for name in ("conv_dim", "block_dim")}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return Lfm2Config(**shape, **published, **ends, full_attn_idxs=attention_layers)


SIZES: dict[str, PreTrainedConfig] = {
    "tiny": qwen3(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=4096,
    ),
    "small": qwen3(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=32000,
    ),
    # the shape of Qwen3-0.6B
    "0.6b": qwen3(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    # the shape of Qwen3-4B
    "4b": qwen3(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    # the shape of Llama-3.2-1B
    "llama-1b": llama(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256,
    ),
    # the shape of Llama-3.1-8B
    "8b": llama(
        tied=False, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256,
    ),
    # the shape of Qwen3.5-0.8B: three layers of linear attention (gated delta rule) to one of attention
    "qwen3.5-0.8b": qwen3_5(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        head_dim=256, vocab_size=248320,
    ),
    # a small model with experts, in the manner of Qwen3's
    "moe-small": Qwen3MoeConfig(
        hidden_size=1024, moe_intermediate_size=384, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, vocab_size=32000, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, bos_token_id=None, eos_token_id=None,
    ),
    # the shape of LFM2-350M: short convolutions, and attention in six layers
    "lfm2-350m": lfm2(
        [2, 5, 8, 10, 12, 14],
        hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=65536,
    ),
}  # fmt: skip


def make_checkpoint(size: str, folder: Path, dtype: str, seed: int = 0, tokenizer: bool = False) -> int:
    """Writes the checkpoint and returns its number of parameters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(SIZES[size], dtype=getattr(torch, dtype))  # float32 of 4b would be 16 GB
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(SIZES[size].vocab_size).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that has one word for each id but 0, which is the unknown word; ids survive decoding and encoding."""
    vocab = {UNKNOWN: 0} | {"▁" + made_up_word(index): index for index in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)


def made_up_word(number: int) -> str:
    """The number in letters, four of them at least: 0 is "aaaa", 27 is "aabb"."""
    letters = ""
    while number or len(letters) < 4:
        number, digit = divmod(number, 26)
        letters = string.ascii_lowercase[digit] + letters
    return letters


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights in a real model's shape.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", action="store_true", help="add a tokenizer with a made-up word for every id")
    args = parser.parse_args()
    num_parameters = make_checkpoint(args.size, args.out, args.dtype, args.seed, args.tokenizer)
    print(f"{args.out}: {num_parameters / 1e6:.1f} million parameters, {args.dtype}")


if __name__ == "__main__":
    main()
