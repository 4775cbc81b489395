"""Stand-ins of architectures without experts, all of whose layers have one form. See ``stand_in.py``.

Only what is the same mathematics stands here, with the place that says so. Where an architecture can be more than its
stand-in, the line under ``why`` says what is compared.
"""

import torch

from regroup import Tensors, by_key_heads, changed, joined, renamed, without
from stand_in import HEAD_DIM, SIZES, Fields, StandIn, kept, rope

QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
UNUSED_IN_LLAMA = {"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}


def internlm2_weights(tensors: Tensors, published: Fields) -> Tensors:
    grouped = joined(tensors, QKV, "wqkv", by_key_heads(published["num_key_value_heads"]))
    return renamed(
        grouped,
        (r"embed_tokens", "tok_embeddings"),
        (r"self_attn\.o_proj", "attention.wo"),
        (r"self_attn", "attention"),
        (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.up_proj", "feed_forward.w3"),
        (r"mlp\.down_proj", "feed_forward.w2"),
        (r"post_attention_layernorm", "ffn_norm"),
        (r"input_layernorm", "attention_norm"),
        (r"^lm_head", "output"),
    )


def exaone_weights(tensors: Tensors, published: Fields) -> Tensors:
    return renamed(
        tensors,
        (r"^model\.embed_tokens", "transformer.wte"),
        (r"^model\.norm", "transformer.ln_f"),
        (r"^model\.layers", "transformer.h"),
        (r"self_attn\.o_proj", "self_attn.out_proj"),
        (r"self_attn", "attn.attention"),
        (r"mlp\.gate_proj", "mlp.c_fc_0"),
        (r"mlp\.up_proj", "mlp.c_fc_1"),
        (r"mlp\.down_proj", "mlp.c_proj"),
        (r"input_layernorm", "ln_1"),
        (r"post_attention_layernorm", "ln_2"),
    )


def chatglm_weights(tensors: Tensors, published: Fields) -> Tensors:
    found = renamed(
        joined(tensors, QKV, "query_key_value"),
        (r"^model\.embed_tokens", "transformer.embedding.word_embeddings"),
        (r"^model\.norm", "transformer.encoder.final_layernorm"),
        (r"^model\.layers", "transformer.encoder.layers"),
        (r"self_attn\.o_proj", "self_attn.dense"),
        (r"self_attn", "self_attention"),
        (r"mlp\.gate_up_proj", "mlp.dense_h_to_4h"),
        (r"mlp\.down_proj", "mlp.dense_4h_to_h"),
        (r"^lm_head", "transformer.output_layer"),
    )
    return found | {
        "transformer.rotary_pos_emb.inv_freq": torch.ones(HEAD_DIM // 4)
    }  # it is there, and nobody reads it


def mimo_weights(tensors: Tensors, published: Fields) -> Tensors:
    """A layer that drafts is beside the others."""
    layer = {f"model.mtp_layers.0{name[14:]}": t for name, t in tensors.items() if name.startswith("model.layers.0.")}
    return tensors | layer


def telechat2_prepared(tensors: Tensors, published: Fields) -> Tensors:
    return changed(tensors, r"(q_proj|k_proj|v_proj|gate_proj|up_proj)\.bias", torch.zeros_like)


def telechat2_weights(tensors: Tensors, published: Fields) -> Tensors:
    tensors = without(tensors, r"(q_proj|k_proj|v_proj|gate_proj|up_proj)\.bias")
    return renamed(
        joined(tensors, ("k_proj", "v_proj"), "key_value", by_key_heads(published["n_head"])),
        (r"^model\.embed_tokens", "transformer.word_embeddings"),
        (r"^model\.norm", "transformer.ln_f"),
        (r"^model\.layers", "transformer.h"),
        (r"self_attn\.q_proj", "self_attn.query"),
        (r"self_attn\.o_proj", "self_attn.dense"),
        (r"self_attn", "self_attention"),
    )


def plamo3_weights(tensors: Tensors, published: Fields) -> Tensors:
    """Norms of the layers' outputs begin at 1/5 and at 1/5^1.5, all others at 1, as Gemma's do; embeddings are scaled
    there by the root of their size, here not."""
    tensors = changed(tensors, r"embed_tokens", lambda weight: weight * published["hidden_size"] ** 0.5)
    tensors = changed(tensors, r"post_attention_layernorm", lambda weight: weight + 1 - 1 / 5)
    tensors = changed(tensors, r"post_feedforward_layernorm", lambda weight: weight + 1 - 1 / 5**1.5)
    tensors = joined(joined(tensors, QKV, "qkv_proj"), ("gate_proj", "up_proj"), "gate_up_proj")
    return renamed(
        tensors,
        (r"^model\.layers", "model.layers.layers"),
        (r"self_attn", "mixer"),
        (r"input_layernorm", "pre_mixer_norm"),
        (r"post_attention_layernorm", "post_mixer_norm"),
        (r"pre_feedforward_layernorm", "pre_mlp_norm"),
        (r"post_feedforward_layernorm", "post_mlp_norm"),
    )


PLAMO3_KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
LONG_FACTORS = {
    "rope_type": "longrope",
    "long_factor": [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)],
    "short_factor": [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": SIZES["max_position_embeddings"],
}

DENSE = {
    "InternLM2ForCausalLM": StandIn(
        "Llama",
        "Llama whose queries, keys and values come from one matrix, in groups by the heads of keys",
        "https://github.com/InternLM/InternLM/blob/main/tools/convert2llama.py",
        {**SIZES, **UNUSED_IN_LLAMA, "model_type": "internlm2", "bias": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        lambda published: kept(published) | {"rope_parameters": rope(published)},
        internlm2_weights,
    ),
    "ExaoneForCausalLM": StandIn(
        "Llama",
        "Llama under names like GPT-2's",
        "https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct/blob/main/modeling_exaone.py",
        {
            **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
            "model_type": "exaone",
            "num_layers": 4,
            "head_dim": HEAD_DIM,
            "activation_function": "silu",
            "layer_norm_epsilon": 1e-5,
            "rope_theta": 1e6,
            "rope_scaling": LLAMA_3_SCALING,
            "tie_word_embeddings": False,
        },
        lambda published: (
            kept(published)
            | {"num_hidden_layers": published["num_layers"], "rms_norm_eps": published["layer_norm_epsilon"]}
            | {"rope_parameters": rope(published)}
        ),
        exaone_weights,
    ),
    "ChatGLMModel": StandIn(
        "Glm",
        "transformers' Glm is made of its checkpoints",
        "https://github.com/huggingface/transformers/blob/main/src/transformers/models/glm/convert_glm_weights_to_hf.py",
        {
            "model_type": "chatglm",
            "padded_vocab_size": 99,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_layers": 4,
            "num_attention_heads": 4,
            "kv_channels": HEAD_DIM,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "seq_length": 512,
            "rope_ratio": 500,
            "original_rope": True,
            "layernorm_epsilon": 1.5625e-07,
            "rmsnorm": True,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "fp32_residual_connection": False,
            "eos_token_id": [1],
            "pad_token_id": 1,
            "tie_word_embeddings": False,
        },
        lambda published: {
            "vocab_size": published["padded_vocab_size"],
            "hidden_size": published["hidden_size"],
            "intermediate_size": published["ffn_hidden_size"],
            "num_hidden_layers": published["num_layers"],
            "num_attention_heads": published["num_attention_heads"],
            "num_key_value_heads": published["multi_query_group_num"],
            "head_dim": published["kv_channels"],
            "max_position_embeddings": published["seq_length"],
            "rms_norm_eps": published["layernorm_epsilon"],
            "attention_bias": published["add_qkv_bias"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0 * published["rope_ratio"],
                "partial_rotary_factor": 0.5,
            },
        },
        chatglm_weights,
    ),
    "MiMoForCausalLM": StandIn(
        "Qwen2",
        "Qwen 2 with layers that draft beside it",
        "https://huggingface.co/XiaomiMiMo/MiMo-7B-Base/blob/main/modeling_mimo.py",
        {
            **SIZES,
            **UNUSED_IN_LLAMA,
            "model_type": "mimo",
            "attention_bias": True,
            "head_dim": HEAD_DIM,
            "max_window_layers": 4,
            "num_nextn_predict_layers": 1,
            "rms_norm_eps": 1e-5,
            "rope_theta": 640000,
            "sliding_window": None,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        lambda published: kept(published) | {"rope_parameters": rope(published), "use_sliding_window": False},
        mimo_weights,
    ),
    "MiniCPMForCausalLM": StandIn(
        "Granite",
        "Llama with factors of embeddings, of what layers add, and of logits (muP), which are Granite's",
        "https://huggingface.co/openbmb/MiniCPM4-8B/blob/main/modeling_minicpm.py",
        {
            **SIZES,
            "model_type": "minicpm",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": LONG_FACTORS,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
            "tie_word_embeddings": False,
        },
        lambda published: (
            kept(published)
            | {"rope_parameters": rope(published)}
            | {
                "embedding_multiplier": published["scale_emb"],
                "residual_multiplier": published["scale_depth"] / published["num_hidden_layers"] ** 0.5,
                "attention_multiplier": HEAD_DIM**-0.5,
                "logits_scaling": published["hidden_size"] / published["dim_model_base"],
            }
        ),
    ),
    "OrionForCausalLM": StandIn(
        "StableLm",
        "Llama with norms of means and biases, as in StableLM where all of a head is rotated",
        "https://huggingface.co/OrionStarAI/Orion-14B-Base/blob/main/modeling_orion.py",
        {
            **SIZES,
            **UNUSED_IN_LLAMA,
            "model_type": "orion",
            "attention_bias": False,
            "max_sequence_length": 512,
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
        lambda published: (
            {name: value for name, value in kept(published).items() if name != "rms_norm_eps"}
            | {"layer_norm_eps": published["rms_norm_eps"]}
            | {"rope_parameters": rope(published, partial_rotary_factor=1.0)}
        ),
    ),
    "PanguEmbeddedForCausalLM": StandIn(
        "Llama",
        "Llama whose attention has biases",
        "https://ai.gitcode.com/ascend-tribe/openpangu-embedded-7b-model/blob/main/modeling_openpangu_dense.py",
        {
            **SIZES,
            **UNUSED_IN_LLAMA,
            "model_type": "PanguEmbedded",
            "bias": True,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 16000000.0,
        },
        lambda published: kept(published) | {"attention_bias": published["bias"], "rope_parameters": rope(published)},
    ),
    "Plamo3ForCausalLM": StandIn(
        "Gemma3",
        "Gemma 3 with SiLU; embeddings are not scaled, and norms begin at other numbers",
        "https://huggingface.co/pfnet/plamo-3-nict-8b-base/blob/main/modeling_plamo.py",
        {
            **SIZES,
            "model_type": "plamo3",
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_local_theta": 10000,
            "window_size": 24,
            "sliding_window_pattern": 4,
            "interleaved_sliding_window": [24 if kind == "sliding_attention" else None for kind in PLAMO3_KINDS],
            "layer_types": PLAMO3_KINDS,
            "tie_word_embeddings": False,
        },
        lambda published: (
            kept(published, "head_dim", "layer_types")
            | {"hidden_activation": "silu", "query_pre_attn_scalar": published["head_dim"]}
            | {"sliding_window": published["window_size"], "final_logit_softcapping": None}
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": float(published["rope_theta"])},
                    "sliding_attention": {"rope_type": "default", "rope_theta": float(published["rope_local_theta"])},
                }
            }
        ),
        plamo3_weights,
    ),
    "Rnj1ForCausalLM": StandIn(
        "Gemma3",
        "Gemma 3 whose layers all see the whole text, as published; layers that see blocks are not compared",
        "https://github.com/ggml-org/llama.cpp/pull/17811",
        {
            **SIZES,
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 30.0,
            "head_dim": HEAD_DIM,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": ["full_attention"] * 4,
            "query_pre_attn_scalar": HEAD_DIM,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "beta_fast": 64.0,
                    "beta_slow": 1.0,
                    "original_max_position_embeddings": 128,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "sliding_window": 512,
            "tie_word_embeddings": False,
        },
        lambda published: {name: value for name, value in published.items() if name != "model_type"},
    ),
    "TeleChat2ForCausalLM": StandIn(
        "Llama",
        "Llama with biases in the projections out of attention and of the feed-forward alone; keys and values, head by "
        "head, in one matrix",
        "https://huggingface.co/Tele-AI/TeleChat2-7B/blob/main/modeling_telechat2.py",
        {
            "model_type": "telechat",
            "vocab_size": 99,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "n_layer": 4,
            "n_head": 4,
            "layer_norm_epsilon": 1e-5,
            "seq_length": 512,
            "base_seqlen": 512,
            "training_seqlen": 512,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "apply_residual_connection_post_layernorm": False,
            "rope_theta": 10000.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
        },
        lambda published: {
            "vocab_size": published["vocab_size"],
            "hidden_size": published["hidden_size"],
            "intermediate_size": published["ffn_hidden_size"],
            "num_hidden_layers": published["n_layer"],
            "num_attention_heads": published["n_head"],
            "num_key_value_heads": published["n_head"],
            "max_position_embeddings": published["seq_length"],
            "rms_norm_eps": published["layer_norm_epsilon"],
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope(published),
        },
        telechat2_weights,
        telechat2_prepared,
    ),
    "TeleFLMForCausalLM": StandIn(
        "Granite",
        "Llama with a factor of logits (muP; that of embeddings is 1), as in Granite",
        "https://arxiv.org/abs/2404.16645",
        {
            **SIZES,
            **UNUSED_IN_LLAMA,
            "model_type": "TeleFLM",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "use_mup": True,
            "mup_scale_factor": 32.0,
            "output_mult": 16.0,
            "input_mult": 1.0,
        },
        lambda published: (
            kept(published)
            | {"rope_parameters": rope(published)}
            | {
                "embedding_multiplier": published["input_mult"],
                "residual_multiplier": 1.0,
                "attention_multiplier": HEAD_DIM**-0.5,
                "logits_scaling": published["mup_scale_factor"] / published["output_mult"],
            }
        ),
    ),
}
