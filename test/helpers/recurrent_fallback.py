"""Language models of transformers that keep more than keys and values, and what becomes of each by its own code.

``AGREE`` run on our cache and in our batches; ``REFUSED`` say why they do not, in these words among others.
"""

from typing import Any

AGREE = (
    "BailingHybridForCausalLM",
    "BambaForCausalLM",
    "FalconH1ForCausalLM",
    "FalconMambaForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM",
    "KimiLinearForCausalLM",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "Lfm3ForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "MiniMaxForCausalLM",
    "NemotronHForCausalLM",
    "OlmoHybridForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "RecurrentGemmaForCausalLM",
    "RwkvForCausalLM",
    "Zamba2ForCausalLM",
    "ZambaForCausalLM",
    "ZayaForCausalLM",
    "xLSTMForCausalLM",
)
REFUSED = {
    "Inkling2ForCausalLM": "attention is given position_bias",
    "InklingForCausalLM": "attention is given position_bias",
    "DeepseekV4ForCausalLM": "layers of type compressed_sparse_attention, heavily_compressed_attention",
    "Qwen4ExpForCausalLM": "layers of type indexed_attention",
}
# Of some that agree: what transformers' own code does not do alike in whole sequences and in steps of one token.
NOTES = {
    name: "while `time_step_min` bounds no step: transformers bounds those of whole prompts only; else refused"
    for name in ("NemotronHForCausalLM", "Zamba2ForCausalLM")
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 12, "mamba_chunk_size": 8}
UNBOUNDED = {"time_step_min": 1e-9}
# Fields of tiny configurations: every kind of layer, and sizes of which transformers' code pads less.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": MAMBA | {"attn_layer_indices": [1], "mamba_n_groups": 2},
    "FalconH1ForCausalLM": MAMBA | {"mamba_d_ssm": 128, "mamba_n_groups": 2},
    "GraniteMoeHybridForCausalLM": MAMBA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2ForCausalLM": {"chunk_size": 8},
    "NemotronHForCausalLM": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8} | UNBOUNDED,
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 24,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "ZambaForCausalLM": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "Zamba2ForCausalLM": {"chunk_size": 8} | UNBOUNDED,
    "xLSTMForCausalLM": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_heads": 4,
        "chunk_size": 64,
        "autocast_kernel_dtype": "float32",
    },
}
