"""The checkpoint folder that is made of a GGUF."""

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gguf_files import arrays_of, llama_metadata, write_gguf
from rtp_llm.srt.gguf import folder, making
from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.folder import cache_root, checkpoint_folder, is_checkpoint_folder
from rtp_llm.srt.gguf.generation import generation_config
from rtp_llm.srt.gguf.header import GGUFError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rtp-llm" / "gguf"


def metadata_without_tokenizer(**changes: Any) -> dict[str, Any]:
    metadata = llama_metadata(**changes)
    del metadata["tokenizer.ggml.model"]
    return metadata


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "toy.gguf", metadata_without_tokenizer(), arrays_of())


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_folder_is_made_once(file, cache):
    made = checkpoint_folder(file)
    assert made.parent == cache == cache_root() and made.name.startswith("toy-")
    assert {path.name for path in made.iterdir()} == {"config.json", "generation_config.json", "toy.gguf"}
    assert read_json(made / "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert read_json(made / "generation_config.json") == {"eos_token_id": [2]}
    assert (made / "toy.gguf").resolve() == file and set(GGUFFile.open(made / "toy.gguf").tensors) == set(arrays_of())
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    (made / "mark").touch()
    assert checkpoint_folder(file) == made and (made / "mark").exists()
    assert is_checkpoint_folder(made) and not is_checkpoint_folder(file.parent)
    assert [path.name for path in cache.iterdir()] == [made.name]  # nothing half-made is left


def test_a_changed_file_gets_another_folder(file):
    before = checkpoint_folder(file)
    os.utime(file, ns=(0, 0))
    touched = checkpoint_folder(file)
    write_gguf(file, metadata_without_tokenizer(context_length=512), arrays_of())
    assert len({before, touched, checkpoint_folder(file)}) == 3
    assert read_json(checkpoint_folder(file) / "config.json")["max_position_embeddings"] == 512


def test_a_changed_reader_makes_another_folder(file, monkeypatch):
    before = checkpoint_folder(file)
    monkeypatch.setattr(folder, "_code", lambda: "another version")
    assert checkpoint_folder(file) != before


def test_many_at_once_make_one_folder(file, cache):
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(checkpoint_folder, [file] * 8))
    assert len(made) == 1 and [cache / path.name for path in cache.iterdir()] == list(made)


def test_without_a_cache_a_temporary_folder_serves(file, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        made = checkpoint_folder(file)
    assert made.name.startswith("rtp-llm-") and read_json(made / "config.json")["hidden_size"] == 32
    assert "temporary folder" in caplog.text
    assert checkpoint_folder(file) == made  # while this process lives


def test_a_folder_that_others_may_write_to_is_not_used(file):
    made = checkpoint_folder(file)
    made.chmod(0o777)
    assert checkpoint_folder(file) != made
    made.chmod(0o700)
    moved = made.rename(made.with_name("elsewhere"))
    made.symlink_to(moved)
    assert checkpoint_folder(file) not in (made, moved)


def test_what_cannot_be_written_leaves_nothing(file, cache, monkeypatch):
    def refuse(metadata: Any, place: Path) -> None:
        raise GGUFError("`tokenizer.ggml.pre` is 'unheard'")

    write_gguf(file, llama_metadata(), arrays_of())
    monkeypatch.setattr(making, "write_tokenizer", refuse)
    with pytest.raises(GGUFError, match=r"toy\.gguf: .*tokenizer\.ggml\.pre"):
        checkpoint_folder(file)
    assert list(cache.iterdir()) == []
    assert (checkpoint_folder(file, with_tokenizer=False) / "config.json").exists()


WITHOUT_TORCH = """
import sys
from rtp_llm.srt.utils.transformers_imports import hide_torch
hide_torch()
from rtp_llm.srt.gguf.folder import checkpoint_folder
from rtp_llm.srt.gguf.header import GGUFError
print(checkpoint_folder(sys.argv[1]))
try:
    checkpoint_folder(sys.argv[2])
except GGUFError as error:
    print(error)
assert "torch" not in sys.modules
"""


def test_a_process_without_torch_has_it_made_by_another(file, cache, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:100])
    command = [sys.executable, "-c", WITHOUT_TORCH, str(file), str(broken)]
    path, message = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    with pytest.raises(GGUFError) as here:
        checkpoint_folder(broken)
    assert message == str(here.value)
    made = Path(path)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    shutil.rmtree(made)
    assert checkpoint_folder(file) == made and {path.name: path.read_bytes() for path in made.iterdir()} == files


def test_all_parts_are_linked(tmp_path):
    metadata = metadata_without_tokenizer()
    arrays = arrays_of()
    parts = [tmp_path / f"toy-0000{number}-of-00002.gguf" for number in (1, 2)]
    split = {"split.count": 2, "split.tensors.count": len(arrays)}
    first = {"token_embd.weight": arrays.pop("token_embd.weight")}
    write_gguf(parts[0], metadata | split | {"split.no": 0}, first)
    write_gguf(parts[1], {"general.architecture": "llama"} | split | {"split.no": 1}, arrays)
    made = checkpoint_folder(parts[1])
    assert sorted(path.name for path in made.glob("*.gguf")) == [path.name for path in parts]
    assert checkpoint_folder(parts[0]) == made
    assert len(GGUFFile.open(made / parts[0].name).tensors) == 3


# generation_config.json


def generation(path: Path, **keys: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in keys.items()}
    return generation_config(GGUFFile.open(write_gguf(path, metadata_without_tokenizer() | named, arrays_of())))


def test_ends_and_sampling(tmp_path):
    tokens = {"eos": 2, "eot": 7, "eom": 8, "bos": 1}
    keys = {f"tokenizer__ggml__{name}_token_id": number for name, number in tokens.items()}
    keys |= {"tokenizer__ggml__eos_token_ids": [2, 9]}
    sampling = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "penalty_repeat": 1.1, "mirostat": 1}
    keys |= {f"general__sampling__{name}": value for name, value in sampling.items()}
    assert generation(tmp_path / "toy.gguf", **keys) == {
        "eos_token_id": [2, 7, 8, 9],
        "bos_token_id": 1,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }


def test_tokens_that_end_an_answer_by_their_text(tmp_path):
    tokens = [f"t{number}" for number in range(61)] + ["<|im_end|>", "<|eot_id|>", "</s>"]
    keys = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": [1] * 62 + [3, 1]}
    assert generation(tmp_path / "toy.gguf", **keys) == {"eos_token_id": [2, 61, 62]}  # </s> is text here


def test_ids_that_do_not_exist_are_left_out(tmp_path, caplog):
    keys = {"tokenizer__ggml__eot_token_id": 64, "tokenizer__ggml__bos_token_id": 2**32 - 1}
    assert generation(tmp_path / "toy.gguf", **keys) == {"eos_token_id": [2]}
    assert "`tokenizer.ggml.eot_token_id` is left out: there is no token 64 among 64" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer__ggml__eot_token_id", "end", "`tokenizer.ggml.eot_token_id` must be a token id, not 'end'"),
        ("tokenizer__ggml__eos_token_ids", 3, "`tokenizer.ggml.eos_token_ids` must be a list of token ids"),
        ("tokenizer__ggml__eos_token_ids", ["a"], "`tokenizer.ggml.eos_token_ids` must be a token id, not 'a'"),
        ("general__sampling__temp", float("nan"), "`general.sampling.temp` must be a number, not nan"),
        ("general__sampling__top_k", "many", "`general.sampling.top_k` must be a number, not 'many'"),
    ],
)
def test_values_of_other_types_are_refused_by_key(tmp_path, key, value, message):
    with pytest.raises(GGUFError, match=message):
        generation(tmp_path / "toy.gguf", **{key: value})
