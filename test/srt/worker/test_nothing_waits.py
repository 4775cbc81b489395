"""Launching a step reads no number of the device: neither the model's forward nor the sampler waits for one.

The tests run on a CPU, where waiting costs nothing; they refuse what would wait on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from made_requests import generate_request, request_spec
from stepped_core import Core, mixed_requests
from token_masks import masks_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtp_llm.srt.messages import GenerateRequest
from rtp_llm.srt.plan import Admission, PageWrite, RowWork, StepPlan
from rtp_llm.srt.sampling_params import SamplingParams
from tiny_models import TINY_MODELS, random_prompts

READINGS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__array__")
    + ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__")
}
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class Waited(AssertionError):
    """The host would have waited for a GPU."""


class NoReading(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READINGS:
            raise Waited(f"a tensor is read ({func.__name__})")
        return func(*args, **(kwargs or {}))


class NoShapeOfNumbers(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise Waited(f"a number is read ({func})")
        if func in INDEXING:
            if any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])):
                raise Waited(f"places are counted ({func} with a mask)")
        elif torch.Tag.dynamic_output_shape in func.tags:
            raise Waited(f"a shape depends on numbers ({func})")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    with NoReading(), NoShapeOfNumbers():
        yield


def all_kinds(vocab_size: int) -> list[GenerateRequest]:
    """``mixed_requests``, and the best and chosen tokens of prompts and answers, banned and allowed tokens."""
    variants: list[tuple[dict, dict]] = [
        ({"temperature": 0.0, "bad_words_ids": [[5], [7, 8]]}, {"top_logprobs_num": 3}),
        ({"temperature": 0.9, "allowed_token_ids": list(range(40))}, {"token_ids_logprob": [5, 5, 9]}),
        ({"temperature": 1.1, "top_p": 0.7, "top_k": 20}, {"top_logprobs_num": 9, "token_ids_logprob": [1]}),
    ]
    more = [
        generate_request(
            f"more{i}",
            prompt,
            SamplingParams(max_new_tokens=9, ignore_eos=True, **params),
            i,
            return_logprob=True,
            logprob_start_len=i,
            **logprobs,
        )
        for i, (prompt, (params, logprobs)) in enumerate(
            zip(random_prompts(vocab_size, (25, 50, 200)), variants, strict=True)
        )
    ]
    return mixed_requests(vocab_size) + more


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-default", {}),
    ("llama-default", {"attention_backend": "torch_native"}),
    ("llama-default", {"model_impl": "transformers"}),
    ("llama-dynamic-mlp-bias", {}),  # turned by its sequence's length
    ("qwen3-mixed-window7-tied", {"kv_cache_dtype": "int8"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nothing_but_a_result_waits(name: str, options: dict[str, Any]) -> None:
    requests = all_kinds(TINY_MODELS[name].vocab_size)
    plain = Core(name, depth=1, **options)
    expected = plain.run(requests)

    core = Core(name, depth=1, disable_cpu_graph=True, **options)
    worker = core.executor.worker
    worker.forward, worker.sample = refusing(worker.forward), refusing(worker.sample)
    assert core.run(requests) == expected
    assert core.logprobs() == plain.logprobs()
    told = core.logprobs()["more2"]
    assert len(told) == 200 - 3 + 9 and all(len(x.top) == 9 and len(x.chosen) == 1 for x in told)


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        with no_waiting():
            return function(*args)

    return called


def test_masks_are_no_reason_to_wait_either() -> None:
    core = Core("llama-default", disable_cpu_graph=True)
    worker = core.executor.worker
    admission = Admission(2, "r", [5, 6, 7], [], request_spec(SamplingParams(temperature=0.8), 3, return_logprob=True))
    plan = StepPlan(0, [], [admission], [PageWrite(2, 0, 0, [9, 3, 7])], [RowWork(2, 0, 3, True)], masked_rows=[2])
    with no_waiting():
        pending = worker.sample(worker.forward(plan), masks_of([2], [[17]], 131))
        with pytest.raises(Waited, match="tolist"):  # this is the place that does
            pending.result()
    assert pending.result().rows[0].token_ids == [17]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool((x > 1).any()),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.clone().index_put_((x > 1,), torch.tensor(0)),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, x),
        lambda x: torch.equal(x, x),
        lambda x: list(range(x[0])),
    ],
)
def test_what_would_wait_is_found(waits: Callable[[torch.Tensor], Any]) -> None:
    numbers = torch.tensor([1, 2, 3])
    with no_waiting(), pytest.raises(Waited):
        waits(numbers)
