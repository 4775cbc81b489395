"""The configuration of Zeta, as transformers loads it: a language model of Llama's form, and an eye."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig


class ZetaEyeConfig(PreTrainedConfig):
    model_type = "zeta_eye"
    hidden_size: int = 32
    intermediate_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    image_size: int = 32
    patch_size: int = 8
    layer_norm_eps: float = 1e-6


class ZetaConfig(PreTrainedConfig):
    model_type = "zeta"
    sub_configs = {"text_config": LlamaConfig, "eye_config": ZetaEyeConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | LlamaConfig | None = None,
        eye_config: dict[str, Any] | ZetaEyeConfig | None = None,
        image_token_id: int = 99,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_config = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**text_config or {})
        self.eye_config = eye_config if isinstance(eye_config, ZetaEyeConfig) else ZetaEyeConfig(**eye_config or {})
        self.image_token_id = image_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
