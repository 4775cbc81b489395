"""Write a tiny random checkpoint, with all that a chat with images needs: ``python -m MODULE DIRECTORY``."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, LlavaProcessor

from rtp_llm.tools.tiny_checkpoint import character_tokenizer, disturb

from .configuration_zeta import ZetaConfig
from .modeling_zeta import ZetaForConditionalGeneration

IMAGE = "<image>"
TEXT_SIZES = {
    "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tiny(directory: str | Path) -> str:
    """Write the checkpoint, in float32, with this folder's code beside it; return its directory."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = ZetaConfig(
        text_config=TEXT_SIZES | {"vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = ZetaForConditionalGeneration(config)
    disturb(model)  # weights that make the answers depend on everything
    # With these, save_pretrained copies the code, and names it under `auto_map` in config.json.
    ZetaConfig.register_for_auto_class()
    ZetaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    model.save_pretrained(directory)
    make_processor(config, tokenizer).save_pretrained(directory)
    return str(directory)


def make_processor(config: ZetaConfig, tokenizer: Any) -> LlavaProcessor:
    """LLaVA's: it resizes an image to the eye's square, and writes one placeholder per patch."""
    size = {"height": config.eye_config.image_size, "width": config.eye_config.image_size}
    image_processor = CLIPImageProcessor(size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.eye_config.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make_tiny(sys.argv[1]))
