"""The configuration of Zeta, as transformers loads it: so far LlamaConfig's fields."""

from transformers import LlamaConfig


class ZetaConfig(LlamaConfig):
    model_type = "zeta"
