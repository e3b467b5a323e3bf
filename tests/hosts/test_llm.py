"""llm itself, as a subprocess: its list, its answers, its conversations, its errors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import needs_python_of, python_of
from processes import run_process

from gptq_loader_plugin.quantize.demo import demo_folder

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [needs_python_of("llm"), pytest.mark.host("llm")]

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE, OTHER = "gptq-4bit-32g-act-sym", "gptq-3bit-noneg-act-sym"
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "12")
# What LoadedModel.chat answers, without llm: the messages come as JSON.
EXPECTED = """
import json, sys
import gptq_loader_plugin as gptq

with gptq.load(sys.argv[1]) as model:
    messages = json.loads(sys.argv[2])
    options = gptq.GenerateOptions(temperature=0, max_new_tokens=12)
    pieces = list(model.chat(messages, options))
    text = "".join(piece.text for piece in pieces)
    tokens = len(model.encode_chat(messages)[0])
    print(json.dumps({"text": text, "input": tokens, "output": pieces[-1].tokens}))
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Two checkpoints in a models directory, one in the hub's cache, and an empty llm."""
    for name in (ONE, OTHER):
        shutil.copytree(DATA / name, tmp_path / "models" / name)
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(DATA / ONE, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "gptq-4bit").write_text("a" * 40)
    (tmp_path / "llm").mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LLM_USER_PATH": str(tmp_path / "llm"),
        "GPTQ_LOADER_MODELS": str(tmp_path / "models"),
        "GPTQ_LOADER_CACHE": str(tmp_path / "cache"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def python(environ: dict[str, str], tmp_path: Path) -> Run:
    def run(*arguments: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return run_process(
            [str(python_of("llm")), *arguments],
            input=text,
            cwd=tmp_path,
            env={**environ, **more},
        )

    return run


@pytest.fixture
def llm(python: Run) -> Run:
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "llm", *arguments, **more)

    return run


def answered(completed: subprocess.CompletedProcess[str]) -> str:
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.removesuffix("\n")


def expected(python: Run, messages: list[dict[str, str]], name: str = ONE) -> dict[str, Any]:
    completed = python("-c", EXPECTED, str(DATA / name), json.dumps(messages))
    return json.loads(answered(completed))


def conversation(*turns: str) -> list[dict[str, str]]:
    """Turns by user and assistant, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": it} for i, it in enumerate(turns)]


def test_the_checkpoints_are_listed_without_torch(python: Run, tmp_path: Path) -> None:
    (tmp_path / "models" / "dense").mkdir()
    (tmp_path / "models" / "dense" / "model.safetensors").write_bytes(b"")
    completed = python("-X", "importtime", "-m", "llm", "models", "list", "-q", "gptq/")
    assert answered(completed).splitlines() == [
        f"GPTQ: gptq/{OTHER}",
        f"GPTQ: gptq/{ONE}",
        "GPTQ: gptq/owner/name:gptq-4bit",
    ]
    imported = {line.rpartition("|")[2].strip() for line in completed.stderr.splitlines()}
    assert "gptq_loader_plugin.catalog.local" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_the_demo_is_listed_once_it_is_prepared(llm: Run, tmp_path: Path) -> None:
    assert "gptq/demo" not in answered(llm("models"))
    shutil.copytree(DATA / ONE, demo_folder({"GPTQ_LOADER_CACHE": str(tmp_path / "cache")}))
    assert "GPTQ: gptq/demo" in answered(llm("models"))


def test_an_answer_is_the_models_streamed_or_not_awaited_or_not(llm: Run, python: Run) -> None:
    right = expected(python, conversation("Hello"))
    assert right["text"].strip()
    for more in ((), ("--no-stream",), ("--async",), ("--async", "--no-stream")):
        assert answered(llm("-m", f"gptq/{ONE}", "Hello", *GREEDY, *more)) == right["text"], more
    assert answered(llm("-m", "gptq/owner/name:gptq-4bit", "Hello", *GREEDY)) == right["text"]


def test_a_conversation_goes_on(llm: Run, python: Run) -> None:
    system = {"role": "system", "content": "Be brief."}
    first = answered(llm("-m", f"gptq/{ONE}", "Hello", "-s", "Be brief.", *GREEDY))
    assert first == expected(python, [system, *conversation("Hello")])["text"]
    second = answered(llm("-c", "And then?", *GREEDY))
    right = expected(python, [system, *conversation("Hello", first, "And then?")])
    assert second == right["text"]
    third = answered(llm("-c", "--async", "At last?", *GREEDY))
    turns = conversation("Hello", first, "And then?", second, "At last?")
    assert third == expected(python, [system, *turns])["text"]
    logged = json.loads(answered(llm("logs", "-n", "2", "--json")))[0]
    assert (logged["input_tokens"], logged["output_tokens"]) == (right["input"], right["output"])
    assert logged["model"] == f"gptq/{ONE}"
    assert logged["response_json"]["kernels"]
    assert logged["response_json"]["finish"] == "length"


def test_a_chat_loads_once(llm: Run, python: Run) -> None:
    completed = llm(
        "chat", "-m", f"gptq/{ONE}", *GREEDY, text="Hello\nAnd then?\nquit\n", GPTQ_LOADER_TRACE="1"
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr.count("gptq_before_load [hook]") == 1
    first = expected(python, conversation("Hello"))["text"]
    second = expected(python, conversation("Hello", first, "And then?"))["text"]
    assert f"> {first}\n> {second}\n" in completed.stdout


def test_options_are_checked(llm: Run) -> None:
    completed = llm("-m", f"gptq/{ONE}", "Hello", "-o", "temprature", "0")
    assert completed.returncode == 1
    assert "temprature" in completed.stderr
    completed = llm("-m", f"gptq/{ONE}", "Hello", "-o", "top_p", "2")
    assert completed.returncode == 1
    assert "less than or equal to 1" in completed.stderr
    completed = llm("-m", f"gptq/{ONE}", "Hello", "-o", "stop", '["a"')
    assert "begins like a JSON list" in completed.stderr


def test_options_arrive(llm: Run, python: Run) -> None:
    right = expected(python, conversation("Hello"))["text"]
    stop = right[5:8]
    for written in (stop, json.dumps(["never", stop])):
        completed = llm("-m", f"gptq/{ONE}", "Hello", *GREEDY, "-o", "stop", written)
        assert answered(completed) == right[: right.index(stop)]
    hot = (
        "-o",
        "temperature",
        "5",
        "-o",
        "top_k",
        "0",
        "-o",
        "top_p",
        "1",
        "-o",
        "max_tokens",
        "9",
    )
    once, again, other = (
        answered(llm("-m", f"gptq/{ONE}", "Hello", *hot, "-o", "seed", it)) for it in "112"
    )
    assert once == again != other
    completed = llm("-m", f"gptq/{ONE}", "Hello", *GREEDY, "-o", "backend", "reference")
    assert completed.returncode == 0
    logged = json.loads(answered(llm("logs", "-n", "1", "--json")))[0]
    assert logged["response_json"]["kernels"] == {"reference": 14}
    completed = llm("-m", f"gptq/{ONE}", "Hello " * 40, *GREEDY, "-o", "context", "32")
    assert "the context is 32" in completed.stderr


def test_the_limits_of_options_are_the_packages(python: Run) -> None:
    code = (
        "from gptq_loader_extensions.llm.models import Options\n"
        "from gptq_loader_plugin.generation.options import GenerateOptions\n"
        "names = {'max_tokens': 'max_new_tokens'}\n"
        "for name, field in Options.model_fields.items():\n"
        "    ours = GenerateOptions.model_fields.get(names.get(name, name))\n"
        "    if ours is not None and name != 'stop':\n"
        "        assert field.metadata == ours.metadata, name\n"
        "        print(name)\n"
    )
    assert len(answered(python("-c", code)).splitlines()) == 7


@pytest.mark.parametrize("command", [("prompt",), ("chat",)])
def test_our_errors_come_with_their_hint(llm: Run, command: tuple[str]) -> None:
    words = ("Hello",) if command == ("prompt",) else ()
    completed = llm(*command, "-m", f"gptq/{ONE}", *words, "-o", "backend", "nope", text="Hello\n")
    assert completed.returncode == 1
    assert "Error: " in completed.stderr
    assert "\nhint: " in completed.stderr
    assert "Traceback" not in completed.stderr


def test_a_checkpoint_without_template_completes(llm: Run, tmp_path: Path) -> None:
    folder = tmp_path / "models" / ONE
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for file in folder.glob("*.json"):
        content = (
            file.read_text().replace("<|im_start|>", "<|one|>").replace("<|im_end|>", "<|two|>")
        )
        file.write_text(content)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    completed = llm("-m", f"gptq/{ONE}", "Once upon", *GREEDY)
    assert answered(completed).strip()
    assert "no chat template; it continues the prompt" in completed.stderr
    for more in (("-c",), ("-s", "Be brief.", "-m", f"gptq/{ONE}")):
        completed = llm("Hello", *GREEDY, *more)
        assert completed.returncode == 1
        assert "choose a template: -o template chatml" in completed.stderr
    assert answered(llm("-c", "Hello", *GREEDY, "-o", "template", "chatml")).strip()


def test_models_are_added_and_removed(llm: Run, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(DATA / OTHER, tmp_path / "elsewhere")
    completed = llm("gptq", "add", "elsewhere", "--name", "mine")
    assert answered(completed) == "added; try it: llm -m gptq/mine 'Hello'"
    assert "3-bit llama" in completed.stderr
    assert answered(llm("gptq", "add", str(elsewhere), "--name", "mine")), "the same once more"
    assert answered(llm("-m", "gptq/mine", "Hello", *GREEDY)).strip()
    completed = llm("gptq", "add", f"models/{ONE}", "--name", "mine")
    assert completed.returncode == 1
    assert f"gptq/mine is already {elsewhere}\nhint: choose another name" in completed.stderr
    listed = json.loads(answered(llm("gptq", "list", "--json")))
    assert listed[0] == {"model_id": "gptq/mine", "reference": str(elsewhere), "source": "added"}
    assert len(listed) == 4
    assert answered(llm("gptq", "remove", "gptq/mine")) == "removed gptq/mine"
    assert "mine" not in answered(llm("models"))
    assert "was not added\nhint: " in llm("gptq", "remove", ONE).stderr
    assert elsewhere.is_dir()


def test_what_is_no_checkpoint_is_not_added(llm: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for reference in ("empty", "nowhere", "demo"):
        completed = llm("gptq", "add", reference)
        assert completed.returncode == 1
        assert "hint: " in completed.stderr
        assert "Traceback" not in completed.stderr
    assert "in an environment without llm" in completed.stderr
    assert not (tmp_path / "llm" / "gptq-loader.json").exists()


def test_a_damaged_list_hides_nothing_else(llm: Run, tmp_path: Path) -> None:
    (tmp_path / "llm" / "gptq-loader.json").write_text('{"models": [')
    completed = llm("models")
    assert f"GPTQ: gptq/{ONE}" in answered(completed)
    assert "the list of added models cannot be read" in completed.stderr
    assert "hint: delete it" in llm("gptq", "list").stderr


def test_explain_says_which_kernel(llm: Run) -> None:
    words = answered(llm("gptq", "explain", ONE, "--device", "cuda:sm86"))
    assert "chosen" in words
    assert "triton" in words
    assert "see llm gptq list" in llm("gptq", "explain", "nope").stderr


def test_one_model_is_kept_and_another_takes_its_place(python: Run) -> None:
    code = f"""
import asyncio, gc, llm
from gptq_loader_extensions.llm.model_cache import shared_cache

def ask(name, text="Hello"):
    return llm.get_model("gptq/" + name).prompt(text, temperature=0, max_tokens=8)

ask("{ONE}").text()
first = shared_cache()._entry.model
conversation = llm.get_model("gptq/{ONE}").conversation()
conversation.prompt("Hello", temperature=0, max_tokens=8).text()
assert shared_cache()._entry.model is first
before = conversation.responses[0].input_tokens
reads = []
reuse = first._cache.reuse
def watched(model, ids, *more):
    reads.append((len(ids), reuse(model, ids, *more)))
    return reads[-1][1]
first._cache.reuse = watched
conversation.prompt("And then?", temperature=0, max_tokens=8).text()
(length, (_, reused)), = reads
assert 0 < before <= reused < length, (before, reused, length)

half = iter(ask("{ONE}"))
next(half)
ask("{OTHER}").text()
assert shared_cache()._entry.model is not first
rest = list(half)
assert rest, "a reply under way is not cut off"
assert first._closed, "and then the first model's memory is given back"

async def leave_early():
    response = llm.get_async_model("gptq/{OTHER}").prompt("Hello", temperature=0, max_tokens=400)
    async for _ in response:
        break
    await asyncio.sleep(0)

asyncio.run(leave_early())
gc.collect()
print("done")
"""
    assert answered(python("-c", code)) == "done"
