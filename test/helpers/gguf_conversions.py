"""What llama.cpp's converter does to the checkpoints of each architecture, by its sources of 2026 (``conversion/``)."""

import math
from collections.abc import Callable
from typing import Any

import torch

from gguf_writing import Change, Config, Conversion, Tensors, rope_of

# Sizes


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotated(default: float = 1.0) -> Callable[[Config], int]:
    """Return a function for the number of a head's values that are rotated."""
    return lambda config: int(rope_of(config).get("partial_rotary_factor", default) * head_dim(config))


def four_times(name: str) -> Callable[[Config], int]:
    return lambda config: 4 * config[name]


def always(value: Any) -> Callable[[Config], Any]:
    return lambda config: value


def first_of(name: str) -> Callable[[Config], Any]:
    """Return a function for a field that may be a list of one value for each layer."""
    return lambda config: config[name][0] if isinstance(config[name], list) else config[name]


def windowed_layers(config: Config) -> list[bool] | None:
    if config.get("sliding_window") is None or "layer_types" not in config:
        return None
    return [kind == "sliding_attention" for kind in config["layer_types"]]


# Changes of tensors


def dropped(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {}


def plus_one(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: tensor + 1}


def transposed(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: tensor.transpose(-1, -2)}


def pairs_together(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Order each head's rows as (0, half, 1, half + 1, …): pairs that rotate together lie side by side."""
    halves = tensor.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


def permuted(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    heads = config["num_key_value_heads" if "k_proj" in name else "num_attention_heads"]
    return {name: pairs_together(tensor, heads)}


def apart_by_groups(num_groups: Callable[[Config], int]) -> Change:
    """Return a change of rows by groups of heads (queries, key, value) to all queries, all keys, all values."""

    def change(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
        heads = config.get("num_attention_heads") or config["n_head"]
        groups = num_groups(config)
        by_group = tensor.unflatten(0, (groups, heads // groups + 2, -1))
        parts = by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]
        return {name: torch.cat([part.flatten(0, 2) for part in parts])}

    return change


def by_each_head(config: Config) -> int:
    return int(config.get("num_attention_heads") or config["n_head"])


def qkv_apart(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    """BailingMoE: rows of queries, keys and values apart, the first two with their pairs together."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = tensor.split([size * head_dim(config) for size in (heads, kv_heads, kv_heads)])
    names = [name.replace("attention.query_key_value", f"self_attn.{part}_proj") for part in "qkv"]
    return dict(zip(names, (pairs_together(q, heads), pairs_together(k, kv_heads), v), strict=True))


def wqkv_apart(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    """InternLM2: by groups of heads, then as ``qkv_apart``."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    by_group = tensor.unflatten(0, (kv_heads, heads // kv_heads + 2, -1))
    q, k, v = (part.flatten(0, 2) for part in (by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]))
    names = [name.replace("wqkv", part) for part in ("wq", "wk", "wv")]
    return dict(zip(names, (pairs_together(q, heads), pairs_together(k, kv_heads), v), strict=True))


def latent_apart(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    """DeepSeek-V2: keys (transposed) and values that each head makes of the latent row, apart."""
    sizes = [config["qk_nope_head_dim"], config["v_head_dim"]]
    k, v = tensor.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
    return {name.replace("kv_b", "k_b"): k.transpose(1, 2), name.replace("kv_b", "v_b"): v}


def halves(old: str, gate: str, up: str, transpose: bool = False) -> Change:
    """Return a change for gates and ups one after the other in one tensor."""

    def change(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
        rows = tensor.transpose(-1, -2) if transpose else tensor
        first, second = rows.chunk(2, dim=-2)
        return {name.replace(old, gate): first, name.replace(old, up): second}

    return change


def by_turns(old: str, suffix: str) -> Change:
    """Return a change for gates and ups by turns in one tensor of gpt-oss."""

    def change(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
        rows = tensor if suffix == "bias" else tensor.transpose(-1, -2)
        axis = 1
        first, second = rows.unflatten(axis, (-1, 2)).unbind(axis + 1)
        return {name.replace(old, f"gate_proj.{suffix}"): first, name.replace(old, f"up_proj.{suffix}"): second}

    return change


# What is made of configuration and tensors


def llama3_factors(config: Config) -> Tensors:
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return {}
    size, original = head_dim(config), rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}


def long_and_short_factors(config: Config) -> Tensors:
    rope = rope_of(config)
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"])
        for kind in ("long", "short")
        if rope.get(f"{kind}_factor")
    }


def longrope_scale(config: Config) -> float | None:
    rope = rope_of(config)
    if not rope.get("long_factor"):
        return None
    original = rope["original_max_position_embeddings"]
    growth = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0


def proportional_factors(config: Config) -> Tensors:
    """Gemma 4: pairs of a whole layer's heads that are not rotated have a factor beyond all positions."""
    pairs = gemma4_whole_head(config) // 2
    turned = int(gemma4_whole_head(config) * rope_of(config)["partial_rotary_factor"] / 2)
    return {"rope_freqs.weight": torch.tensor([1.0] * turned + [1e30] * (pairs - turned))}


def gemma4_whole_head(config: Config) -> int:
    """Return the size of heads in layers that see everything."""
    if config.get("global_head_dim"):
        return int(config["global_head_dim"])
    layers = config["per_layer_config"].items()
    return next(int(of["head_dim"]) for layer, of in layers if config["layer_types"][int(layer)] == "full_attention")


def gemma4_kv_heads(config: Config) -> int | list[int]:
    whole = config.get("num_global_key_value_heads")
    for layer, of in config.get("per_layer_config", {}).items():
        if whole is None and config["layer_types"][int(layer)] == "full_attention":
            whole = of.get("num_key_value_heads")
    few = config["num_key_value_heads"]
    kinds = config["layer_types"]
    return few if whole is None else [few if kind == "sliding_attention" else whole for kind in kinds]


def gemma4_feed_forward(config: Config) -> int | list[int]:
    size, layers = config["intermediate_size"], config["num_hidden_layers"]
    if not config.get("use_double_wide_mlp"):
        return int(size)
    return [size if layer < layers - config["num_kv_shared_layers"] else 2 * size for layer in range(layers)]


def xielu_keys(tensors: Tensors) -> dict[str, Any]:
    def values(name: str) -> list[float]:
        layers = sum(key.endswith(f"act_fn.{name}") for key in tensors)
        return [tensors[f"model.layers.{layer}.mlp.act_fn.{name}"].float().item() for layer in range(layers)]

    return {f"xielu.{name}": values(name) for name in ("alpha_p", "alpha_n", "beta", "eps")}


# By architecture

PERMUTED = ((r"[qk]_proj\.(weight|bias)$", permuted),)
LLAMA = {"vocab_size": "vocab_size", "rope.dimension_count": head_dim}
GRANITE = LLAMA | {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attention.key_length": always(None),
    "attention.value_length": always(None),
}
CORRECTION = ((r"e_score_correction_bias$", "e_score_correction.bias"),)
MOE = {"expert_feed_forward_length": "moe_intermediate_size"}
OF_DEEPSEEK = MOE | {
    "attention.head_count_kv": always(1),
    "leading_dense_block_count": lambda c: c.get("first_k_dense_replace", c.get("mlp_layer_types", []).count("dense")),
    "vocab_size": "vocab_size",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length": lambda c: c["kv_lora_rank"] + c["qk_rope_head_dim"],
    "attention.value_length": "kv_lora_rank",
    "attention.key_length_mla": lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
    "attention.value_length_mla": "v_head_dim",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": lambda c: c.get("norm_topk_prob") or None,
    "rope.dimension_count": "qk_rope_head_dim",
    "rope.scaling.yarn_log_multiplier": lambda c: (
        0.1 * rope_of(c)["mscale_all_dim"] if "mscale_all_dim" in rope_of(c) else None
    ),
}
DEEPSEEK2 = Conversion("deepseek2", OF_DEEPSEEK, changes=((r"kv_b_proj\.weight$", latent_apart),), renamed=CORRECTION)
OLMO2 = Conversion(
    "olmo2",
    {"attention.sliding_window": "sliding_window", "attention.sliding_window_pattern": windowed_layers},
)
GRANITE_MOE = Conversion(
    "granitemoe",
    GRANITE | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
    changes=(
        *PERMUTED,
        (
            r"block_sparse_moe\.input_linear",
            halves("block_sparse_moe.input_linear", "mlp.experts.gate_proj", "mlp.experts.up_proj"),
        ),
        (
            r"shared_mlp\.input_linear",
            halves("shared_mlp.input_linear", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ),
    ),
)
GEMMA2_COMMON = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
GEMMA2_COMMON += ("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length")
GEMMA2_COMMON += ("attention.value_length",)
OLD_COMMON = ("block_count", "context_length", "embedding_length", "attention.head_count")
OLD_COMMON += ("attention.layer_norm_epsilon",)

CONVERSIONS: dict[str, Conversion] = {
    "ApertusForCausalLM": Conversion(
        "apertus",
        LLAMA,
        changes=((r"\.act_fn\.", dropped),),
        extra=llama3_factors,
        read=xielu_keys,
    ),
    "BailingMoeForCausalLM": Conversion(
        "bailingmoe",
        MOE
        | {
            "rope.dimension_count": head_dim,
            "leading_dense_block_count": "first_k_dense_replace",
            "vocab_size": "vocab_size",
            "expert_weights_scale": always(1.0),
            "expert_shared_count": "num_shared_experts",
            "expert_weights_norm": "norm_topk_prob",
        },
        changes=((r"query_key_value\.weight$", qkv_apart),),
        renamed=((r"attention\.dense", "self_attn.o_proj"),),
    ),
    "BailingMoeV2ForCausalLM": Conversion(
        "bailingmoe2",
        MOE
        | {
            "rope.dimension_count": lambda c: int(head_dim(c) * c["partial_rotary_factor"]),
            "leading_dense_block_count": "first_k_dense_replace",
            "vocab_size": "vocab_size",
            "expert_shared_feed_forward_length": lambda c: c["moe_intermediate_size"] * c["num_shared_experts"],
            "expert_weights_scale": "routed_scaling_factor",
            "expert_shared_count": "num_shared_experts",
            "expert_weights_norm": "norm_topk_prob",
            "expert_gating_func": lambda c: {"sigmoid": 2, "softmax": 1}[c["score_function"]],
        },
        renamed=((r"\.expert_bias$", ".expert_bias.bias"),),
    ),
    "BloomForCausalLM": Conversion(
        "bloom",
        {
            "context_length": lambda c: c.get("seq_length", c["hidden_size"]),
            "feed_forward_length": four_times("hidden_size"),
            "attention.head_count_kv": by_each_head,
        },
        common=("embedding_length", "block_count", "attention.head_count", "attention.layer_norm_epsilon"),
        changes=((r"query_key_value\.(weight|bias)$", apart_by_groups(by_each_head)),),
        renamed=((r"^transformer\.", ""),),
    ),
    "Cohere2ForCausalLM": Conversion(
        "cohere2",
        {
            "logit_scale": "logit_scale",
            "attention.sliding_window": "sliding_window",
            "vocab_size": "vocab_size",
            "rope.dimension_count": lambda c: c["hidden_size"] // c["num_attention_heads"],
            "rope.scaling.type": always("none"),
        },
    ),
    "DeepseekV2ForCausalLM": DEEPSEEK2,
    "DeepseekV3ForCausalLM": DEEPSEEK2,
    "Ernie4_5ForCausalLM": Conversion("ernie4_5"),
    "Ernie4_5_MoeForCausalLM": Conversion(
        "ernie4_5-moe",
        MOE
        | {
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_shared_feed_forward_length": lambda c: c["intermediate_size"] // c["num_key_value_heads"],
        },
        renamed=CORRECTION,
    ),
    "Exaone4ForCausalLM": Conversion(
        "exaone4",
        {
            "vocab_size": "vocab_size",
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": windowed_layers,
        },
        extra=llama3_factors,
    ),
    "FalconForCausalLM": Conversion(
        "falcon",
        {
            "context_length": always(2048),
            "tensor_data_layout": always("jploski"),
            "feed_forward_length": four_times("hidden_size"),
            "attention.head_count_kv": "num_kv_heads",
        },
        common=("embedding_length", "block_count", "attention.head_count", "attention.layer_norm_epsilon"),
        changes=((r"query_key_value\.weight$", apart_by_groups(lambda config: config["num_kv_heads"])),),
    ),
    "GPT2LMHeadModel": Conversion(
        "gpt2",
        {"feed_forward_length": four_times("n_embd")},
        common=OLD_COMMON,
        changes=((r"(c_attn|c_proj|c_fc)\.weight$", transposed),),
    ),
    "GPTBigCodeForCausalLM": Conversion(
        "starcoder",
        {"feed_forward_length": four_times("n_embd"), "attention.head_count_kv": always(1)},
        common=OLD_COMMON,
    ),
    "GPTNeoXForCausalLM": Conversion(
        "gptneox",
        {
            "rope.dimension_count": rotated(),
            "use_parallel_residual": lambda c: c.get("use_parallel_residual", True),
        },
        common=(*OLD_COMMON, "feed_forward_length"),
        changes=((r"query_key_value\.(weight|bias)$", apart_by_groups(by_each_head)),),
    ),
    "Gemma2ForCausalLM": Conversion(
        "gemma2",
        {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        common=GEMMA2_COMMON,
        changes=((r"^lm_head\.weight$", dropped), (r"norm\.weight$", plus_one)),
    ),
    "Gemma3ForCausalLM": Conversion(
        "gemma3",
        {
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        changes=((r"norm\.weight$", plus_one),),
    ),
    "Gemma4ForCausalLM": Conversion(
        "gemma4",
        MOE
        | {
            "attention.head_count_kv": gemma4_kv_heads,
            "feed_forward_length": gemma4_feed_forward,
            "expert_used_count": "top_k_experts",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": windowed_layers,
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": lambda c: c.get("hidden_size_per_layer_input") or 0,
            "attention.key_length": gemma4_whole_head,
            "attention.value_length": gemma4_whole_head,
            "attention.key_length_swa": "head_dim",
            "attention.value_length_swa": "head_dim",
            "rope.dimension_count": gemma4_whole_head,
            "rope.dimension_count_swa": "head_dim",
        },
        renamed=(
            (r"\.layer_scalar$", ".layer_scalar.weight"),
            (r"^model\.layers\.(\d+)\.router\.scale$", r"blk.\1.ffn_gate_inp.scale"),
            (r"^model\.layers\.(\d+)\.router\.per_expert_scale$", r"blk.\1.ffn_down_exps.scale"),
            (r"(\.experts\.\w+)$", r"\1.weight"),
        ),
        extra=proportional_factors,
    ),
    "Glm4ForCausalLM": Conversion("glm4", {"rope.dimension_count": rotated(0.5)}),
    "Glm4MoeForCausalLM": Conversion(
        "glm4moe",
        MOE
        | {
            "block_count": lambda c: c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0),
            "rope.dimension_count": rotated(0.5),
            "expert_shared_count": "n_shared_experts",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_gating_func": always(2),
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "nextn_predict_layers": "num_nextn_predict_layers",
        },
        renamed=CORRECTION,
    ),
    "Glm4MoeLiteForCausalLM": DEEPSEEK2,
    "GptOssForCausalLM": Conversion(
        "gpt-oss",
        {"attention.sliding_window": "sliding_window", "expert_feed_forward_length": "intermediate_size"},
        changes=(
            (r"gate_up_proj_bias$", by_turns("gate_up_proj_bias", "bias")),
            (r"gate_up_proj$", by_turns("gate_up_proj", "weight")),
            (r"experts\.down_proj$", transposed),
        ),
        renamed=(
            (r"down_proj_bias$", "down_proj.bias"),
            (r"down_proj$", "down_proj.weight"),
            (r"sinks$", "sinks.weight"),
        ),
    ),
    "GraniteForCausalLM": Conversion("granite", GRANITE, changes=PERMUTED),
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE,
    "HunYuanDenseV1ForCausalLM": Conversion("hunyuan-dense"),
    "HunYuanMoEV1ForCausalLM": Conversion(
        "hunyuan-moe",
        {
            "expert_shared_feed_forward_length": "intermediate_size",
            "expert_feed_forward_length": first_of("moe_intermediate_size"),
            "expert_used_count": first_of("moe_topk"),
            "expert_shared_count": first_of("num_shared_expert"),
        },
    ),
    "InternLM2ForCausalLM": Conversion("internlm2", changes=((r"attention\.wqkv\.weight$", wqkv_apart),)),
    "InternLM3ForCausalLM": Conversion("llama", LLAMA, changes=PERMUTED),
    "Llama4ForCausalLM": Conversion(
        "llama4",
        LLAMA
        | {
            "feed_forward_length": "intermediate_size_mlp",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "expert_feed_forward_length": "intermediate_size",
        },
        changes=(
            (r"gate_up_proj$", halves("gate_up_proj", "gate_proj.weight", "up_proj.weight", transpose=True)),
            (r"experts\.down_proj$", transposed),
        ),
        renamed=((r"experts\.down_proj$", "experts.down_proj.weight"),),
        extra=llama3_factors,
    ),
    "LlamaForCausalLM": Conversion("llama", LLAMA, changes=PERMUTED, extra=llama3_factors),
    "MiniMaxM2ForCausalLM": Conversion(
        "minimax-m2",
        {
            "expert_feed_forward_length": "intermediate_size",
            "rope.dimension_count": "rotary_dim",
            "expert_gating_func": lambda c: 2 if c.get("scoring_func") == "sigmoid" else None,
        },
        renamed=CORRECTION,
    ),
    "Ministral3ForCausalLM": Conversion(
        "mistral3",
        LLAMA
        | {
            "rope.scaling.yarn_log_multiplier": lambda c: rope_of(c)["mscale_all_dim"],
            "attention.temperature_scale": lambda c: rope_of(c)["llama_4_scaling_beta"],
        },
        changes=PERMUTED,
    ),
    "MistralForCausalLM": Conversion("llama", LLAMA, changes=PERMUTED),
    "MixtralForCausalLM": Conversion("llama", LLAMA, changes=PERMUTED),
    "MptForCausalLM": Conversion(
        "mpt",
        {
            "feed_forward_length": four_times("d_model"),
            "attention.layer_norm_epsilon": always(1e-5),
            "attention.clamp_kqv": lambda c: c["attn_config"]["clip_qkv"],
            "attention.max_alibi_bias": lambda c: c["attn_config"]["alibi_bias_max"],
        },
        common=("context_length", "embedding_length", "block_count", "attention.head_count"),
    ),
    "NemotronForCausalLM": Conversion(
        "nemotron",
        {
            "vocab_size": "vocab_size",
            "attention.layer_norm_epsilon": "norm_eps",
            "rope.dimension_count": lambda c: int(rotated()(c)),
            "rope.scaling.type": lambda c: "linear" if rope_of(c).get("factor") else "none",
            "rope.scaling.factor": lambda c: rope_of(c).get("factor"),
        },
        changes=((r"norm\.weight$", plus_one),),
    ),
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO2,
    "OlmoeForCausalLM": Conversion("olmoe", {"attention.layer_norm_rms_epsilon": always(1e-5)}),
    "Phi3ForCausalLM": Conversion(
        "phi3",
        {
            "rope.scaling.original_context_length": lambda c: (
                rope_of(c).get("original_max_position_embeddings") or c["original_max_position_embeddings"]
            ),
            "rope.dimension_count": lambda c: int(
                rope_of(c).get("partial_rotary_factor", 1.0) * c["hidden_size"] / c["num_attention_heads"]
            ),
            "rope.freq_base": lambda c: rope_of(c)["rope_theta"],
            "rope.scaling.attn_factor": longrope_scale,
            "attention.sliding_window": lambda c: c.get("sliding_window") or 0,
        },
        common=(
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "block_count",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.layer_norm_rms_epsilon",
        ),
        extra=long_and_short_factors,
    ),
    "PhiForCausalLM": Conversion(
        "phi2",
        {
            "feed_forward_length": four_times("hidden_size"),
            "attention.head_count_kv": by_each_head,
            "rope.dimension_count": rotated(),
        },
        common=OLD_COMMON,
    ),
    "Qwen2ForCausalLM": Conversion("qwen2"),
    "Qwen2MoeForCausalLM": Conversion(
        "qwen2moe", MOE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
    ),
    "Qwen3ForCausalLM": Conversion("qwen3"),
    "Qwen3MoeForCausalLM": Conversion("qwen3moe", MOE),
    "SeedOssForCausalLM": Conversion("seed_oss"),
    "SmolLM3ForCausalLM": Conversion("smollm3", LLAMA, changes=PERMUTED),
    "StableLmForCausalLM": Conversion(
        "stablelm",
        {
            "rope.dimension_count": rotated(),
            "use_parallel_residual": "use_parallel_residual",
        },
        common=(*OLD_COMMON, "feed_forward_length", "attention.head_count_kv"),
    ),
    "Starcoder2ForCausalLM": Conversion("starcoder2"),
}
PHI3 = CONVERSIONS["Phi3ForCausalLM"]
CONVERSIONS["PhimoeForCausalLM"] = Conversion(
    "phimoe", PHI3.keys, (*(PHI3.common or ()), "expert_count", "expert_used_count"), extra=long_and_short_factors
)
