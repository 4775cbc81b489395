"""What llama.cpp's converter does to checkpoints of models with recurrent layers, and a tiny case for each of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gguf_conversions import CORRECTION, GRANITE, MOE, PERMUTED, always, halves, head_dim, latent_apart, plus_one
from gguf_writing import Config, Conversion, Key, Tensors, rope_of
from parity import Case, disturb_correction_biases, rewrite_tensors

FULL, LINEAR = "full_attention", "linear_attention"

# Metadata


def only_in(*kinds: str) -> Callable[[str], Key]:
    """Return a maker of keys with a list by layers: a field's value in layers of these kinds, else 0."""

    def key_of(field: str) -> Key:
        def by_layer(config: Config) -> list[int]:
            names = config.get("layer_types") or config["layers_block_type"]
            return [config[field] if kind in kinds else 0 for kind in names]

        return by_layer

    return key_of


def times(first: str, second: str) -> Key:
    return lambda config: config[first] * config[second]


def mamba2_keys(heads: str, size: str, groups: str, state: str, kernel: str) -> dict[str, Key]:
    return {
        "ssm.conv_kernel": kernel,
        "ssm.state_size": state,
        "ssm.group_count": groups,
        "ssm.inner_size": times(heads, size),
        "ssm.time_step_rank": heads,
    }


def lfm2_feed_forward(config: Config) -> int:
    size = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        step = config["block_multiple_of"]
        size = -(-int(config["block_ffn_dim_multiplier"] * int(2 * size / 3)) // step) * step
    return int(size)


# Tensors


def decays(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: -tensor.exp()}


def decay_column(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: -tensor.exp().reshape(-1, 1)}


def column(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: tensor.reshape(-1, 1)}


def squeezed(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: tensor.squeeze()}


def in_groups(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    groups = config.get("mamba_n_groups") or config["n_groups"]
    return {name: tensor.reshape(groups, -1)}


MAMBA2 = (
    (r"\.A_log$", decay_column),
    (r"\.D$", column),
    (r"conv1d\.weight$", squeezed),
    (r"\.(mixer|mamba)\.norm\.weight$", in_groups),
)
DT = ((r"\.dt_bias$", ".dt_proj.bias"),)


def qkvz_apart(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    """Qwen3-Next: from a key head's query, key, values and gates to those of all heads, gates in a second tensor."""
    heads, shared = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    k_size, v_size = config["linear_key_head_dim"], shared * config["linear_value_head_dim"]
    parts = tensor.unflatten(0, (heads, -1)).split([k_size, k_size, v_size, v_size], dim=1)
    q, k, v, z = (part.flatten(0, 1) for part in parts)
    return {name.replace("qkvz", "qkv"): torch.cat((q, k, v)), name.replace("qkvz", "z"): z}


def tiled(tensor: torch.Tensor, config: Config, dim: int = 0) -> torch.Tensor:
    """Order value heads as (0 of each key head, 1 of each, …) along a dimension."""
    heads = config["linear_num_key_heads"]
    shared = config["linear_num_value_heads"] // heads
    return tensor.unflatten(dim, (heads, shared, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def tiled_rows(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: tiled(tensor, config)}


def tiled_columns(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: tiled(tensor, config, dim=1)}


def tiled_values(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    size = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    rows = tensor.squeeze()
    return {name: torch.cat((rows[:size], tiled(rows[size:], config)))}


def tiled_decays(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    return {name: -tiled(tensor, config).exp()}


def times_factor(factor_of: Callable[[Config], float]) -> Callable[[str, torch.Tensor, Config], Tensors]:
    return lambda name, tensor, config: {name: tensor * factor_of(config)}


def falcon_in_proj(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    size, state = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = torch.tensor([size, size, state, state, config["mamba_n_heads"]])
    factors = torch.tensor(config["ssm_multipliers"]).repeat_interleave(sizes)
    return {name: tensor * config["ssm_in_multiplier"] * factors[:, None]}


def falcon_keys_permuted(name: str, tensor: torch.Tensor, config: Config) -> Tensors:
    factor = config["attention_in_multiplier"] * (config["key_multiplier"] if "k_proj" in name else 1.0)
    (permuted,) = PERMUTED[0][1](name, tensor, config).values()
    return {name: permuted * factor}


# By architecture

DELTA_KEYS: dict[str, Key] = MOE | {
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": times("linear_num_value_heads", "linear_value_head_dim"),
    "attention.recurrent_layers": lambda c: [kind == LINEAR for kind in c["layer_types"]],
    "full_attention_interval": always(4),
    "rope.dimension_count": lambda c: int(head_dim(c) * rope_of(c).get("partial_rotary_factor", 0.25)),
}
MOE_HALVES = (r"mlp\.experts\.gate_up_proj$", halves("gate_up_proj", "gate_proj.weight", "up_proj.weight"))
MOE_NAMES = ((r"experts\.down_proj$", "experts.down_proj.weight"),)
DELTA_NORMS = (r"(?<!linear_attn\.)norm\.weight$", plus_one)
QWEN35 = (
    MOE_HALVES,
    (r"\.A_log$", tiled_decays),
    (r"\.(dt_bias|in_proj_[zab]\.weight)$", tiled_rows),
    (r"\.(in_proj_qkv|conv1d)\.weight$", tiled_values),
    (r"\.linear_attn\.out_proj\.weight$", tiled_columns),
    DELTA_NORMS,
)
QWEN35_KEYS = DELTA_KEYS | {"rope.dimension_sections": lambda c: [*rope_of(c).get("mrope_section", (11, 11, 10)), 0]}
LFM2_KEYS = {
    "attention.head_count_kv": only_in(FULL)("num_key_value_heads"),
    "vocab_size": "vocab_size",
    "shortconv.l_cache": "conv_L_cache",
}
SQUEEZED_CONV = ((r"conv\.conv\.weight$", squeezed),)
NEMOTRON = mamba2_keys("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel") | {
    "attention.head_count_kv": only_in(FULL)("num_key_value_heads"),
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "block_count": lambda c: len(c["layers_block_type"]),
}
NEMOTRON_NAMES = (*DT, *CORRECTION, (r"^model\.", "backbone."))

RECURRENT: dict[str, Conversion] = {
    "FalconH1ForCausalLM": Conversion(
        "falcon-h1",
        mamba2_keys("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
        | {"vocab_size": "vocab_size"},
        changes=(
            *MAMBA2,
            (r"\.[qk]_proj\.weight$", falcon_keys_permuted),
            (r"\.v_proj\.weight$", times_factor(lambda c: c["attention_in_multiplier"])),
            (r"\.o_proj\.weight$", times_factor(lambda c: c["attention_out_multiplier"])),
            (r"\.mamba\.in_proj\.weight$", falcon_in_proj),
            (r"\.mamba\.out_proj\.weight$", times_factor(lambda c: c["ssm_out_multiplier"])),
            (r"\.gate_proj\.weight$", times_factor(lambda c: c["mlp_multipliers"][0])),
            (r"\.down_proj\.weight$", times_factor(lambda c: c["mlp_multipliers"][1])),
            (r"^lm_head\.weight$", times_factor(lambda c: c["lm_head_multiplier"])),
            (r"embed_tokens\.weight$", times_factor(lambda c: c["embedding_multiplier"])),
        ),
        renamed=DT,
    ),
    "GraniteMoeHybridForCausalLM": Conversion(
        "granitehybrid",
        GRANITE
        | mamba2_keys("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
        | {
            "attention.head_count_kv": only_in(FULL)("num_key_value_heads"),
            "expert_shared_feed_forward_length": "shared_intermediate_size",
            "rope.scaling.finetuned": always(False),
            "context_length": always(2**20),
        },
        changes=(
            *MAMBA2,
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
        renamed=DT,
    ),
    "KimiLinearForCausalLM": Conversion(
        "kimi-linear",
        MOE
        | {
            "attention.head_count_kv": lambda c: [int(kind == FULL) for kind in c["layer_types"]],
            "vocab_size": "vocab_size",
            "context_length": "model_max_length",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "kda.head_dim": "linear_head_dim",
            "attention.q_lora_rank": "q_lora_rank",
            "attention.kv_lora_rank": "kv_lora_rank",
            "rope.dimension_count": "qk_rope_head_dim",
            "attention.key_length": lambda c: c["kv_lora_rank"] + c["qk_rope_head_dim"],
            "attention.value_length": always(None),
            "attention.key_length_mla": lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.value_length_mla": "v_head_dim",
            "expert_used_count": "num_experts_per_token",
            "expert_shared_count": "num_shared_experts",
            "leading_dense_block_count": lambda c: c["mlp_layer_types"].count("dense"),
            "expert_weights_scale": "routed_scaling_factor",
        },
        changes=(
            (r"kv_b_proj\.weight$", latent_apart),
            (r"\.A_log$", decays),
            (
                r"[qkv]_conv1d\.weight$",
                lambda name, tensor, config: {name: tensor.reshape(1, len(tensor), 1, tensor.shape[-1])},
            ),
        ),
        # Transformers saves dense blocks under the name of sparse ones; published checkpoints do not.
        renamed=(*DT, *CORRECTION, (r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.")),
    ),
    "Lfm2ForCausalLM": Conversion(
        "lfm2", LFM2_KEYS | {"feed_forward_length": lfm2_feed_forward}, changes=SQUEEZED_CONV
    ),
    "Lfm2MoeForCausalLM": Conversion(
        "lfm2moe",
        LFM2_KEYS | MOE | {"leading_dense_block_count": "num_dense_layers", "expert_gating_func": always(2)},
        changes=SQUEEZED_CONV,
        renamed=((r"\.expert_bias$", ".expert_bias.bias"), (r"^model\.(layers\.\d+\.feed_forward\.experts)", r"\1")),
    ),
    "Mamba2ForCausalLM": Conversion(
        "mamba2",
        mamba2_keys("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")
        | {
            "context_length": always(2**20),
            "feed_forward_length": always(0),
            "attention.head_count": always(0),
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        },
        common=("embedding_length", "block_count"),
        changes=MAMBA2,
        renamed=DT,
    ),
    "NemotronHForCausalLM": Conversion(
        "nemotron_h",
        NEMOTRON | {"feed_forward_length": only_in("mlp")("intermediate_size")},
        common=("embedding_length", "attention.head_count", "attention.key_length", "attention.value_length"),
        changes=(*MAMBA2, *PERMUTED),
        renamed=NEMOTRON_NAMES,
    ),
    "Qwen3NextForCausalLM": Conversion(
        "qwen3next",
        DELTA_KEYS,
        changes=(
            MOE_HALVES,
            (r"\.A_log$", decays),
            (r"conv1d\.weight$", squeezed),
            (r"\.in_proj_qkvz\.weight$", qkvz_apart),
            DELTA_NORMS,
        ),
        renamed=(*DT, *MOE_NAMES),
    ),
    "Qwen3_5ForCausalLM": Conversion("qwen35", QWEN35_KEYS, changes=QWEN35, renamed=DT),
    "Qwen3_5MoeForCausalLM": Conversion("qwen35moe", QWEN35_KEYS, changes=QWEN35, renamed=(*DT, *MOE_NAMES)),
}
NEMOTRON_MOE = Conversion(
    "nemotron_h_moe",
    NEMOTRON
    | MOE
    | {
        "feed_forward_length": only_in("moe")("moe_intermediate_size"),
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "moe_latent_size": "moe_latent_size",
    },
    common=(
        *("embedding_length", "attention.head_count", "attention.key_length", "attention.value_length", "expert_count"),
        *("expert_used_count", "expert_group_count", "expert_group_used_count"),
    ),
    changes=(*MAMBA2, *PERMUTED),
    renamed=(*NEMOTRON_NAMES, (r"^backbone\.(layers\.\d+)\.mixer\.experts\.", r"model.\1.mlp.experts.")),
)


OF_CASES = {"nemotron-h-moe": NEMOTRON_MOE}  # another form of the same class


def disturb_expert_bias(model_dir: str) -> None:
    """They are zero in a model that was never trained."""

    def change(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(3)
        names = [name for name in tensors if name.endswith("expert_bias")]
        assert names
        return tensors | {name: 0.3 * torch.randn(tensors[name].shape, generator=generator) for name in names}

    rewrite_tensors(model_dir, change)


SlowCase = partial(Case, slow=True)
DELTA: dict[str, Any] = dict(
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=12, linear_value_head_dim=16
)
MROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 1, 1])
MROPE |= dict(mrope_interleaved=True)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=12, mamba_chunk_size=8)
GRANITE4 = MAMBA | dict(attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=3.0)
NEMOTRON_SIZES = dict(mamba_num_heads=6, mamba_head_dim=10, n_groups=2, ssm_state_size=14, chunk_size=8)
NEMOTRON_SIZES |= dict(time_step_min=1e-9, sliding_window=None)
FACTORS = dict(embedding_multiplier=1.3, lm_head_multiplier=0.6, key_multiplier=0.8, attention_in_multiplier=1.1)
FACTORS |= dict(attention_out_multiplier=0.9, ssm_in_multiplier=1.2, ssm_out_multiplier=0.7)
FACTORS |= dict(mlp_multipliers=[0.8, 1.3], ssm_multipliers=[0.5, 1.5, 0.7, 1.2, 0.9])
RECURRENT_CASES = (
    SlowCase(
        "falcon-h1",
        "FalconH1ForCausalLM",
        MAMBA | FACTORS | dict(mamba_d_ssm=128, mamba_rms_norm=True, mamba_norm_before_gate=False, head_dim=16),
    ),
    SlowCase(
        "granite-hybrid",
        "GraniteMoeHybridForCausalLM",
        GRANITE4 | dict(layer_types=[LINEAR, FULL, LINEAR, FULL]),
    ),
    SlowCase(
        "granite-hybrid-dense",
        "GraniteMoeHybridForCausalLM",
        GRANITE4 | dict(layer_types=[LINEAR, LINEAR, FULL, LINEAR], num_local_experts=0, tie_word_embeddings=True),
    ),
    SlowCase(
        "kimi-linear",
        "KimiLinearForCausalLM",
        dict(layer_types=[LINEAR, FULL, LINEAR, FULL], mlp_layer_types=["dense", "sparse", "sparse", "sparse"])
        | dict(linear_num_heads=4, linear_head_dim=12, q_lora_rank=None, num_experts_per_token=3),
        edit=disturb_correction_biases,
    ),
    Case("lfm2", "Lfm2ForCausalLM", dict(layer_types=["conv", FULL, "conv", FULL], block_multiple_of=12)),
    SlowCase(
        "lfm2-moe",
        "Lfm2MoeForCausalLM",
        dict(layer_types=["conv", FULL, "conv", FULL], num_dense_layers=1),
        edit=disturb_expert_bias,
    ),
    SlowCase("mamba2", "Mamba2ForCausalLM", dict(num_heads=8, head_dim=16, n_groups=2, state_size=12, chunk_size=8)),
    SlowCase("nemotron-h", "NemotronHForCausalLM", NEMOTRON_SIZES | dict(layers_block_type=[LINEAR, "mlp", FULL])),
    SlowCase(
        "nemotron-h-moe",
        "NemotronHForCausalLM",
        NEMOTRON_SIZES
        | dict(
            layers_block_type=[LINEAR, "moe", FULL], n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3
        )
        | dict(moe_latent_size=20, routed_scaling_factor=1.7),
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "qwen3-next", "Qwen3NextForCausalLM", DELTA | dict(layer_types=[LINEAR, FULL, LINEAR, LINEAR], head_dim=16)
    ),
    Case(
        "qwen3.5",
        "Qwen3_5ForCausalLM",
        DELTA | dict(num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR], rope_parameters=MROPE, head_dim=16),
    ),
    SlowCase(
        "qwen3.5-moe",
        "Qwen3_5MoeForCausalLM",
        DELTA
        | dict(layer_types=[LINEAR, FULL, LINEAR, FULL], rope_parameters=MROPE, head_dim=16, linear_num_value_heads=2),
    ),
)
