"""Serves a Llama that sees: everything that a multimodal model needs, in one file outside the package.

python serve.py --model-path DIR --port 30000

The checkpoint is a Llama with an eye: `eye.*` weights, and `eye_image_size`, `eye_patch_size` and `image_token_id` in
config.json, whose `architectures` say SeeingLlamaForConditionalGeneration.
"""

import sys

import numpy as np
import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.configs.model_config import register_multimodal_model
from rtp_llm.srt.configs.server_args import prepare_server_args
from rtp_llm.srt.conversation import (
    Conversation,
    SeparatorStyle,
    register_conv_template,
    register_conv_template_matching_function,
)
from rtp_llm.srt.entrypoints.http_server import launch_server
from rtp_llm.srt.layers.multimodal import general_mm_embed_routine
from rtp_llm.srt.layers.vision import VisionAttention
from rtp_llm.srt.managers.multimodal_processor import register_processor
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, pad_mm_tokens


class Eye(nn.Module):
    """[n, 3, size, size] -> [n, patches, hidden_size]: one layer of attention, of patches to all of their image."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        self.patch_size = config.eye_patch_size
        self.num_patches = (config.eye_image_size // config.eye_patch_size) ** 2
        self.embed = nn.Conv2d(3, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size)
        self.positions = nn.Embedding(self.num_patches, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        # Step 5: the tower's attention is VisionAttention.
        self.attn = VisionAttention(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            projection_size=config.hidden_size,
            use_qkv_parallel=True,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, pixel_values):
        x = self.embed(pixel_values).flatten(2).transpose(1, 2) + self.positions.weight
        return x + self.attn(self.norm(x))


class SeeingLlamaForConditionalGeneration(LlamaForCausalLM):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.eye = Eye(config, quant_config, "eye")

    # Step 4: one <image> in the prompt becomes as many positions as the eye has patches, with ids that stand for what
    # the image shows: equal images share their cached prefix, different ones never do.
    def pad_input_ids(self, input_ids, mm_inputs):
        items = iter(mm_inputs.mm_items)
        expanded = []
        for token_id in input_ids:
            if token_id == mm_inputs.im_token_id:
                item = next(items)
                item.offsets = [(len(expanded), len(expanded) + self.eye.num_patches - 1)]
                expanded += [token_id] * self.eye.num_patches
            else:
                expanded.append(token_id)
        return pad_mm_tokens(expanded, mm_inputs)

    def get_image_feature(self, items):
        pixel_values = torch.cat([item.feature for item in items])
        return self.eye(pixel_values.to(self.eye.embed.weight)).flatten(0, 1)

    def forward(self, input_ids, positions, forward_batch):
        hidden_states = general_mm_embed_routine(
            input_ids, forward_batch, self.model, multimodal_model=self, positions=positions
        )
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


# Step 3: from a prompt and its images to ids and what the eye takes. It runs in the server's process.
class SeeingLlamaProcessor(BaseMultimodalProcessor):
    models = [SeeingLlamaForConditionalGeneration]

    def __init__(self, hf_config, server_args, _processor, *args, **kwargs):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(image_token_id=hf_config.image_token_id).build(_processor)

    def replacement(self, item):
        return self.mm_tokens.image_token  # pad_input_ids makes more of it

    def image_item(self, image):
        size = self.hf_config.eye_image_size
        pixels = np.asarray(image.resize((size, size)), dtype=np.float32) / 255
        return MultimodalDataItem(Modality.IMAGE, torch.from_numpy(pixels).permute(2, 0, 1)[None])

    async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
        return await self.process(image_data, audio_data, input_text, request_obj)


# Step 1: the model takes media.
register_multimodal_model("SeeingLlamaForConditionalGeneration")

# Step 2: how it is talked to.
register_conv_template(
    Conversation(
        name="seeing-llama",
        roles=("Q", "A"),
        sep_style=SeparatorStyle.ADD_COLON_SINGLE,
        sep="\n",
        stop_str="\n",
        image_token="<image>",
    )
)
register_conv_template_matching_function(lambda path: "seeing-llama" if "seeing-llama" in path.lower() else None)

register_processor(SeeingLlamaProcessor)
ModelRegistry.models["SeeingLlamaForConditionalGeneration"] = SeeingLlamaForConditionalGeneration

launch_server(prepare_server_args(sys.argv[1:]))
