"""Transformers' own reading of a GGUF file: checked against the gguf package, kept as a folder, and asked.

The folder is a checkpoint in float32 with configuration and tokenizer as transformers reads them from the file, which
takes it a minute; all that follows loads the folder.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.published.models import PublishedModel

ROWS_AT_ONCE = 256  # positions whose logits are in memory at once


class ReadingError(Exception):
    """Transformers has not read the file as it is."""


def reference_folder(model: PublishedModel, file: Path, folder: Path) -> Path:
    """Return the folder of transformers' reading, made if it is not there.

    Raises:
        ReadingError: its tensors are not the file's.
    """
    target = folder / model.stem
    if target.exists():
        return target
    print(f"{model.title}: transformers reads the file ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / model.stem
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        check_reading(model, file, loaded)
        save(loaded, made)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
        shutil.move(made, target)
    return target


def save(loaded: Any, folder: Path) -> None:
    """Write a model as a checkpoint in float32. Transformers' own saving refuses one that was read from a GGUF file."""
    folder.mkdir()
    config = loaded.config
    del config.quantization_config
    config.architectures = [type(loaded).__name__]
    config.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    tied = set(loaded.all_tied_weights_keys) if config.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in loaded.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def check_reading(model: PublishedModel, file: Path, loaded: Any) -> None:
    """Compare every tensor with what the gguf package dequantises, and what the converter did to it undone.

    Raises:
        ReadingError: one differs, or one of the file is not in the model.
    """
    heads = loaded.config.num_attention_heads, loaded.config.num_key_value_heads
    remaining = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wrong = []
    for name, read in loaded.named_parameters():
        stem = gguf_name(loaded.config, name)
        if stem not in remaining:
            raise ReadingError(f"{file.name} has no tensor {stem} for {name}")
        tensor = remaining.pop(stem)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(read.shape)
        if not numpy.array_equal(undone(model, stem, values, heads), read.detach().numpy()):
            wrong.append(name)
    if wrong or remaining:
        raise ReadingError(
            f"transformers has read {file.name} otherwise than the gguf package: {len(wrong)} tensors differ "
            f"({', '.join(wrong[:4])}), {len(remaining)} are left out ({', '.join(list(remaining)[:4])})"
        )


def gguf_name(config: Any, name: str) -> str:
    architecture = config.model_type.removesuffix("_text")
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    return str(names.get_name(name, (".weight", ".bias")))


def undone(model: PublishedModel, name: str, values: numpy.ndarray, heads: tuple[int, int]) -> numpy.ndarray:
    """Return a tensor of the file as it was in the checkpoint. ``heads``: of queries, and of keys."""
    change = next((what for word, what in model.changes if word in name), None)
    if change == "one more":
        return values - numpy.float32(1)
    if change == "pairs":
        num_heads = heads["attn_k." in name]
        pairs = values.reshape(num_heads, -1, 2, values.shape[-1])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


class Reference:
    """Transformers' model and tokenizer, one prompt at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if getattr(self._model.config, "final_logit_softcapping", None):
            raise ValueError(f"{folder}: its logits are capped, which is not computed here")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], num_new: int) -> list[int]:
        """Return the best ids after a prompt, whatever they are."""
        output_ids: list[int] = []
        step, cache = list(ids), None
        while len(output_ids) < num_new:
            output = self._model(torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            step, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
            output_ids += step
        return output_ids

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each id but the first."""
        scores: list[float] = []
        for rows in self.rows(ids[:-1]):
            targets = torch.tensor(ids[len(scores) + 1 : len(scores) + 1 + len(rows)])
            scores += rows.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return scores

    def logits(self, ids: Sequence[int], start: int) -> torch.Tensor:
        """Return the logits [len(ids) - start + 1, vocab_size] after ``start`` ids and all later ones, float32."""
        return torch.cat(list(self.rows(ids, start - 1)))

    @torch.inference_mode()
    def rows(self, ids: Sequence[int], first: int = 0) -> Iterator[torch.Tensor]:
        """Yield the logits after each id from ``first``, ROWS_AT_ONCE at a time, float32."""
        hidden = self._model.base_model(torch.tensor([list(ids)])).last_hidden_state[0, first:]
        head = self._model.get_output_embeddings()
        for part in hidden.split(ROWS_AT_ONCE):
            yield head(part).float()


def gap_at(reference: Reference, ids: Sequence[int]) -> float:
    """Return by how much the best of the next ids is better than the second, in the reference's logits."""
    best = reference.logits(ids, len(ids))[0].topk(2).values
    return float(best[0] - best[1])
