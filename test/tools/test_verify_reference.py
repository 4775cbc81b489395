"""A reference that computes tokens one by one otherwise than at once is blamed, not the model file."""

import json
from pathlib import Path

import pytest

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.run import verify
from tiny_models import make_tiny


@pytest.mark.slow
def test_steps_of_the_reference_that_differ_from_its_whole_texts(tmp_path: Path) -> None:
    """Transformers' Nemotron-H bounds the time step of a single token by ``time_step_min``, of a text it does not."""
    checkpoint = Path(make_tiny("NemotronHForCausalLM", tmp_path / "model"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"time_step_min": 2.0}))
    args = ServerArgs(model_path=str(checkpoint), dtype="float32", device="cpu", max_total_tokens=1024)
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=0))
    assert not report.agrees and report.finding is None
    assert "Nothing is found wrong in the model file" in str(report.note)
