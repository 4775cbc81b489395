"""The contract of pooled outputs: what a model can serve, and results as bytes."""

from array import array

import pytest

from rtp_llm.srt.messages import FinishReason, TokenOutput
from rtp_llm.srt.pooling import MAX_POOLED_BYTES, ONLY_TOKENS, PooledOutput, PooledOutputs, PoolingSpec, PoolingTask
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.zmq_link import MessageCodec

EMBEDS = PooledOutputs((PoolingTask("embed", 8), PoolingTask("token_embed", 8, per_token=True)), generates=False)


def test_what_a_model_serves() -> None:
    assert EMBEDS.problem(PoolingSpec("embed", 8), 10) is None
    assert ONLY_TOKENS.problem(None) is None
    assert "makes no text: its outputs are embed, token_embed" in (EMBEDS.problem(None) or "")
    assert "no output 'score': it has embed, token_embed" in (EMBEDS.problem(PoolingSpec("score")) or "")
    assert "see --convert" in (ONLY_TOKENS.problem(PoolingSpec("embed")) or "")
    assert "from 1 to 8, the size of the model's vectors, not 9" in (EMBEDS.problem(PoolingSpec("embed", 9)) or "")


def test_results_that_are_too_large_are_refused() -> None:
    most = MAX_POOLED_BYTES // 32
    assert EMBEDS.problem(PoolingSpec("token_embed"), most) is None
    assert "256 MiB are sent" in (EMBEDS.problem(PoolingSpec("token_embed"), most + 1) or "")
    assert EMBEDS.problem(PoolingSpec("embed"), most + 1) is None


def test_results_are_bytes_with_a_shape() -> None:
    data = array("f", [1, 2, 3, 4, 5, 6]).tobytes()
    assert PooledOutput(data, [6]).value() == array("f", [1, 2, 3, 4, 5, 6])
    assert PooledOutput(data, [2, 3]).value() == [array("f", [1, 2, 3]), array("f", [4, 5, 6])]
    assert PooledOutput(b"", [0, 3]).value() == []
    for shape in ([5], [2, 2], [-2, -3]):
        with pytest.raises(ValueError, match="24 bytes are no float32 array of shape"):
            PooledOutput(data, shape)


def test_results_travel_between_processes() -> None:
    codec = MessageCodec([TokenOutput])
    output = TokenOutput("a", finish_reason=FinishReason("length", length=0), pooled=PooledOutput(bytes(8), [2]))
    assert codec.decode(codec.encode(output)) == output


def test_a_pooled_output_comes_without_tokens() -> None:
    with pytest.raises(ValueError, match="comes without tokens, not with 3"):
        RequestSpec(SamplingParams(max_new_tokens=3), seed=0, pooling=PoolingSpec("embed"))
