"""Finds the sentences of a file that are nearest to a question: vectors by rtp_llm, the index by FAISS.

pip install faiss-cpu
python examples/faiss_search/search.py sentence-transformers/all-MiniLM-L6-v2 sentences.txt "Who wrote it?"
"""

import sys
from pathlib import Path

import faiss
import numpy as np

from rtp_llm import Engine

model, file, question = sys.argv[1:]
sentences = Path(file).read_text().splitlines()
with Engine(model_path=model) as engine:
    vectors = np.array([result["embedding"] for result in engine.encode([question, *sentences])], dtype=np.float32)
index = faiss.IndexFlatIP(vectors.shape[1])  # of vectors of length one: their cosine
index.add(vectors[1:])
scores, found = index.search(vectors[:1], min(3, len(sentences)))
for score, i in zip(scores[0], found[0], strict=True):
    print(f"{score:.3f} {sentences[i]}")
