"""Programs that others wrote, unmodified. ``pip install 'rtp-llm[test-all]'`` brings them."""

import json
from pathlib import Path

import pytest
from programs import check_installed, result_of
from scripted_core import SPECIAL, TEMPLATE, make_spoken_checkpoint, scripted

from tiny_server import Process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-process")]

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: OUTPUT
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
METRICS
"""
SCRIPT = """
import lm_eval
from lm_eval.tasks import TaskManager
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args="model=tiny,base_url=URL/v1/completions,tokenizer=TOKENIZER,num_concurrent=2,max_length=512",
    tasks=["tiny"], task_manager=TaskManager(include_path="FOLDER"), bootstrap_iters=0,
)
import json
print("RESULT", json.dumps(results["results"]["tiny"], default=str))
"""


def test_langchain(server_process: Process) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=f"{server_process.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=8, seed=1
    )
    answer = model.invoke([("system", "a dog"), ("human", "the cat")])
    assert answer.content and answer.usage_metadata["output_tokens"] <= 8
    assert (
        "".join(str(part.content) for part in model.stream([("system", "a dog"), ("human", "the cat")]))
        == answer.content
    )


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_lm_eval(server_process: Process, tiny_checkpoint: str, tmp_path: Path, kind: str) -> None:
    check_installed("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"the {x} sat", "answer": " on"}) + "\n" for x in ("cat", "dog")))
    metrics = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    metrics += "generation_kwargs: {until: ['\\n'], max_gen_toks: 8}"
    if kind == "multiple_choice":
        metrics = (
            "doc_to_choice: [' on', ' off']\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
        )
    task = TASK.replace("DATA", str(data)).replace("OUTPUT", kind).replace("METRICS", metrics)
    (tmp_path / "tiny.yaml").write_text(task)
    script = SCRIPT.replace("URL", server_process.url).replace("TOKENIZER", tiny_checkpoint)
    script = script.replace("FOLDER", str(tmp_path))
    assert result_of(script, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))


LITELLM = """
import json
import litellm

options = {"api_base": "URL/v1", "api_key": "none", "temperature": 0, "max_tokens": 8}
messages = [{"role": "system", "content": "a dog"}, {"role": "user", "content": "the cat"}]
[whole] = litellm.completion("openai/tiny", messages, **options).choices
chunks = list(litellm.completion("openai/tiny", messages, stream=True, **options))
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
reasons = [chunks[-1].choices[0].finish_reason, whole.finish_reason]
try:
    litellm.completion("openai/tiny", [{"role": "user", "content": "cat " * 600}], **options)
except litellm.ContextWindowExceededError:
    print("RESULT", json.dumps([streamed == whole.message.content, *reasons]))
"""


def test_litellm(server_process: Process, tmp_path: Path) -> None:
    check_installed("litellm")
    assert result_of(LITELLM.replace("URL", server_process.url), tmp_path) == [True, "length", "length"]


INSPECT = """
import json
from inspect_ai import Task, eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

task = Task(dataset=[Sample(id=i, input="the cat", target="a") for i in (1, 2)], solver=generate(), scorer=includes())
[log] = evaluate(task, model="openai/tiny", model_base_url="URL/v1", max_tokens=8, temperature=0, display="none",
                 log_dir="FOLDER")
print("RESULT", json.dumps([log.status, log.results.completed_samples, str(log.error)]))
"""


def test_inspect_ai(server_process: Process, tmp_path: Path) -> None:
    check_installed("inspect_ai")
    script = INSPECT.replace("URL", server_process.url).replace("FOLDER", str(tmp_path))
    assert result_of(script, tmp_path, XDG_DATA_HOME=str(tmp_path)) == ["success", 2, "None"]


AGENT = """
import asyncio
import json
import openai
from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)
called = []

@function_tool
def add(a: int, b: int) -> int:
    "Add two numbers."
    called.append(("add", a, b))
    return a + b

@function_tool
def double(number: int) -> int:
    "Double a number."
    called.append(("double", number))
    return 2 * number

async def main():
    client = openai.AsyncOpenAI(base_url="URL/v1", api_key="none", max_retries=0)
    model = OpenAIResponsesModel(model="tiny", openai_client=client)
    agent = Agent(name="Counter", instructions="Count.", model=model, tools=[add, double])
    whole = await Runner.run(agent, "2 + 3, doubled")
    streamed = Runner.run_streamed(agent, "2 + 3, doubled")
    async for _ in streamed.stream_events():
        pass
    kept = await Runner.run(agent, "2 + 3, doubled", auto_previous_response_id=True)
    print("RESULT", json.dumps([called, whole.final_output, streamed.final_output, kept.final_output]))

asyncio.run(main())
"""


def test_openai_agents(tmp_path: Path) -> None:
    """A loop with two tools by the Responses API: whole, streamed, and by the ids of the responses before."""
    check_installed("agents")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    first, second = ('{"name": "add", "arguments": {"a": 2, "b": 3}}', '{"name": "double", "arguments": {"number": 5}}')
    script = [f"<think>Hm</think><tool_call>{call}</tool_call>" for call in (first, second)]
    with scripted(make_spoken_checkpoint(tmp_path, SPECIAL), chat_template=str(template)) as (server, core):
        core.texts = [*script, "It is 10"] * 3
        called, *answers = result_of(AGENT.replace("URL", server.url), tmp_path)
        assert called == [["add", 2, 3], ["double", 5]] * 3 and answers == ["It is 10"] * 3
        assert core.prompts[2] == core.prompts[8] and core.prompts[2].count("<|tool|>") == 2
