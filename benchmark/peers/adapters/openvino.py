"""OpenVINO GenAI's continuous-batching pipeline with prefix caching, on a model exported by optimum-intel.

Requests of W3 are added at once. In W4 the first request is added alone and the others after its first token: added
at once, they would not find each other's prefix. Keys and values are kept in bfloat16 (u8 is OpenVINO's own default),
since sides are compared at the same precision. On a processor without bfloat16 OpenVINO computes in float32, and takes
no other type for keys and values then but 8 bits: they are float32 there.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai

from benchmark.peers.protocol import Job, NotOffered, Stopwatch, Timing, Work, serve

EXPORT_OPTIONS = {
    16: ["--weight-format", "fp16"],
    8: ["--weight-format", "int8"],
    4: ["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"],
}
WEIGHTS = {16: "fp16", 8: "int8 per channel", 4: "int4 in groups of 128, embedding int8"}
CACHE_GB = 2
BATCH_TOKENS = 2048
SOME_ID = 0  # the pipeline wants an end of sequence, and ignores it


class OpenVino:
    def load(self, job: Job) -> dict[str, str]:
        folder = exported(job)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = BATCH_TOKENS
        number = number_type(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        properties = {
            "INFERENCE_PRECISION_HINT": number, "KV_CACHE_PRECISION": number, "INFERENCE_NUM_THREADS": job.threads,
        }  # fmt: skip
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self._num_added = 0
        version = f"{openvino_genai.__version__}, openvino {openvino.__version__}"
        weights = f"{WEIGHTS[job.precision]}, computed in {number}"
        return {"engine": "OpenVINO GenAI", "version": version, "weights": weights, "kv": number}

    def run(self, work: Work) -> Timing:
        watch = Stopwatch()
        first = 1 if work.shared_len else len(work.prompts)
        handles = [self._add(prompt, work.output_len) for prompt in work.prompts[:first]]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            watch.tokens(sum(num_new_tokens(handle) for handle in handles))
            if len(handles) < len(work.prompts):
                handles += [self._add(prompt, work.output_len) for prompt in work.prompts[first:]]
        return watch.stop()

    def _add(self, prompt: list[int], output_len: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.do_sample = False
        config.set_eos_token_id(SOME_ID)
        config.ignore_eos = True
        self._num_added += 1
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        return self._pipeline.add_request(self._num_added, ids, config)


def number_type(capabilities: list[str]) -> str:
    """The type that this processor computes in, and keeps keys and values in."""
    return "bf16" if "BF16" in capabilities else "f32"


def num_new_tokens(handle: Any) -> int:
    """Tokens of a request that have come since it was last asked."""
    return sum(len(output.generated_ids) for output in handle.read().values()) if handle.can_read() else 0


def exported(job: Job) -> Path:
    """The checkpoint as an OpenVINO model, exported on first use by optimum-intel's command."""
    if job.precision not in EXPORT_OPTIONS:
        raise NotOffered(f"no export for {job.precision} bits; have {', '.join(map(str, EXPORT_OPTIONS))}")
    folder = Path(job.files) / f"{job.precision}bit"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", job.checkpoint]
    command += ["--task", "text-generation-with-past", *EXPORT_OPTIONS[job.precision], str(part)]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
    part.rename(folder)
    return folder


if __name__ == "__main__":
    serve(OpenVino())
