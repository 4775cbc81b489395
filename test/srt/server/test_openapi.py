"""Requests made up from our own OpenAPI document, right and wrong ones: none may break the server."""

from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tiny_server import InProcess

pytestmark = pytest.mark.xdist_group("server-in-process")


GENEROUS = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def attack(server: InProcess, num_requests: int) -> None:
    """Spreads the requests over all operations that take a body; half of them are wrong on purpose."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    with_body = [operation for operation in operations if operation.body]
    per_mode = -(-num_requests // (2 * len(with_body)))
    codes: Counter[int] = Counter()
    for operation in operations:
        if operation.body:
            codes += call(operation, GenerationMode.POSITIVE, per_mode)
            codes += call(operation, GenerationMode.NEGATIVE, per_mode)
        else:
            codes += call(operation, GenerationMode.POSITIVE, 5)
    assert codes.total() >= num_requests
    assert codes[200] and codes[400] and set(codes) <= {200, 400, 404}


def call(operation: schemathesis.APIOperation, mode: GenerationMode, count: int) -> Counter[int]:
    """How often each status came."""
    codes: Counter[int] = Counter()

    @settings(GENEROUS, max_examples=count)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and case.path == "/abort_request":
            case.body.pop("abort_all", None)  # it would end what other tests run
        codes[case.call_and_validate(checks=[not_a_server_error], timeout=30).status_code] += 1

    run()
    return codes


def test_some_requests(server: InProcess) -> None:
    attack(server, 150)
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200


@pytest.mark.slow
def test_two_thousand_requests(server: InProcess) -> None:
    attack(server, 2000)
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage(server: InProcess, content: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_the_document_describes_what_there_is(server: InProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], f"{method} {path} is not described"
    schemas = document["components"]["schemas"]
    assert {"ChatCompletionRequest", "CompletionRequest", "ChatCompletion", "TextCompletion", "ErrorBody"} <= set(
        schemas
    )
    assert schemas["CompletionRequest"]["additionalProperties"] is False
