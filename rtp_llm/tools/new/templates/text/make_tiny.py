"""Write a tiny random checkpoint, with a tokenizer and a chat template: ``python -m MODULE DIRECTORY``."""

import sys
from pathlib import Path

import torch

from rtp_llm.tools.tiny_checkpoint import character_tokenizer, disturb

from .configuration_zeta import ZetaConfig
from .modeling_zeta import ZetaForCausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tiny(directory: str | Path) -> str:
    """Write the checkpoint, in float32, with this folder's code beside it; return its directory."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = ZetaForCausalLM(ZetaConfig(vocab_size=len(tokenizer)))
    disturb(model)  # weights that make the answers depend on everything
    # With these, save_pretrained copies the code, and names it under `auto_map` in config.json.
    ZetaConfig.register_for_auto_class()
    ZetaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make_tiny(sys.argv[1]))
