"""Other people's clients, unmodified: each completes a loop with a tool and a structured answer.

The model is tiny and random: what it calls and writes has the right form by grammar alone. ``make test-all`` installs
the clients.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import check_installed, result_of
from scripted_core import make_random_speaker

from tiny_server import InProcess, in_process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-in-process")]

BEGINNING = """
import asyncio
import json
from typing import Literal
from pydantic import BaseModel, ConfigDict, Field

URL, ASKED = "{url}/v1", "the weather in Paris"
called = []

class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["Paris", "Rome"]
    rank: int = Field(ge=1, le=9)

class Weather(BaseModel):
    "The weather of a city."
    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]

def weather(city: Literal["Paris", "Rome"], days: Literal[1, 2]) -> str:
    "The weather of a city."
    called.append([city, days])
    return f"sun in {{city}}"

def end(*cities):
    print("RESULT", json.dumps([called, [city.model_dump() for city in cities]]))
"""
LANGCHAIN = """
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(base_url=URL, api_key="none", model="tiny", temperature=0, max_tokens=1500, max_retries=0)
use = tool(weather, args_schema=Weather)
messages = [HumanMessage(ASKED)]
bound = model.bind_tools([use], tool_choice="required", strict=True, parallel_tool_calls=False)
whole = bound.invoke(messages)
streamed = None
for chunk in bound.stream(messages):
    streamed = chunk if streamed is None else streamed + chunk
assert [call["args"] for call in streamed.tool_calls] == [call["args"] for call in whole.tool_calls]
messages += [whole, *(use.invoke(call) for call in whole.tool_calls)]
assert isinstance(messages[-1], ToolMessage) and isinstance(model.invoke(messages).content, str)
end(*(model.with_structured_output(City, method=method).invoke(messages)
      for method in ("json_schema", "function_calling")))
"""
INSTRUCTOR = """
import instructor
import openai

def create(mode, model, messages):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(
        model="tiny", response_model=model, messages=messages, temperature=0, max_tokens=1500, max_retries=0
    )

messages = [{"role": "user", "content": ASKED}]
asked = create(instructor.Mode.TOOLS, Weather, messages)
messages += [{"role": "assistant", "content": asked.model_dump_json()},
             {"role": "user", "content": weather(asked.city, asked.days)}]
modes = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON)
end(*(create(mode, City, messages) for mode in modes[:3]))
"""
PYDANTIC_AI = """
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

def settings(context):
    choice = "required" if context.run_step == 1 else "none"
    return {"temperature": 0.0, "max_tokens": 1500, "parallel_tool_calls": False, "tool_choice": choice}

cities = []
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    model = kind("tiny", provider=OpenAIProvider(base_url=URL, api_key="none"))
    agent = Agent(model, output_type=NativeOutput(City), tools=[weather], model_settings=settings)
    cities.append(agent.run_sync(ASKED).output)
end(*cities)
"""
LITELLM = """
import litellm

tool = {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}}
options = {"api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 1500}
messages = [{"role": "user", "content": ASKED}]
first = litellm.completion("openai/tiny", messages, tools=[tool], tool_choice="required", parallel_tool_calls=False,
                           **options).choices[0]
assert first.finish_reason == "tool_calls"
[call] = first.message.tool_calls
result = weather(**json.loads(call.function.arguments))
messages += [first.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": result}]
assert isinstance(litellm.completion("openai/tiny", messages, tools=[tool], **options).choices[0].message.content, str)
answer = litellm.completion("openai/tiny", messages, response_format=City, **options).choices[0].message.content
end(City.model_validate_json(answer))
"""
AGENTS = """
import openai
from agents import (Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool,
                    set_tracing_disabled)

set_tracing_disabled(True)

async def main():
    cities = []
    client = openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        before = len(called)
        use = function_tool(weather, is_enabled=lambda *_: len(called) == before)
        settings = ModelSettings(temperature=0, max_tokens=1500, tool_choice="required", parallel_tool_calls=False)
        agent = Agent(name="Guide", instructions="Guide.", model=kind(model="tiny", openai_client=client),
                      tools=[use], output_type=City, model_settings=settings)
        cities.append((await Runner.run(agent, ASKED)).final_output)
    end(*cities)

asyncio.run(main())
"""
CLIENTS = {
    "langchain-openai": ("langchain_openai", LANGCHAIN),
    "instructor": ("instructor", INSTRUCTOR),
    "pydantic-ai": ("pydantic_ai", PYDANTIC_AI),
    "litellm": ("litellm", LITELLM),
    "openai-agents": ("agents", AGENTS),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """A random model that calls tools in a form of its own. It does not think, which it would never end."""
    path, template = make_random_speaker(tmp_path_factory.mktemp("random"))
    with in_process(path, chat_template=template, reasoning_parser="none") as running:
        yield running


@pytest.mark.parametrize("name", CLIENTS)
def test_a_loop_with_a_tool_and_a_structured_answer(server: InProcess, tmp_path: Path, name: str) -> None:
    module, script = CLIENTS[name]
    check_installed(module)
    called, cities = result_of(BEGINNING.format(url=server.url) + script, tmp_path)
    assert called and all(city in ("Paris", "Rome") and days in (1, 2) for city, days in called)
    assert cities and all(city["name"] in ("Paris", "Rome") and 1 <= city["rank"] <= 9 for city in cities)
