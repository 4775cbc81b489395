"""Qwen2.5-Math's reward models (Yang et al., 2024; Zhang et al., 2025): of a whole answer, and of each of its steps."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.qwen2 import Qwen2ForCausalLM
from rtp_llm.srt.layers.pooled_decoder import drop_heads
from rtp_llm.srt.layers.pooler import Pooler, Steps
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STEP_TOKEN_ID = 151651  # <extra_0>, which stands behind each step; config.json does not name it


def reward_head(config: "PretrainedConfig", num_outputs: int) -> nn.Sequential:
    hidden_size = config.hidden_size
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_outputs))


class Qwen2ForRewardModel(Qwen2ForCausalLM):
    """A number for a whole conversation, from its last token."""

    generates = False

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        drop_heads(self)
        self.score = reward_head(config, 1)
        self.poolers = {"reward": Pooler("last", 1, self.score)}


class Qwen2ForProcessRewardModel(Qwen2ForCausalLM):
    """For each step of an answer the probabilities that it is wrong, and that it is right.

    A configuration may name the token behind a step as ``step_token_id``.
    """

    generates = False

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        drop_heads(self)
        self.score = reward_head(config, 2)
        steps = Steps(getattr(config, "step_token_id", STEP_TOKEN_ID))
        self.poolers = {"reward": Pooler(steps, 2, self.score, "softmax")}


EntryClass = [Qwen2ForRewardModel, Qwen2ForProcessRewardModel]
