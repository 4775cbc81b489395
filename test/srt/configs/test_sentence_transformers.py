"""What is read of sentence-transformers' files."""

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.srt.configs.sentence_transformers import (
    DenseModule,
    SentenceTransformer,
    SentenceTransformerError,
    read_sentence_transformer,
)

POOLING = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def write(folder: Path, kinds: list[str], **files: Any) -> str:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    for name, content in {"modules.json": modules, **files}.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return str(folder)


def test_a_checkpoint_without_modules_is_none_of_theirs(tmp_path: Path) -> None:
    assert read_sentence_transformer(str(tmp_path)) is None


def test_all_that_is_read(tmp_path: Path) -> None:
    dense = {"in_features": 8, "out_features": 4, "bias": False, "activation_function": "torch.nn.Identity"}
    files = {
        "1_Pooling__config.json": POOLING | {"include_prompt": False},
        "2_Dense__config.json": dense,
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    }
    directory = write(tmp_path, ["Transformer", "Pooling", "Dense", "Normalize"], **files)
    assert read_sentence_transformer(directory) == SentenceTransformer(
        poolings=("mean",),
        dense=(DenseModule(f"{tmp_path}/2_Dense", 8, 4, False, None),),
        normalizes=True,
        max_seq_length=256,
        lower_case=True,
        pools_prompt=False,
        prompts={"query": "query: "},
        default_prompt_name="query",
    )


@pytest.mark.parametrize(
    ("settings", "poolings"),
    [
        ({"pooling_mode_lasttoken": True}, ("last",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "weightedmean"}, ("weighted_mean",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
    ],
)
def test_poolings_in_both_spellings(tmp_path: Path, settings: dict[str, Any], poolings: tuple[str, ...]) -> None:
    directory = write(tmp_path, ["Transformer", "Pooling"], **{"1_Pooling__config.json": settings})
    found = read_sentence_transformer(directory)
    assert found is not None and found.poolings == poolings and not found.normalizes


@pytest.mark.parametrize(
    ("kinds", "files", "message"),
    [
        (["Transformer", "Pooling"], {}, "cannot be read"),
        (["Transformer", "Pooling"], {"1_Pooling__config.json": {}}, "poolings must be some of .* not none"),
        (["Transformer", "Pooling"], {"1_Pooling__config.json": {"pooling_mode": "mid"}}, "not \\['mid'\\]"),
        (["Transformer", "CNN"], {}, "the module 'CNN' is not supported"),
        (["Transformer"], {"sentence_bert_config.json": {"max_seq_length": 0}}, "max_seq_length must be positive"),
        (["Transformer"], {"config_sentence_transformers.json": {"default_prompt_name": "q"}}, "'q' is not among"),
        (["Transformer", "Dense"], {"1_Dense__config.json": {"in_features": 3}}, "in_features and out_features"),
    ],
)
def test_what_is_refused(tmp_path: Path, kinds: list[str], files: dict[str, Any], message: str) -> None:
    with pytest.raises(SentenceTransformerError, match=message):
        read_sentence_transformer(write(tmp_path, kinds, **files))
