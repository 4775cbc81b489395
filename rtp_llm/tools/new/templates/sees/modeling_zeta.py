"""Zeta in PyTorch, as transformers loads it: the engine's model file is compared with this."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_zeta import ZetaConfig, ZetaEyeConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, heads, tokens, head_dim] each, a mask -> [batch, tokens, heads, head_dim] and weights.

    The mask is bool, of what is seen, or is added to the scores: a bias, with -inf where nothing is seen.
    ``rtp-llm verify`` looks for a function of this name to see queries, keys and values.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        scores = scores + attention_mask
    elif attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ZetaEyeAttention(nn.Module):
    """Every patch sees all patches of its image."""

    is_causal = False

    def __init__(self, config: ZetaEyeConfig) -> None:
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, q, k, v, None, scaling=q.shape[-1] ** -0.5, is_causal=False)
        return self.out_proj(output.reshape(x.shape))


class ZetaEyeMLP(nn.Module):
    def __init__(self, config: ZetaEyeConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ZetaEyeLayer(nn.Module):
    def __init__(self, config: ZetaEyeConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = ZetaEyeAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ZetaEyeMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ZetaEye(PreTrainedModel):
    """[images, 3, size, size] -> [images, patches, hidden_size]."""

    config_class = ZetaEyeConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ZetaEyeConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embed = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)
        self.layers = nn.ModuleList([ZetaEyeLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.position_embed.weight
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ZetaPreTrainedModel(PreTrainedModel):
    config_class = ZetaConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True


class ZetaModel(ZetaPreTrainedModel):
    def __init__(self, config: ZetaConfig) -> None:
        super().__init__(config)
        self.image_token_id = config.image_token_id
        self.eye = ZetaEye(config.eye_config)
        self.projector = nn.Linear(config.eye_config.hidden_size, config.text_config.hidden_size)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The rows of the images stand at the placeholders, in their order."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and input_ids is not None:
            rows = self.projector(self.eye(pixel_values)).to(inputs_embeds.dtype)
            where = torch.eq(input_ids, self.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(where, rows)
        return self.language_model(inputs_embeds=inputs_embeds, **options)


class ZetaForConditionalGeneration(ZetaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: ZetaConfig) -> None:
        super().__init__(config)
        self.model = ZetaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """``pixel_values``: [images, 3, size, size]. ``logits_to_keep``: so many of the last positions, 0 for all, or
        the positions themselves."""
        outputs = self.model(
            input_ids,
            pixel_values,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **options: Any) -> dict[str, Any]:
        """The first step of ``generate`` encodes the images; later ones have them in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, **options)
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            inputs["pixel_values"] = None
        return inputs
