"""Stand-ins of architectures with experts, and of one whose layers differ. See ``stand_in.py``."""

from collections.abc import Mapping
from typing import Any

import torch

from dense_stand_ins import LLAMA_3_SCALING, QKV
from regroup import Tensors, changed, experts_apart, halves_apart, joined, renamed, without
from stand_in import HEAD_DIM, SIZES, Fields, StandIn, kept, rope

BIAS_SHIFT = 0.3  # choices of experts do not change if all their biases do by the same number


def bailing_names(tensors: Tensors) -> Tensors:
    return renamed(
        joined(tensors, QKV, "query_key_value"),
        (r"embed_tokens", "word_embeddings"),
        (r"self_attn\.o_proj", "self_attn.dense"),
        (r"self_attn\.q_norm", "self_attn.query_layernorm"),
        (r"self_attn\.k_norm", "self_attn.key_layernorm"),
        (r"self_attn", "attention"),
        (r"e_score_correction_bias", "expert_bias"),
    )


def ling_prepared(tensors: Tensors, published: Fields) -> Tensors:
    """``norm_head``: what the logits come of has columns of length 1."""
    return changed(tensors, "^lm_head", lambda weight: torch.nn.functional.normalize(weight, dim=0))


def ling_weights(tensors: Tensors, published: Fields) -> Tensors:
    lengths = torch.linspace(0.5, 2.0, published["hidden_size"])
    tensors = changed(tensors, "^lm_head", lambda weight: weight * lengths)
    tensors = halves_apart(tensors, "shared_mlp.input_linear", "shared_mlp.gate_proj", "shared_mlp.up_proj")
    tensors = renamed(
        tensors,
        (r"block_sparse_moe\.input_linear", "block_sparse_moe.experts.gate_up_proj"),
        (r"block_sparse_moe\.output_linear", "block_sparse_moe.experts.down_proj"),
        (r"block_sparse_moe\.router\.layer", "mlp.gate"),
        (r"block_sparse_moe", "mlp"),
        (r"shared_mlp\.output_linear", "shared_mlp.down_proj"),
        (r"shared_mlp", "mlp.shared_experts"),
    )
    return bailing_names(experts_apart(tensors, "mlp.experts"))


def ling2_weights(tensors: Tensors, published: Fields) -> Tensors:
    return bailing_names(changed(tensors, "correction_bias", lambda bias: bias + BIAS_SHIFT))


def param2_weights(tensors: Tensors, published: Fields) -> Tensors:
    return ling2_weights(tensors, published)


def sarvam_mla_weights(tensors: Tensors, published: Fields) -> Tensors:
    return changed(tensors, "correction_bias", lambda bias: bias + BIAS_SHIFT)


def mistral_large_weights(tensors: Tensors, published: Fields) -> Tensors:
    return renamed(
        experts_apart(tensors, "mlp.experts"),
        (r"^model\.embed_tokens", "tok_embeddings"),
        (r"^lm_head", "output"),
        (r"^model\.", ""),
        (r"self_attn\.(q|kv)_a_layernorm", r"attention.\1_a_norm"),
        (r"self_attn\.(q_a|q_b|kv_b|o)_proj", r"attention.w\1"),
        (r"self_attn\.kv_a_proj_with_mqa", "attention.wkv_a_with_mqa"),
        (r"input_layernorm", "attention_norm"),
        (r"post_attention_layernorm", "ffn_norm"),
        (r"gate_proj", "w1"),
        (r"down_proj", "w2"),
        (r"up_proj", "w3"),
        (r"mlp\.(gate|experts|shared_experts)\.", r"\1."),
        (r"mlp\.", "feed_forward."),
    )


def step_weights(tensors: Tensors, published: Fields) -> Tensors:
    return without(tensors, r"^(model\.)?(vision_model|vit_large_projector|multi_modal_projector)\.")


def like_step37(published: Fields) -> dict[str, Any]:
    """The text model of Step 3.7 in transformers' form; its tower of images is not asked."""
    kinds, sparse = published["layer_types"], {int(layer) for layer in published["moe_layers_enum"].split(",")}
    names = ("head_dim", "layer_types", "moe_intermediate_size", "moe_router_scaling_factor", "share_expert_dim",
             "sliding_window", "swiglu_limits", "swiglu_limits_shared")  # fmt: skip
    rotations = {
        kind: {
            "rope_type": "default",
            "rope_theta": published["rope_theta"][kinds.index(kind)],
            "partial_rotary_factor": published["partial_rotary_factors"][kinds.index(kind)],
        }
        for kind in kinds
    }
    text_config = kept(published, *names) | {
        "num_key_value_heads": published["num_attention_groups"],
        "num_sliding_attention_heads": published["attention_other_setting"]["num_attention_heads"],
        "query_pre_attn_scalar": published["head_dim"],
        "n_routed_experts": published["moe_num_experts"],
        "num_experts_per_tok": published["moe_top_k"],
        "mlp_layer_types": ["sparse" if layer in sparse else "dense" for layer in range(len(kinds))],
        "rope_parameters": rotations,
    }
    return {"text_config": text_config}


# Layers of Nemotron's search: heads of keys and inner sizes differ, and parts may be missing.


def feed_forward_width(block: Mapping[str, Any], hidden_size: int) -> int:
    """Return the inner size: two thirds of a multiple of the hidden size, rounded up to a multiple of 256."""
    factor = block["ffn"]["ffn_mult"]
    return 0 if factor is None else -(-int(2 * factor * hidden_size / 3) // 256) * 256


def decilm_prepared(tensors: Tensors, published: Fields) -> Tensors:
    """What a layer lacks adds nothing; inner components beyond its size add nothing; heads that share keys have equal
    ones."""
    found, heads = dict(tensors), published["num_attention_heads"]
    for number, block in enumerate(published["block_configs"]):
        layer, group = f"model.layers.{number}", block["attention"]["n_heads_in_group"]
        width = feed_forward_width(block, published["hidden_size"])
        found[f"{layer}.mlp.down_proj.weight"][:, width:] = 0
        if group is None:
            found[f"{layer}.self_attn.o_proj.weight"].zero_()
            continue
        for name in ("k_proj", "v_proj"):
            weight = found[f"{layer}.self_attn.{name}.weight"]  # [heads of keys in all layers * head_dim, hidden]
            own = weight[: heads // group * HEAD_DIM].unflatten(0, (-1, HEAD_DIM))
            weight.copy_(own.repeat_interleave(len(weight) // HEAD_DIM // len(own), dim=0).flatten(0, 1))
    return found


def decilm_weights(tensors: Tensors, published: Fields) -> Tensors:
    found, heads = dict(tensors), published["num_attention_heads"]
    for number, block in enumerate(published["block_configs"]):
        layer, group = f"model.layers.{number}", block["attention"]["n_heads_in_group"]
        width = feed_forward_width(block, published["hidden_size"])
        if group is None:
            found = without(found, rf"^{layer}\.(self_attn|input_layernorm)")
        else:
            for name in (f"{layer}.self_attn.{part}_proj.weight" for part in "kv"):
                per_key = found[name].unflatten(0, (-1, HEAD_DIM))
                found[name] = per_key[:: len(per_key) // (heads // group)].flatten(0, 1)
        if not width:
            found = without(found, rf"^{layer}\.(mlp|post_attention_layernorm)")
            continue
        found = changed(found, rf"^{layer}\.mlp\.(gate|up)_proj", lambda weight, width=width: weight[:width])
        found = changed(found, rf"^{layer}\.mlp\.down_proj", lambda weight, width=width: weight[:, :width])
    return found


def decilm_block(group: int | None, ffn_mult: float | None) -> dict[str, Any]:
    attention = {"n_heads_in_group": group, "no_op": group is None, "num_sink_tokens": None, "window_length": None}
    common = {"replace_with_linear": False, "sparsify": None}
    return {"attention": attention | common, "ffn": {"ffn_mult": ffn_mult, "no_op": ffn_mult is None, **common}}


LING = {
    **SIZES,
    "model_type": "bailing_moe",
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
}
SIGMOID_ROUTING = {
    "first_k_dense_replace": 1,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "topk_group": 2,
    "use_qk_norm": True,
}
LING_2 = {
    **LING,
    **SIGMOID_ROUTING,
    "moe_shared_expert_intermediate_size": 32,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 0.5,
    "router_dtype": "fp32",
    "use_rmsnorm": True,
}


def like_glm(published: Fields) -> dict[str, Any]:
    """GLM-4.5's configuration of one in Ling's form."""
    names = ("head_dim", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor",
             "n_group", "topk_group", "first_k_dense_replace", "use_qk_norm")  # fmt: skip
    factor = published.get("partial_rotary_factor", 1.0)
    return kept(published, *names) | {
        "n_routed_experts": published["num_experts"],
        "n_shared_experts": published["num_shared_experts"],
        "attention_bias": published["use_qkv_bias"],
        "rope_parameters": rope(published, partial_rotary_factor=factor),
    }


STEP_KINDS = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}

WITH_EXPERTS = {
    "BailingMoeForCausalLM": StandIn(
        "GraniteMoeShared",
        "the softmax of the chosen experts' scores, beside shared experts, as in Granite with factors of 1",
        "https://huggingface.co/inclusionAI/Ling-lite/blob/main/modeling_bailing_moe.py",
        {**LING, "first_k_dense_replace": 0, "norm_head": True, "num_shared_experts": 2, "rms_norm_eps": 1e-5},
        lambda published: (
            kept(published)
            | {"intermediate_size": published["moe_intermediate_size"]}
            | {"shared_intermediate_size": published["moe_intermediate_size"] * published["num_shared_experts"]}
            | {"num_local_experts": published["num_experts"], "num_experts_per_tok": published["num_experts_per_tok"]}
            | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
            | {"attention_multiplier": published["head_dim"] ** -0.5, "rope_parameters": rope(published)}
        ),
        ling_weights,
        ling_prepared,
    ),
    "BailingMoeV2ForCausalLM": StandIn(
        "Glm4Moe",
        "GLM-4.5 under other names: sigmoid routing by groups, normed queries and keys, half of a head rotated",
        "https://huggingface.co/inclusionAI/Ling-mini-2.0/blob/main/modeling_bailing_moe_v2.py",
        LING_2,
        like_glm,
        ling2_weights,
    ),
    "SarvamMoEForCausalLM": StandIn(
        "Glm4Moe",
        "Ling 2 whose heads are rotated whole, so GLM-4.5 under other names",
        "https://huggingface.co/sarvamai/sarvam-30b/blob/main/modeling_sarvam_moe.py",
        {name: value for name, value in LING_2.items() if name != "partial_rotary_factor"}
        | {"model_type": "sarvam_moe"},
        like_glm,
        ling2_weights,
    ),
    "Param2MoEForCausalLM": StandIn(
        "Glm4Moe",
        "Ling 2 whose heads are rotated whole, so GLM-4.5 under other names; vLLM's file takes a base of 10000 always",
        "https://huggingface.co/bharatgenai/Param2-17B-A2.4B-Thinking/blob/main/modeling_param2moe.py",
        {**LING, **SIGMOID_ROUTING, "model_type": "param2moe", "rope_theta": 10000.0},
        like_glm,
        param2_weights,
    ),
    "SarvamMLAForCausalLM": StandIn(
        "DeepseekV3",
        "DeepSeek-V3 whose experts form one group, under Ling's names of fields",
        "https://huggingface.co/sarvamai/sarvam-105b/blob/main/modeling_sarvam_moe.py",
        {
            **SIZES,
            **LATENT,
            "model_type": "sarvam_mla",
            "q_lora_rank": None,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "head_dim": 24,
            "hidden_act": "silu",
            "moe_intermediate_size": 32,
            "moe_router_enable_expert_bias": True,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 2.5,
            "score_function": "sigmoid",
            "tie_word_embeddings": False,
        },
        lambda published: (
            kept(
                published,
                *LATENT,
                "moe_intermediate_size",
                "num_experts_per_tok",
                "norm_topk_prob",
                "routed_scaling_factor",
                "first_k_dense_replace",
            )
            | {"n_routed_experts": published["num_experts"], "n_shared_experts": published["num_shared_experts"]}
            | {"n_group": 1, "topk_group": 1, "rope_parameters": rope(published), "q_lora_rank": None}
        ),
        sarvam_mla_weights,
    ),
    "MistralLarge3ForCausalLM": StandIn(
        "Mistral4",
        "one form in Mistral's own format: DeepSeek's attention and experts, chosen by softmax, queries scaled far on",
        "https://huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512/blob/main/params.json",
        {
            **SIZES,
            **LATENT,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1},
            "moe_intermediate_size": 32,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "mscale_all_dim": 1,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": None,
        },
        lambda published: (
            kept(
                published,
                *LATENT,
                "moe_intermediate_size",
                "n_routed_experts",
                "n_shared_experts",
                "n_group",
                "topk_group",
                "norm_topk_prob",
                "num_experts_per_tok",
                "routed_scaling_factor",
                "first_k_dense_replace",
            )
            | {
                "rope_parameters": published["rope_parameters"]
                | {"mscale": 1, "llama_4_scaling_beta": published["llama_4_scaling"]["beta"]}
            }
        ),
        mistral_large_weights,
    ),
    "DeciLMForCausalLM": StandIn(
        "Llama",
        "Llama whose layers have heads of keys and inner sizes of their own, or lack a part, which adds zeros",
        "https://huggingface.co/nvidia/Llama-3_1-Nemotron-51B-Instruct/blob/main/modeling_decilm.py",
        {
            **SIZES,
            "model_type": "nemotron-nas",
            "attention_bias": False,
            "block_configs": [
                decilm_block(2, 8.0),
                decilm_block(None, 5.0),
                decilm_block(4, None),
                decilm_block(2, 5.0),
            ],
            "hidden_act": "silu",
            "intermediate_size": None,
            "mlp_bias": False,
            "num_key_value_heads": None,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": LLAMA_3_SCALING,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        },
        lambda published: (
            kept(published) | {"intermediate_size": 512, "num_key_value_heads": 2, "rope_parameters": rope(published)}
        ),
        decilm_weights,
        decilm_prepared,
    ),
    "Step3p5ForCausalLM": StandIn(
        "Step3p7",
        "the text model of Step 3.7, whose model type in transformers is that of Step 3.5",
        "https://github.com/huggingface/transformers/blob/main/src/transformers/models/step3p7/modular_step3p7.py",
        {
            **{name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
            "model_type": "step3p5",
            "att_impl_type": "GQA",
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 6,
                "num_attention_groups": 2,
                "head_dim": HEAD_DIM,
            },
            "head_dim": HEAD_DIM,
            "layer_types": STEP_KINDS,
            "max_seq_len": 512,
            "moe_every_n_layer": 1,
            "moe_intermediate_size": 32,
            "moe_layer_offset": 0,
            "moe_layers_enum": "1,2,3",
            "moe_num_experts": 8,
            "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": 3.0,
            "moe_top_k": 2,
            "need_fp32_gate": True,
            "norm_expert_weight": True,
            "num_attention_groups": 2,
            "num_nextn_predict_layers": 0,
            "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0],
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": [5000000.0, 10000.0, 10000.0, 10000.0],
            "share_expert_dim": 48,
            "sliding_window": 24,
            "swiglu_limits": [None, None, None, 7.0],
            "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.5],
            "tie_word_embeddings": False,
            "use_head_wise_attn_gate": True,
            "use_moe": True,
            "use_moe_router_bias": True,
            "yarn_only_types": ["full_attention"],
        },
        like_step37,
        step_weights,
        head="ForConditionalGeneration",
    ),
}
