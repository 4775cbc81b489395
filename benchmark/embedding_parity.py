"""How near a model's vectors are to those of sentence-transformers in float32, over texts of all lengths.

    python benchmark/embedding_parity.py --model DIR [--texts 1000] [--dtype bfloat16]

Texts are drawn from the words of the model's own vocabulary, with a fixed seed. The reference is sentence-transformers
where it is installed. Otherwise it is transformers' hidden states, averaged: right for checkpoints whose pooling is the
mean, and others are refused. Prints the smallest cosine, the largest difference of a component, how many texts have the
same nearest neighbour, and the rank correlation of all similarities to the first text.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from rtp_llm import Engine
from rtp_llm.srt.configs.sentence_transformers import read_sentence_transformer

WORDS_OF_A_TEXT = (1, 3, 8, 14, 30, 60, 150, 300)
SEED = 5
WORST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}  # of ours in this dtype, else the run is a failure


def texts_for(tokenizer: Any, count: int) -> list[str]:
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    draw = random.Random(SEED)
    return [" ".join(draw.choices(words, k=draw.choice(WORDS_OF_A_TEXT))) for _ in range(count)]


def ours(model: str, texts: list[str], dtype: str) -> tuple[np.ndarray, float]:
    with Engine(model_path=model, device="cpu", dtype=dtype) as engine:
        start_s = time.perf_counter()
        results = engine.encode(texts, truncate_prompt_tokens=-1)
        taken_s = time.perf_counter() - start_s
    return np.stack([np.asarray(result["embedding"]) for result in results]), taken_s


def theirs(model: str, texts: list[str]) -> tuple[np.ndarray, str, float]:
    """Return vectors, the name of the reference, and the seconds that it took."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return _averaged(model, texts)
    loaded = SentenceTransformer(model, device="cpu")
    start_s = time.perf_counter()
    vectors = loaded.encode(texts, batch_size=32)
    return np.asarray(vectors), "sentence-transformers", time.perf_counter() - start_s


def _averaged(model: str, texts: list[str]) -> tuple[np.ndarray, str, float]:
    sentences = read_sentence_transformer(model)
    if sentences is None or sentences.poolings != ("mean",) or sentences.dense:
        raise SystemExit(f"{model} is not just averaged: install sentence-transformers")
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).float().eval()
    start_s, vectors = time.perf_counter(), []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=sentences.max_seq_length, return_tensors="pt")
        with torch.no_grad():
            mean = loaded(**inputs).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm() if sentences.normalizes else mean).numpy())
    return np.stack(vectors), "transformers, averaged", time.perf_counter() - start_s


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: np.ndarray) -> np.ndarray:
    similarities = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(similarities, -2)
    return similarities.argmax(axis=1)


def compared(mine: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Return figures of how near [N, size] vectors are to those of the reference."""
    cosines = (unit(mine) * unit(reference)).sum(axis=1)
    similarities = [ranks(unit(vectors) @ unit(vectors)[0]) for vectors in (mine, reference)]
    return {
        "smallest_cosine": float(cosines.min()),
        "largest_difference": float(np.abs(mine - reference).max()),
        "same_nearest": int((nearest(mine) == nearest(reference)).sum()),
        "rank_correlation": float(np.corrcoef(*similarities)[0, 1]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a model's vectors with those of sentence-transformers.")
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--dtype", choices=list(WORST_COSINE), default="float32", help="of our engine")
    args = parser.parse_args()
    texts = texts_for(AutoTokenizer.from_pretrained(args.model), args.texts)
    mine, my_s = ours(args.model, texts, args.dtype)
    reference, name, their_s = theirs(args.model, texts)
    figures = compared(mine, reference)
    about = {"model": Path(args.model).name, "reference": name, "dtype": args.dtype, "texts": len(texts)}
    print(json.dumps(about | figures | {"seconds": {"ours": round(my_s, 2), "theirs": round(their_s, 2)}}, indent=1))
    return 0 if figures["smallest_cosine"] > WORST_COSINE[args.dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
