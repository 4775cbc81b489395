"""The configuration of Zeta, as transformers loads it."""

from transformers import PreTrainedConfig


class ZetaConfig(PreTrainedConfig):
    model_type = "zeta"
    vocab_size: int = 99
    hidden_size: int = 64
    intermediate_size: int = 88
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
