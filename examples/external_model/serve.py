"""Serves any Llama checkpoint with a model class of our own: positive logits are replaced by their square roots.

python serve.py --model-path DIR --port 30000
"""

import sys

import torch

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.configs.server_args import prepare_server_args
from rtp_llm.srt.entrypoints.http_server import launch_server
from rtp_llm.srt.models.registry import ModelRegistry


class RootLlama(LlamaForCausalLM):
    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        output = super().forward(input_ids, positions, forward_batch, input_embeds)
        logits = output.next_token_logits
        output.next_token_logits = torch.where(logits > 0, logits.abs().sqrt(), logits)
        return output


ModelRegistry.models["LlamaForCausalLM"] = RootLlama  # what a checkpoint's config.json calls its architecture

launch_server(prepare_server_args(sys.argv[1:]))
