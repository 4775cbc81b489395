"""What an engine answers on the fake device of ``fake_cuda.py``."""

from typing import Any

from rtp_llm import Engine
from rtp_llm.srt.worker.worker import Worker
from tiny_models import TINY_MODELS, random_prompts, tiny_model

LENGTHS = (3, 20, 9, 1, 30)


class Answers:
    """What an engine answers five requests of several lengths, which leave one after the other; and its worker."""

    def __init__(self, name: str, kinds: list[dict[str, Any]] | None = None, **options: Any) -> None:
        self.prompts = random_prompts(TINY_MODELS[name].vocab_size, LENGTHS)
        kinds = kinds or [{"temperature": 0}] * len(self.prompts)
        params = [kind | {"max_new_tokens": 4 + 3 * i, "ignore_eos": True} for i, kind in enumerate(kinds)]
        defaults: dict[str, Any] = {"dtype": "float32", "max_running_requests": 6, "context_length": 96}
        with Engine(
            model_path=tiny_model(name),
            device="fake_cuda",
            skip_tokenizer_init=True,
            max_total_tokens=600,
            inline=True,
            **defaults | options,
        ) as engine:
            results = engine.generate(input_ids=self.prompts, sampling_params=params)
            self.ids = [result["output_ids"] for result in results]
            self.core = engine._runner.core
            self.worker: Worker = self.core.executor.worker
