"""rtp_llm's offline engine, in the environment that run.py itself runs in.

All requests of W3 and W4 are given in one call, whose end is all that is timed: their first token is not told apart.
"""

from dataclasses import fields
from typing import Any

from benchmark.peers.protocol import Job, NotOffered, Stopwatch, Timing, Work, serve
from benchmark.peers.workloads import MOST_TOKENS_SHARED
from rtp_llm import Engine, ServerArgs, __version__

QUANTIZATION = {8: "int8", 4: "int4"}


class Ours:
    def load(self, job: Job) -> dict[str, str]:
        options: dict[str, Any] = dict(dtype="bfloat16", device="cpu", skip_tokenizer_init=True)
        options |= {"max_total_tokens": MOST_TOKENS_SHARED, "cpu_threads": job.threads}
        options |= {} if job.is_gguf else quantization_options(job.precision)
        self._engine = Engine(model_path=job.checkpoint, **options)
        weights = "as in the file" if job.is_gguf else QUANTIZATION.get(job.precision, "bfloat16")
        return {"engine": "rtp_llm", "version": __version__, "weights": weights, "kv": "bfloat16"}

    def run(self, work: Work) -> Timing:
        params = {"temperature": 0, "max_new_tokens": work.output_len, "ignore_eos": True}
        return self._stream(work, params) if len(work.prompts) == 1 else self._together(work, params)

    def _stream(self, work: Work, params: dict[str, Any]) -> Timing:
        watch = Stopwatch()
        num_seen = 0
        results: Any = self._engine.generate(input_ids=work.prompts[0], sampling_params=params, stream=True)
        for result in results:
            num_tokens = result["meta_info"]["completion_tokens"]
            watch.tokens(num_tokens - num_seen)
            num_seen = num_tokens
        return watch.stop()

    def _together(self, work: Work, params: dict[str, Any]) -> Timing:
        watch = Stopwatch()
        results: Any = self._engine.generate(input_ids=work.prompts, sampling_params=params)
        watch.tokens(sum(result["meta_info"]["completion_tokens"] for result in results))
        return watch.stop()


def quantization_options(precision: int) -> dict[str, str]:
    """The engine's options for weights of so many bits. Raises NotOffered if this version has none."""
    if precision == 16:
        return {}
    option = next((field for field in fields(ServerArgs) if field.name == "quantization"), None)
    if option is None:
        raise NotOffered("this version of rtp_llm has no option `quantization`")
    value = QUANTIZATION[precision]
    choices = option.metadata.get("choices") or (value,)
    if value not in choices:
        raise NotOffered(f"this version of rtp_llm has no quantization {value!r}; it has {', '.join(choices)}")
    return {"quantization": value}


if __name__ == "__main__":
    serve(Ours())
