"""vLLM's CPU build, its engine in this process (no worker to talk to), with prefix caching.

All requests are added before the first step: requests that are scheduled together share a prefix already. vLLM on a
CPU takes its threads from VLLM_CPU_OMP_THREADS_BIND and OMP_NUM_THREADS, and its cache from VLLM_CPU_KVCACHE_SPACE;
peers.py sets them.
"""

import vllm
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from benchmark.peers.protocol import Job, NotOffered, Stopwatch, Timing, Work, serve

BATCH_TOKENS = 2048
LONGEST = 4096


class Vllm:
    def load(self, job: Job) -> dict[str, str]:
        if job.precision != 16:
            raise NotOffered("vLLM quantises no plain checkpoint for a CPU at load")
        self._llm = LLM(
            job.checkpoint,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_model_len=LONGEST,
            max_num_batched_tokens=BATCH_TOKENS,
            max_num_seqs=64,
        )
        self._num_added = 0
        return {"engine": "vLLM CPU", "version": vllm.__version__, "weights": "bfloat16", "kv": "bfloat16"}

    def run(self, work: Work) -> Timing:
        params = SamplingParams(temperature=0, max_tokens=work.output_len, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        watch = Stopwatch()
        for prompt in work.prompts:
            self._num_added += 1
            engine.add_request(str(self._num_added), TokensPrompt(prompt_token_ids=prompt), params)
        num_tokens: dict[str, int] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                count = len(output.outputs[0].token_ids)
                watch.tokens(count - num_tokens.get(output.request_id, 0))
                num_tokens[output.request_id] = count
        return watch.stop()


if __name__ == "__main__":
    serve(Vllm())
