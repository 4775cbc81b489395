"""transformers' generate, with its default attention (sdpa). Requests of a workload are one batch of equal lengths.

W4 is not offered: ``generate`` shares no prefix between requests, and 32 prompts of 1,056 tokens, each computed for
itself, say nothing about sharing.
"""

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmark.peers.protocol import Job, NotOffered, Stopwatch, Timing, Work, serve


class FirstToken(BaseStreamer):
    """Sees the prompt, then every token; only for batches of one."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._watch.tokens(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        pass


class Transformers:
    def load(self, job: Job) -> dict[str, str]:
        if job.precision != 16:
            raise NotOffered("transformers computes quantised weights on a CPU only with further packages")
        torch.set_num_threads(job.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None
        version = f"{transformers.__version__}, torch {torch.__version__}"
        return {"engine": "transformers", "version": version, "weights": "bfloat16", "kv": "bfloat16"}

    @torch.inference_mode()
    def run(self, work: Work) -> Timing:
        if work.shared_len:
            raise NotOffered("transformers' generate shares no prefix between requests")
        ids = torch.tensor(work.prompts)
        watch = Stopwatch()
        options = {"streamer": FirstToken(watch)} if len(work.prompts) == 1 else {}
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.output_len, do_sample=False, **options
        )
        if not options:
            watch.tokens(output.shape[0] * (output.shape[1] - ids.shape[1]))
        return watch.stop()


if __name__ == "__main__":
    serve(Transformers())
