"""Media for workers in other processes: nothing sent to them grows with an image, and files go with requests."""

import errno
import gc
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from made_requests import generate_request

from rtp_llm.srt.distributed.parallel_state import WorldShape
from rtp_llm.srt.engine import executor as executor_module
from rtp_llm.srt.engine.executor import MultiProcessExecutor
from rtp_llm.srt.managers.engine_client import EngineClient
from rtp_llm.srt.messages import FinishReason, GenerateRequest, ToCore, TokenOutput
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalInputs
from rtp_llm.srt.multimodal.media_store import MediaStore, open_content
from rtp_llm.srt.multimodal.placement import MediaPlacer
from rtp_llm.srt.plan import Admission, StepPlan
from rtp_llm.srt.request_spec import MediaFile
from rtp_llm.srt.utils.ipc import QueueLink
from rtp_llm.srt.utils.zmq_link import MessageCodec

SMALL, LARGE = 10, 1 << 22


def placed(store: MediaStore | None, num_values: int = SMALL) -> tuple[list[int], Any]:
    item = MultimodalDataItem(Modality.IMAGE, torch.arange(num_values), [(1, 2)])
    return MediaPlacer(store=store).place([5, 9, 9], MultimodalInputs([item], im_token_id=9))


def request(store: MediaStore | None, num_values: int, rid: str = "r") -> GenerateRequest:
    ids, media = placed(store, num_values)
    return generate_request(rid, ids, media=media)


def feature(content: bytes | MediaFile) -> torch.Tensor:
    return MultimodalInputs.decode(open_content(content)).mm_items[0].feature


def test_a_file_lives_as_long_as_its_media() -> None:
    store = MediaStore()
    _, media = placed(store)
    path = Path(media.content.path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert torch.equal(feature(media.content), torch.arange(SMALL))
    mapped = MultimodalInputs.decode(open_content(media.content))
    del media
    gc.collect()
    assert not path.exists() and path.parent.exists()
    assert torch.equal(mapped.mm_items[0].feature, torch.arange(SMALL))  # a worker has opened it
    del store
    gc.collect()
    assert not path.parent.exists()


def test_a_file_that_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MediaStore()
    _, media = placed(store)
    folder = Path(media.content.path).parent
    before = set(folder.iterdir())

    def full(path: str, mode: str) -> Any:
        Path(path).touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr("rtp_llm.srt.multimodal.media_store.open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        placed(store)
    assert set(folder.iterdir()) == before


def test_in_one_process_bytes_are_handed_on_as_they_are() -> None:
    asked = request(None, SMALL)
    link = QueueLink()
    EngineClient(link.client).submit(asked, lambda _: None)
    [came] = link.core.drain(block=True)
    assert came.spec.media.content is asked.spec.media.content and isinstance(came.spec.media.content, bytes)


def test_messages_to_the_core_do_not_grow_with_the_image() -> None:
    store, codec = MediaStore(), MessageCodec(get_args(ToCore))
    requests = [request(store, num_values) for num_values in (SMALL, LARGE)]
    small, large = (codec.encode(each) for each in requests)
    assert len(small) == len(large) < 1000
    media = codec.decode(large).spec.media
    assert media == requests[1].spec.media and feature(media.content).shape == (LARGE,)


class Pipes(MultiProcessExecutor):
    """Pretend to be one rank that answers every step by its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(SimpleNamespace(world_shape=WorldShape()), 1.0)
        self.sent: list[bytes] = []
        monkeypatch.setattr(executor_module, "send", lambda _, message: self.sent.append(pickle.dumps(message)))
        monkeypatch.setattr(self, "_gather", lambda *_: ["done"])
        self._pipes = [None]


def test_plans_do_not_grow_with_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    store, executor = MediaStore(), Pipes(monkeypatch)
    for step_id, num_values in enumerate((SMALL, LARGE)):
        asked = request(store, num_values)
        admission = Admission(0, "r", asked.prompt_ids, [], asked.spec)
        executor.submit(StepPlan(step_id, admissions=[admission])).result()
    small, large = (len(sent) for sent in executor.sent if pickle.loads(sent)[0] == "submit")
    assert abs(small - large) < 50 and large < 2000


def test_a_worker_finds_the_media_of_a_request_that_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort may be answered before a worker has taken in the plan that admits the request."""
    store, executor = MediaStore(), Pipes(monkeypatch)
    asked = request(store, SMALL)
    path = asked.spec.media.content.path
    step = executor.submit(StepPlan(7, admissions=[Admission(0, "r", asked.prompt_ids, [], asked.spec)]))
    del asked
    gc.collect()
    assert not os.path.exists(path)
    _, (plan,) = pickle.loads(executor.sent[0])
    content = plan.admissions[0].spec.media.content
    assert torch.equal(feature(content), torch.arange(SMALL))
    step.result()
    assert not os.path.exists(content.path)


def test_a_file_system_without_hard_links_ends_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, name: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr("os.link", no_links)
    store, executor = MediaStore(), Pipes(monkeypatch)
    asked = request(store, SMALL)
    step = executor.submit(StepPlan(7, admissions=[Admission(0, "r", asked.prompt_ids, [], asked.spec)]))
    _, (plan,) = pickle.loads(executor.sent[0])
    content = plan.admissions[0].spec.media.content
    assert content.path != asked.spec.media.content.path
    assert torch.equal(feature(content), torch.arange(SMALL))
    step.result()
    assert not os.path.exists(content.path) and os.path.exists(asked.spec.media.content.path)


def test_media_stay_until_the_core_has_told_the_end() -> None:
    """Even where another request has taken the aborted one's name."""
    store, link = MediaStore(), QueueLink()
    client = EngineClient(link.client)
    first = request(store, SMALL)
    path = first.spec.media.content.path
    client.submit(first, lambda _: None)
    link.core.drain(block=True)
    client.abort("r")
    del first
    client.submit(generate_request("r", [1]), lambda _: None)
    link.core.drain(block=True)
    gc.collect()
    assert os.path.exists(path)
    link.core.send([TokenOutput("r", finish_reason=FinishReason("abort"))])
    gc.collect()
    assert not os.path.exists(path)
    assert client.num_live == 1
