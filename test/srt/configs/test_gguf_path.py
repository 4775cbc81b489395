"""Model paths that mean a GGUF: files, folders, repositories on the hub."""

import json
from pathlib import Path

import pytest

from fake_hub import FakeHub
from gguf_files import arrays_of, llama_metadata, write_gguf
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.model_path import ModelNotFoundError, resolve_model_path
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.models.weight_files import WeightsNotFoundError, find_weight_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a GGUF, of a context of 256 tokens."""
    (tmp_path / "given").mkdir()
    return add(tmp_path / "given", "toy-Q8_0.gguf", 256).parent


def add(folder: Path, name: str, context_length: int) -> Path:
    metadata = llama_metadata(context_length=context_length)
    del metadata["tokenizer.ggml.model"]
    (folder / name).parent.mkdir(exist_ok=True)
    return write_gguf(folder / name, metadata, arrays_of())


def length_of(path: str | Path, **options: str) -> int:
    return ModelConfig.from_pretrained(str(path), **options).context_length


def test_a_file_and_a_folder_with_one(folder, tmp_path):
    assert length_of(folder / "toy-Q8_0.gguf") == length_of(folder) == 256
    unnamed = (folder / "toy-Q8_0.gguf").rename(tmp_path / "no_suffix")
    assert length_of(unnamed) == 256
    config = ModelConfig.from_pretrained(str(unnamed))
    assert config.architectures == ["LlamaForCausalLM"] and config.eos_token_ids == (2,)
    assert length_of(config.model_path) == 256  # as the core's process is told
    assert [path.name for path in find_weight_files(config.model_path)] == ["no_suffix.gguf"]


def test_a_folder_with_several(folder):
    add(folder, "toy-Q4_K_M.gguf", 512)
    add(folder, "F16/toy-F16.gguf", 1024)
    assert length_of(f"{folder}:q4_k_m") == 512 and length_of(f"{folder}:F16") == 1024
    with pytest.raises(ModelNotFoundError, match=r"given: it has 3 GGUF files.*F16/toy-F16.gguf, toy-Q4_K_M.gguf, toy"):
        length_of(folder)
    with pytest.raises(ModelNotFoundError, match="no GGUF file of it matches 'Q2_K'"):
        length_of(f"{folder}:Q2_K")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_other_weights_is_a_hugging_face_checkpoint(folder, weights):
    (folder / weights).touch()
    assert resolve_model_path(str(folder)) == str(folder)
    assert resolve_model_path(str(folder), load_format="safetensors") == str(folder)
    assert length_of(folder, load_format="gguf") == 256


def test_a_config_json_beside_it_is_not_the_ggufs(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as some repositories have it
    assert length_of(folder) == 256


def test_weights_of_the_folder_that_is_made(folder):
    made = resolve_model_path(str(folder))
    for load_format in ("auto", "gguf"):
        assert find_weight_files(made, load_format) == [Path(made) / "toy-Q8_0.gguf"]
    with pytest.raises(WeightsNotFoundError, match="safetensors"):
        find_weight_files(made, "safetensors")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{0}/toy-Q8.gguf", r"there is no file '.*toy-Q8.gguf'; GGUF files in its directory: toy-Q8_0.gguf"),
        ("{0}/away/toy.gguf", "does not exist"),
        ("{0}/notes.txt", r"notes.txt' is a file, but no GGUF; give the directory that holds config.json"),
        ("a/b/c", r"does not exist \(and cannot be a hub id"),
        ("toy.gguf", "there is no file 'toy.gguf'; GGUF files in its directory: none"),
    ],
)
def test_a_wrong_path_is_told(folder, monkeypatch, tmp_path, path, message):
    monkeypatch.chdir(tmp_path)
    (folder / "notes.txt").write_text("nothing")
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model_path(path.format(folder))


def test_a_cut_file_is_told_with_the_tensor(folder):
    file = folder / "toy-Q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(GGUFError, match=r"toy-Q8_0.gguf: tensor 'blk.1.attn_norm.weight': .* truncated, .* Download"):
        length_of(folder)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(GGUFError, match="damaged or truncated"):
        length_of(folder)


def test_a_tokenizer_that_is_not_needed_may_be_of_any_kind(folder):
    metadata = llama_metadata() | {"tokenizer.ggml.model": "unheard"}
    file = str(write_gguf(folder / "toy-Q8_0.gguf", metadata, arrays_of()))
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.model"):
        ModelConfig.from_server_args(ServerArgs(model_path=file))
    other = ServerArgs(model_path=file, tokenizer_path="other")
    assert ModelConfig.from_server_args(other).context_length == 256
    assert ModelConfig.from_server_args(ServerArgs(model_path=file, skip_tokenizer_init=True)).context_length == 256


# The hub


@pytest.fixture
def make_hub(tmp_path, monkeypatch):
    def make(*names: str, offline: bool = False) -> FakeHub:
        source, snapshot = tmp_path / "hub", tmp_path / "snapshot"
        source.mkdir()
        snapshot.mkdir()
        for number, name in enumerate(names):
            if name.endswith(".gguf"):
                add(source, name, 256 + number)
            else:
                (source / name).write_text("{}")
        hub = FakeHub(snapshot, list(names), source, offline)
        hub.install(monkeypatch)
        return hub

    return make


def fetched(hub: FakeHub) -> set[str]:
    return {str(path.relative_to(hub.directory)) for path in hub.directory.rglob("*") if path.is_file()}


REPOSITORY = ("config.json", "toy-Q4_K_M.gguf", "toy-Q8_0.gguf", "sub/toy[1]-F16.gguf", "mmproj-toy.gguf")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("owner/name:q8_0", "toy-Q8_0.gguf"),
        ("owner/name/toy-Q4_K_M.gguf", "toy-Q4_K_M.gguf"),
        ("owner/name/sub/toy[1]-F16.gguf", "sub/toy[1]-F16.gguf"),
        ("owner/name:F16", "sub/toy[1]-F16.gguf"),
    ],
)
def test_one_file_of_a_repository_is_fetched_alone(make_hub, path, name):
    hub = make_hub(*REPOSITORY)
    assert length_of(path, revision="v2", download_dir="/downloads") == 256 + REPOSITORY.index(name)
    assert fetched(hub) == {name}
    assert all(call == {"repo_id": "owner/name", "revision": "v2", "cache_dir": "/downloads"} for call in hub.calls)


def test_a_repository_with_several_says_so(make_hub):
    hub = make_hub(*REPOSITORY)
    for path in ("owner/name", "owner/name:Q2_K"):
        with pytest.raises(ModelNotFoundError, match=r"owner/name: .*owner/name:.*toy-Q4_K_M\.gguf, toy-Q8_0\.gguf"):
            length_of(path)
    assert fetched(hub) == {"config.json"}


def test_the_only_gguf_of_a_repository_without_other_weights(make_hub):
    hub = make_hub("config.json", "toy-Q8_0.gguf", "mmproj-toy.gguf")
    assert length_of("owner/name") == 257
    assert fetched(hub) == {"config.json", "toy-Q8_0.gguf"}


def test_other_weights_of_a_repository_come_first(make_hub):
    hub = make_hub("config.json", "model.safetensors", "toy-Q8_0.gguf")
    assert resolve_model_path("owner/name") == str(hub.directory)
    assert fetched(hub) == {"config.json", "model.safetensors"}
    assert length_of("owner/name", load_format="gguf") == 258


def test_without_the_hub_what_was_fetched_before_is_used(make_hub):
    hub = make_hub(*REPOSITORY, offline=True)
    with pytest.raises(ModelNotFoundError, match="owner/name has no GGUF file"):
        length_of("owner/name:Q8_0")
    add(hub.directory, "toy-Q8_0.gguf", 300)
    assert length_of("owner/name:Q8_0") == 300


def test_a_hub_that_knows_nothing_is_told(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"the hub gave no model owner/name: .* offline"):
        length_of("owner/name:Q8_0", download_dir=str(tmp_path))
