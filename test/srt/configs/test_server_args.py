"""ServerArgs: declared once; keyword arguments, flags and documentation follow."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs, markdown, prepare_server_args

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_flags_and_keywords_agree() -> None:
    argv = "--model m --tensor-parallel-size 2 --dtype half --chunked-prefill-size -1 --disable-radix --mem-frac 0.5"
    keywords = ServerArgs.from_dict(
        {
            "model_path": "m",
            "tp_size": 2,
            "dtype": "half",
            "chunked_prefill_size": -1,
            "disable_radix_cache": True,
            "mem_fraction_static": 0.5,
        }
    )
    assert prepare_server_args(argv.split()) == keywords
    assert prepare_server_args(["--model-path", "m"]) == ServerArgs(model_path="m")


def test_flags_beside_others() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--colour", type=int)
    ServerArgs.add_cli_args(parser)
    assert ServerArgs.from_cli_args(parser.parse_args(["--model", "m", "--colour", "1"])) == ServerArgs(model_path="m")


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_path", ""),
        ("model_path", 5),
        ("model_path", None),
        ("skip_tokenizer_init", 1),
        ("load_format", "tar"),
        ("context_length", 0),
        ("context_length", True),
        ("context_length", "8"),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("tp_size", 0),
        ("mem_fraction_static", 0),
        ("mem_fraction_static", 1.5),
        ("mem_fraction_static", math.nan),
        ("max_total_tokens", -5),
        ("max_running_requests", 0),
        ("chunked_prefill_size", 0),
        ("chunked_prefill_size", -2),
        ("schedule_policy", "random"),
        ("page_size", 0),
        ("random_seed", -1),
        ("log_level", "loud"),
        ("dist_timeout", 0),
        ("enable_multimodal", "no"),
        ("media_io_timeout", 0),
        ("media_url_max_file_size_mb", 0),
        ("mm_embedding_cache_size_mb", -1),
        ("allowed_media_domains", "example.org"),
        ("allowed_media_domains", []),
        ("allowed_media_domains", ["example.org", 5]),
        ("allowed_local_media_path", "/no/such/place"),
        ("limit_mm_data_per_request", "{"),
        ("limit_mm_data_per_request", "[1]"),
        ("limit_mm_data_per_request", '{"picture": 1}'),
        ("limit_mm_data_per_request", '{"image": -1}'),
        ("limit_mm_data_per_request", '{"image": true}'),
        ("limit_mm_data_per_request", None),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ServerArgsError, match=name):
        ServerArgs.from_dict({"model_path": "m"} | {name: value})


def test_unknown_arguments_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServerArgsError, match="'modle_path'; did you mean 'model_path'"):
        ServerArgs.from_dict({"modle_path": "m"})
    with pytest.raises(SystemExit) as caught:
        prepare_server_args(["--model", "m", "--tpsize=2"])
    assert caught.value.code == 2
    assert "did you mean '--tp-size'?" in capsys.readouterr().err


def test_the_embedded_model_is_the_default() -> None:
    for args in (ServerArgs(), ServerArgs.from_dict({}), prepare_server_args([])):
        assert args.is_demo
        assert (Path(args.model_path) / "config.json").is_file()
        assert args.model_name == "rtp-llm-demo"
    assert ServerArgs(served_model_name="mine").model_names == ["mine"]
    several = prepare_server_args(["--served-model-name", "mine", "yours"])
    assert (several.model_name, several.model_names) == ("mine", ["mine", "yours"])
    with pytest.raises(ServerArgsError, match="served_model_name must be"):
        ServerArgs(served_model_name=["mine", 7])  # type: ignore[list-item]
    assert not ServerArgs(model_path="m").is_demo
    assert ServerArgs(model_path="m").model_name == "m"


def test_no_ranks_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare_server_args(["--model", "m", "--tp-size", "0"])
    assert "tp_size must be at least 1" in capsys.readouterr().err
    with pytest.raises(ServerArgsError, match="ep_size 2 must divide tp_size, which is 3"):
        ServerArgs(tp_size=3, ep_size=2)
    assert prepare_server_args(["--model", "m", "--tp-size", "3"]).tp_size == 3


def test_flags_of_media(tmp_path: Path) -> None:
    argv = ["--no-enable-multimodal", "--allowed-media-domains", "a.org", "b.org", "--allowed-local-media-path"]
    args = prepare_server_args([*argv, str(tmp_path), "--limit-mm-data-per-request", '{"image": 4, "video": 0}'])
    assert args == ServerArgs(
        enable_multimodal=False,
        allowed_media_domains=["a.org", "b.org"],
        allowed_local_media_path=str(tmp_path),
        limit_mm_data_per_request='{"image": 4, "video": 0}',
    )
    assert args.media_limits == {"image": 4, "video": 0}
    assert prepare_server_args(["--enable-multimodal"]) == ServerArgs()
    assert ServerArgs().enable_multimodal and ServerArgs().media_limits == {"image": 64, "video": 4}


def test_documentation_is_up_to_date() -> None:
    """If this fails: ``python -m rtp_llm.srt.configs.server_args > docs/server_arguments.md``."""
    assert (DOCS / "server_arguments.md").read_text() == markdown()
