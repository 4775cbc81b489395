"""Models that kill their process, for tests of what the supervisor makes of it."""

import os
import signal

from rtp_llm.models_py.llama import LlamaForCausalLM

DEADLY_ID = 77


class KillerForCausalLM(LlamaForCausalLM):
    """Dies whenever it has to compute token 77."""

    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        if (input_ids == DEADLY_ID).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input_ids, positions, forward_batch, input_embeds)


class FailingForCausalLM(LlamaForCausalLM):
    """Raises whenever it has to compute token 77."""

    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        if (input_ids == DEADLY_ID).any():
            raise RuntimeError("seventy-seven is too much")
        return super().forward(input_ids, positions, forward_batch, input_embeds)
