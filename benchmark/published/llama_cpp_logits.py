"""Log-probabilities and token ids of llama.cpp; runs in its environment (benchmark/peers/setup.py), without torch.

    python -m benchmark.published.llama_cpp_logits FILE.gguf THREADS

Answers lines of JSON on standard input, in order, each by a line:

    -> {"text": "..."}                                  <- {"ids": [1, 2, 3]}
    -> {"ids": [...], "start": 10, "into": "file.npy"}  <- {"rows": 30}, and the file has the logits

Row i of the file is computed after ``start + i`` ids: the first ``start`` in one batch, then one by one.
"""

import json
import os
import sys
from typing import Any

import llama_cpp
import numpy

CONTEXT_LEN = 4096
BATCH_TOKENS = 512


class Model:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT_LEN, BATCH_TOKENS, BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def ids(self, text: str) -> list[int]:
        """Return a text's ids, those included that the model puts around a text."""
        encoded = text.encode()
        room = (llama_cpp.llama_token * (len(encoded) + 16))()
        count = llama_cpp.llama_tokenize(self._vocab, encoded, len(encoded), room, len(room), True, False)
        return list(room[:count])

    def logits(self, ids: list[int], start: int) -> numpy.ndarray:
        """Return logits [len(ids) - start + 1, vocab_size], float32."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for first in range(0, start, BATCH_TOKENS):
            row = self._decode(first, ids[first : min(first + BATCH_TOKENS, start)])
        rows = [row]
        rows += [self._decode(position, [ids[position]]) for position in range(start, len(ids))]
        return numpy.stack(rows)

    def _decode(self, start: int, ids: list[int]) -> numpy.ndarray:
        """Compute ids at positions from ``start``; return the logits [vocab_size] after the last."""
        batch = self._batch
        for row, token_id in enumerate(ids):
            batch.token[row], batch.pos[row] = token_id, start + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = row == len(ids) - 1
        batch.n_tokens = len(ids)
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status} for {len(ids)} tokens")
        found = llama_cpp.llama_get_logits_ith(self._context, len(ids) - 1)
        return numpy.ctypeslib.as_array(found, shape=(self._vocab_size,)).copy()


def answer(model: Model, question: dict[str, Any]) -> dict[str, Any]:
    if "text" in question:
        return {"ids": model.ids(question["text"])}
    logits = model.logits(question["ids"], question["start"])
    numpy.save(question["into"], logits)
    return {"rows": len(logits)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what llama.cpp prints goes to standard error
    model = Model(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
