"""What the client side does when a core dies: what is resubmitted, in which order, and who is to blame."""

from collections.abc import Sequence
from typing import Any

import pytest
from made_requests import generate_request

from rtp_llm.srt.managers.engine_client import EngineClient
from rtp_llm.srt.messages import AbortRequest, FinishReason, TokenOutput
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.srt.scheduler.request import Request


class Link:
    """A link without a core behind it."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def on_messages(self, receive: Any) -> None:
        self.say = lambda *outputs: receive(list(outputs))

    def send(self, message: Any) -> None:
        self.send_all([message])

    def send_all(self, messages: Sequence[Any]) -> None:
        self.sent += messages

    @property
    def rids(self) -> list[str]:
        return [message.rid for message in self.sent]


def submit(client: EngineClient, *rids: str, **options: Any) -> dict[str, list[TokenOutput]]:
    came: dict[str, list[TokenOutput]] = {rid: [] for rid in rids}
    for rid in rids:
        params = SamplingParams(max_new_tokens=50)
        client.submit(generate_request(rid, [1, 2, 3, 4, 5], params, seed=9, **options), came[rid].append)
    return came


def test_what_came_is_kept_apart_from_the_prompt():
    client, first, second = EngineClient(), Link(), Link()
    client.attach(first)
    came = submit(client, "r", return_logprob=True, logprob_start_len=1)
    half = [TokenLogprob(3, -1.0), TokenLogprob(4, -1.0)]
    first.say(TokenOutput("r", prompt_logprobs=half, cached_tokens=1))
    client.detach({"r"})
    client.attach(second)
    (again,) = second.sent
    assert (again.prompt_ids, again.output_ids) == ([1, 2, 3, 4, 5], []) and again.spec.seed == 9
    assert Request.from_message(again, 0).logprob_from == 3
    second.say(TokenOutput("r", [7, 8], prompt_logprobs=[TokenLogprob(5, -1.0)], cached_tokens=3, num_retractions=2))
    client.detach({"r"})
    third = Link()
    client.attach(third)
    (again,) = third.sent
    assert again.output_ids == [7, 8] and Request.from_message(again, 0).logprob_from is None
    third.say(TokenOutput("r", [9], num_retractions=1, finish_reason=FinishReason("stop", matched=9)))
    assert [output.cached_tokens for output in came["r"]] == [1, 1, 1], "usage is that of the first admission"
    assert came["r"][-1].num_retractions == 3
    assert client.num_live == 0


def test_suspects_come_one_by_one_before_the_others():
    client, first, second = EngineClient(), Link(), Link()
    client.attach(first)
    came = submit(client, "a", "b", "waiting", "c")
    client.detach({"a", "b", "c"})
    client.attach(second)
    assert second.rids == ["a"]
    came |= submit(client, "late")
    assert second.rids == ["a"], "whatever else came with it could kill the core, and a would be blamed"
    second.say(TokenOutput("a", [1]))
    assert second.rids == ["a", "b"]
    client.detach({"a", "b"})
    assert came["b"][-1].finish_reason.status_code == 500, "it was running in both deaths, and got nowhere in between"
    assert not any(output.finish_reason for rid in ("a", "c", "waiting", "late") for output in came[rid])
    third = Link()
    client.attach(third)
    third.say(TokenOutput("a", [2]))
    third.say(TokenOutput("c", finish_reason=FinishReason("length", length=50)))
    assert third.rids == ["a", "c", "waiting", "late"]
    came |= submit(client, "later")
    assert third.rids[-1] == "later", "nobody is suspected any more"


def test_a_killer_that_had_not_run_is_not_mistaken_for_one_that_had():
    client, link = EngineClient(), Link()
    client.attach(link)
    came = submit(client, "sound", "killer", "killer too")
    client.detach({"sound", "killer"})
    for token in range(3):  # until both killers are out
        link = Link()
        client.attach(link)
        if link.rids == ["sound"]:  # computes alone before a killer comes
            link.say(TokenOutput("sound", [token]))
        if client.num_live > 1:
            client.detach(set(link.rids))
    assert all(came[rid][-1].finish_reason.status_code == 500 for rid in ("killer", "killer too"))
    assert [output.token_ids for output in came["sound"]] == [[0], [1], [2]]


def test_aborts_reach_what_was_not_sent_yet():
    client, first, second = EngineClient(), Link(), Link()
    client.attach(first)
    came = submit(client, "a", "b", "c")
    client.abort("a")
    assert first.sent[-1] == AbortRequest("a")
    client.detach({"a", "b", "c"})
    assert came["a"][-1].finish_reason.type == "abort", "the dead core did not answer"
    client.abort("b")
    assert came["b"][-1].finish_reason.type == "abort"
    late = submit(client, "late")
    client.attach(second)
    assert second.rids == ["c"]
    second.say(TokenOutput("c", [1]))
    assert second.rids == ["c", "late"]
    client.detach({"late", "c"})
    client.abort(None)
    assert client.num_live == 0 and late["late"][-1].finish_reason.type == "abort"


def test_the_rid_of_an_aborted_request_can_be_used_again_at_once():
    client, link = EngineClient(), Link()
    client.attach(link)
    first = submit(client, "r")
    client.abort("r")
    second = submit(client, "r")
    assert first["r"][-1].finish_reason.type == "abort", "whoever waited for it is told"
    link.say(TokenOutput("r", [1]), TokenOutput("r", [2], finish_reason=FinishReason("length", length=2)))
    assert second["r"] == [], "these were the last words about the first"
    link.say(TokenOutput("r", [3], finish_reason=FinishReason("stop", matched=3)))
    assert [output.token_ids for output in second["r"]] == [[3]] and client.num_live == 0
    client.abort("r")
    with pytest.raises(InvalidRequest, match="choose another"):
        submit(client, "x", "x")


def test_the_rid_of_an_aborted_suspect_can_be_used_again_at_once():
    client, first, second = EngineClient(), Link(), Link()
    client.attach(first)
    submit(client, "a", "b")
    client.detach({"a", "b"})
    client.attach(second)
    client.abort("a")  # it has been sent
    client.abort("b")  # it has not
    again = submit(client, "a", "b")
    assert second.rids == ["a", "a", "a"] and second.sent[1] == AbortRequest("a")
    second.say(TokenOutput("a", finish_reason=FinishReason("abort")))
    assert second.rids == ["a", "a", "a", "b"] and not again["a"]
    second.say(*[TokenOutput(rid, finish_reason=FinishReason("length", length=50)) for rid in "ab"])
    assert client.num_live == 0 and all(len(outputs) == 1 for outputs in again.values())


def test_nothing_is_sent_after_the_end():
    client, first, second = EngineClient(), Link(), Link()
    client.attach(first)
    submit(client, "a", "b")
    client.detach({"a", "b"})
    client.attach(second)
    client.fail_all(None, "the engine has been shut down")
    second.say(TokenOutput("a", [1]))
    assert second.rids == ["a"]
