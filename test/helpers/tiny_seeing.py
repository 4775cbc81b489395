"""A tiny random checkpoint of a model that sees (Qwen2-VL), with everything that a processor and a chat need."""

from pathlib import Path
from typing import Any

from tiny_models import make_tiny_vision, special_id

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
START, END, IMAGE_PAD, VIDEO_PAD = (special_id(TOKENS, token) for token in TOKENS)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CONFIG = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 14},
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 28 * 28,
    "max_pixels": 112 * 112,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_seeing(folder: Path, **config: Any) -> str:
    """Writes a float32 checkpoint; images have 1 to 16 tokens. Returns its path."""
    files = {"preprocessor_config.json": PREPROCESSOR}
    make_tiny_vision("Qwen2VLForConditionalGeneration", folder, CONFIG | config, TOKENS, files)
    Path(folder, "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(folder)
