"""``rtp-llm verify`` on models without text as their output: what is right agrees, and what is broken is named."""

import json
from pathlib import Path

import pytest
import transformers

from rtp_llm import cli
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.verify.options import VerifyError, VerifyOptions
from rtp_llm.tools.verify.pooled import PooledReport, makes_no_text, verify_pooled
from tiny_models import make_tiny

THREE = {"num_labels": 3}
BROKEN = """
from torch import nn

from rtp_llm.models_py.bert import BertForSequenceClassification


class Broken(BertForSequenceClassification):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.bert.encoder.layer[1].intermediate.act_fn = nn.ReLU()


class BrokenHead(BertForSequenceClassification):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.poolers["classify"].head = self.classifier
"""


def args_of(model_dir: str) -> ServerArgs:
    return ServerArgs(model_path=model_dir, dtype="float32", device="cpu", log_level="error")


def run(model_dir: str, **options: object) -> PooledReport:
    asked = VerifyOptions(**{"max_new_tokens": 1, "long_len": 40} | options)
    assert makes_no_text(args_of(model_dir), asked)
    return verify_pooled(args_of(model_dir), asked)


@pytest.mark.parametrize(
    ("architecture", "config", "tasks"),
    [
        ("BertForMaskedLM", {}, {"embed", "token_embed", "sparse"}),
        pytest.param(
            "XLMRobertaForSequenceClassification", {"pad_token_id": 1, "num_labels": 1}, {"classify", "score"}
        ),
        pytest.param("ModernBertForTokenClassification", THREE, {"token_classify"}, marks=pytest.mark.slow),
        pytest.param("Qwen3ForSequenceClassification", THREE, {"classify"}, marks=pytest.mark.slow),
        pytest.param("ElectraModel", {}, {"embed", "token_embed"}, marks=pytest.mark.slow),
    ],
)
def test_right_models_agree(architecture: str, config: dict[str, object], tasks: set[str], tmp_path: Path) -> None:
    report = run(make_tiny(architecture, tmp_path, **config))
    assert report.agrees and report.first is None and not report.left_out, report
    assert {result.task for result in report.results} == tasks


def test_both_sides_read_the_configuration_in_todays_spelling(tmp_path: Path) -> None:
    """GTE's first checkpoints have NTK-aware scaling, of which transformers knows nothing."""
    config_file = Path(make_tiny("GteForSequenceClassification", tmp_path, num_labels=1), "config.json")
    config = json.loads(config_file.read_text())
    del config["rope_parameters"]
    config |= {"model_type": "new", "architectures": ["NewForSequenceClassification"], "rope_theta": 500.0}
    config_file.write_text(json.dumps(config | {"rope_scaling": {"type": "ntk", "factor": 2.0}}))
    report = run(str(tmp_path))
    assert report.agrees and {result.task for result in report.results} == {"classify", "score"}, report


def test_why_transformers_cannot_make_a_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_for_ntk(*_: object, **__: object) -> None:
        raise KeyError("ntk")

    model_dir = make_tiny("BertModel", tmp_path)
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", looks_for_ntk)
    message = "nothing to compare BertModel.* with: BertModel of transformers cannot be made of .*: KeyError: 'ntk'"
    with pytest.raises(VerifyError, match=message):
        run(model_dir)


@pytest.mark.parametrize(("broken", "module"), [("Broken", "bert.encoder.layer.1.intermediate"), ("BrokenHead", None)])
def test_what_differs_is_named(broken: str, module: str | None, tmp_path: Path) -> None:
    model_dir = make_tiny("BertForSequenceClassification", tmp_path, **THREE)
    file = tmp_path / "broken_bert.py"
    file.write_text(BROKEN)
    report = run(model_dir, model_class=f"{file}:{broken}")
    assert not report.agrees and not report.failure
    assert (None if report.first is None else report.first.place.module) == module
    assert "bert.py" in report.source or module is None


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir = make_tiny("BertForSequenceClassification", tmp_path, **THREE)
    (tmp_path / "broken_bert.py").write_text(BROKEN)
    flags = ["verify", model_dir, "--device", "cpu", "--long-len", "40"]
    assert cli.main(flags) == 0
    assert "They agree" in capsys.readouterr().out
    flags += ["--model-class", f"{tmp_path / 'broken_bert.py'}:Broken"]
    assert cli.main(flags) == 1
    said = capsys.readouterr().out
    assert "They differ" in said and "bert.encoder.layer.1.intermediate" in said
    assert cli.main([*flags, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["first"]["module"] == "bert.encoder.layer.1.intermediate" and not shown["agrees"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    model_dir = make_tiny("BertModel", tmp_path)
    with pytest.raises(VerifyError, match="for models that make text"):
        run(model_dir, schedules=True)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["BgeM3EmbeddingModel"]}))
    with pytest.raises(VerifyError, match="nothing to compare BgeM3EmbeddingModel with"):
        run(model_dir)
