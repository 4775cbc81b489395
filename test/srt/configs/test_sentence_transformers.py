"""What is read of sentence-transformers' files."""

import json
from pathlib import Path
from typing import Any

import pytest

from fake_hub import FakeHub
from rtp_llm.srt.configs.model_path import ModelNotFoundError, resolve_model_path
from rtp_llm.srt.configs.sentence_transformers import (
    DenseModule,
    FirstComponents,
    LayerNormModule,
    SentenceTransformer,
    SentenceTransformerError,
    UnitLength,
    read_sentence_transformer,
    transformer_folder,
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
        layers=(DenseModule(f"{tmp_path}/2_Dense", 8, 4, False, None),),
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
        ({"embedding_dimension": 8, "pooling_mode": "lasttoken"}, ("last",)),
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": False}, ("mean",)),
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
        (["Transformer", "Pooling"], {"1_Pooling__config.json": {"pooling_mode": []}}, "some of .* not none"),
        (
            ["Transformer", "Pooling"],
            {"1_Pooling__config.json": {"pooling_mode": "weightedmean", "include_prompt": False}},
            "include_prompt false is not supported for a weighted mean",
        ),
        (["Transformer", "Pooling"], {"1_Pooling__config.json": {"pooling_mode": "mid"}}, "not \\['mid'\\]"),
        (["Transformer", "CNN"], {}, "the module 'CNN' is not supported"),
        (["Transformer"], {"modules.json": [{"type": "pylate.models.Dense.Dense"}]}, "none of sentence-transformers'"),
        (["Transformer"], {"modules.json": [{"type": "x.Dense", "path": "../other"}]}, "leaves the checkpoint"),
        (["Transformer"], {"sentence_bert_config.json": {"query_expansion": {"length": 32}}}, "query_expansion"),
        (
            ["Transformer"],
            {"sentence_bert_config.json": {"modality_config": {"text": {"method": "get_text_features"}}}},
            "the model's method 'get_text_features'",
        ),
        (["Transformer"], {"sentence_bert_config.json": {"processor_kwargs": 3}}, "processor_kwargs must be an object"),
        (
            ["Transformer"],
            {"config_sentence_transformers.json": {"truncate_dim": 0}},
            "truncate_dim must be a positive",
        ),
        (
            ["Transformer", "Dense"],
            {"1_Dense__config.json": {"in_features": 3, "out_features": 3, "module_output_name": "token_embeddings"}},
            "from 'sentence_embedding' to 'token_embeddings'",
        ),
        (["Transformer", "MultiVectorMask"], {"1_MultiVectorMask__config.json": {"skiplist_words": ["."]}}, "skiplist"),
        (["Transformer"], {"sentence_bert_config.json": {"max_seq_length": 0}}, "max_seq_length must be a positive"),
        (["Transformer"], {"config_sentence_transformers.json": {"default_prompt_name": "q"}}, "'q' is not among"),
        (["Transformer", "Dense"], {"1_Dense__config.json": {"in_features": 3}}, "in_features and out_features"),
    ],
)
def test_what_is_refused(tmp_path: Path, kinds: list[str], files: dict[str, Any], message: str) -> None:
    with pytest.raises(SentenceTransformerError, match=message):
        read_sentence_transformer(write(tmp_path, kinds, **files))


def test_layers_in_order(tmp_path: Path) -> None:
    """What makes vectors of length one belongs to the end only where nothing follows it."""
    files = {
        "1_Pooling__config.json": POOLING,
        "3_Dense__config.json": {"in_features": 8, "out_features": 4, "use_residual": True},
        "4_LayerNorm__config.json": {"dimension": 4},
        "config_sentence_transformers.json": {"truncate_dim": 2},
    }
    found = read_sentence_transformer(
        write(tmp_path, ["Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Normalize"], **files)
    )
    assert found is not None and not found.normalizes
    dense, norm = f"{tmp_path}/3_Dense", f"{tmp_path}/4_LayerNorm"
    assert found.layers == (
        UnitLength(),
        DenseModule(dense, 8, 4, True, "tanh", residual=True),
        LayerNormModule(norm, 4),
        UnitLength(),
        FirstComponents(2),
    )


def test_layers_on_tokens_stand_before_the_pooling(tmp_path: Path) -> None:
    tokens = {"module_input_name": "token_embeddings"}
    files = {
        "1_Dense__config.json": {"in_features": 8, "out_features": 4} | tokens,
        "2_Normalize__config.json": tokens,
        "3_Pooling__config.json": POOLING,
    }
    found = read_sentence_transformer(write(tmp_path, ["Transformer", "Dense", "Normalize", "Pooling"], **files))
    assert found is not None and found.normalizes_tokens and not found.normalizes
    assert found.token_layers == (DenseModule(f"{tmp_path}/1_Dense", 8, 4, True, "tanh"),) and found.layers == ()
    directory = write(
        tmp_path,
        ["Transformer", "Pooling", "Dense"],
        **{"1_Pooling__config.json": POOLING},
        **{"2_Dense__config.json": files["1_Dense__config.json"]},
    )
    with pytest.raises(SentenceTransformerError, match="a layer on tokens behind the pooling"):
        read_sentence_transformer(directory)


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({"sentence_xlm-roberta_config.json": {"max_seq_length": 128}}, 128),
        ({"tokenizer_config.json": {"model_max_length": 256}}, 256),  # as version 6 saves it
        ({"tokenizer_config.json": {"model_max_length": int(1e30)}}, None),
        ({"sentence_bert_config.json": {"max_seq_length": 64}, "tokenizer_config.json": {"model_max_length": 8}}, 64),
        ({"sentence_bert_config.json": {"tokenizer_args": {"model_max_length": 32}}}, 32),
        ({"sentence_bert_config.json": {"processor_kwargs": {"model_max_length": 32}}}, 32),
        (
            {
                "sentence_bert_config.json": {"processing_kwargs": {"text": {"max_length": 16}}},
                "tokenizer_config.json": {"model_max_length": 256},
            },
            16,
        ),
        ({}, None),
    ],
)
def test_where_the_longest_input_is_named(tmp_path: Path, files: dict[str, Any], length: int | None) -> None:
    found = read_sentence_transformer(write(tmp_path, ["Transformer"], **files))
    assert found is not None and found.max_seq_length == length


def old(folder: Path) -> str:
    """A checkpoint as the first versions wrote them: the model in a folder of its own."""
    model = folder / "0_Transformer"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 128}))
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Dense", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Dense").mkdir()
    (folder / "1_Dense" / "config.json").write_text(json.dumps({"in_features": 8, "out_features": 4}))
    return str(folder)


def test_the_model_in_a_folder_of_its_own(tmp_path: Path) -> None:
    directory = old(tmp_path)
    model = transformer_folder(directory)
    assert model == resolve_model_path(directory) == f"{directory}/0_Transformer"
    found = read_sentence_transformer(model)
    assert found == SentenceTransformer(
        layers=(DenseModule(f"{directory}/1_Dense", 8, 4, True, "tanh"),), max_seq_length=128
    )
    (tmp_path / "2_Other").mkdir()
    assert read_sentence_transformer(f"{directory}/2_Other") is None


def test_models_of_other_kinds_are_named(tmp_path: Path) -> None:
    directory = write(tmp_path, ["StaticEmbedding"])
    with pytest.raises(ModelNotFoundError, match=r"no module Transformer .* of .*StaticEmbedding are not supported"):
        resolve_model_path(directory)


def test_weights_of_layers_are_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, snapshot = tmp_path / "source", tmp_path / "snapshot"
    source.mkdir()
    snapshot.mkdir()
    old(source)
    weights = ["0_Transformer/model.safetensors", "1_Dense/pytorch_model.bin", "sparse_linear.pt"]
    others = ["onnx/model.safetensors", "0_Transformer/pytorch_model.bin", "README.md", "long.pt"]
    for name in (*weights, *others):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("")
    small = [str(path.relative_to(source)) for path in source.rglob("*.json")]
    FakeHub(snapshot, [*small, *weights, *others], source).install(monkeypatch)
    assert resolve_model_path("owner/name") == f"{snapshot}/0_Transformer"
    fetched = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert fetched == {*small, *weights}
