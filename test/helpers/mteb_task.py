"""Runs one task of MTEB on generated sentences: python mteb_task.py URL KEY. Prints the score."""

import random
import sys
from typing import Any

import mteb
import numpy as np
import openai
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta

WORDS = ("the", "cat", "dog", "mat", "world", "hello", "sat", "on")


class GeneratedSTS(AbsTaskSTS):
    """Pairs that are equal, and pairs that differ from the first word on."""

    metadata = TaskMetadata(
        name="GeneratedSTS",
        dataset={"path": "generated/sts", "revision": "1"},
        description="Pairs of generated sentences.",
        reference=None,
        type="STS",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        draw = random.Random(5)
        rows: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "score": []}
        for i in range(60):
            first, second = draw.sample(WORDS, 2)
            tail = " ".join(draw.choices(WORDS, k=4))
            rows["sentence1"].append(f"{first} {tail}")
            rows["sentence2"].append(f"{first} {tail}" if i % 2 else f"{second} {tail[::-1]}")
            rows["score"].append(5 if i % 2 else 0)
        self.dataset = DatasetDict(test=Dataset.from_dict(rows))
        self.data_loaded = True


class Client(AbsEncoder):
    """An embedding model behind OpenAI's API."""

    def __init__(self, url: str, key: str) -> None:
        self._client = openai.OpenAI(base_url=url, api_key=key)
        self.mteb_model_meta = ModelMeta.create_empty()

    def encode(self, inputs: Any, **kwargs: Any) -> Any:
        texts = [text for batch in inputs for text in batch["text"]]
        answer = self._client.embeddings.create(model="tiny", input=texts)
        return np.array([item.embedding for item in answer.data], dtype=np.float32)


if __name__ == "__main__":
    result = mteb.evaluate(Client(*sys.argv[1:]), GeneratedSTS(), cache=None, show_progress_bar=False)
    print(result.task_results[0].get_score())
