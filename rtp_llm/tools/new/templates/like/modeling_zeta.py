"""Zeta in PyTorch, as transformers loads it: the engine's model file is compared with this.

So far it is transformers' LlamaForCausalLM under another name. Write a module of your own for each part that
differs, and put it in its place in the constructor.
"""

from transformers import LlamaForCausalLM

from .configuration_zeta import ZetaConfig


class ZetaForCausalLM(LlamaForCausalLM):
    config_class = ZetaConfig

    def __init__(self, config: ZetaConfig) -> None:
        super().__init__(config)
        # What differs replaces transformers' module, for example:
        #     for layer in self.model.layers:
        #         layer.mlp = ZetaMLP(config)
