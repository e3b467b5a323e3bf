"""`gptq-loader serve --engine vllm`: the real server of vLLM, and an OpenAI client's requests."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest
from altered import DATA, NAMES
from environments import branches, needs_python_of, python_of
from processes import ServerProcess, run_process
from vllm_checkpoints import ACT_ORDER, ALTERED, make
from vllm_process import ask, ours
from vllm_server import ENVIRON, chat, command, family, post, serving, stream, wait_until_gone
from waiting import eventually

import gptq_loader_plugin as gptq
from gptq_loader_extensions.vllm.planning.eligibility import (
    config_refusal,
    refusal,
    stored_quantization,
)
from gptq_loader_extensions.vllm.planning.fused_layers import fused_layers
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.device import find_device

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
]

BRANCHES = {it.name: it for it in branches()}
REFUSED = "gptq-4bit-32g-actorder_True"  # by vLLM itself
TAKEN = "main"
FRANCE = "What is the capital of France?"
TOKENS = 24
SHORT = "gptq-4bit-128g-noact-sym"  # 192 rows: one group, and half of one
HALF_CLOSE = 0.03  # in log-probability: float16 throughout
ASK_VLLM = """
import json, sys
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
for config in json.loads(sys.argv[1]):
    try:
        AutoGPTQConfig.from_config(config)
        print("ANSWER takes")
    except Exception as error:
        print("ANSWER refuses")
"""

needs_branches = pytest.mark.skipif(
    len(BRANCHES) < 6, reason="SmolLM2's six branches are not here; python bench/branches.py"
)


@pytest.fixture(scope="module")
def refused() -> Iterator[ServerProcess]:
    """Serve in float32 a branch that vLLM would not, with a key."""
    folder = BRANCHES[REFUSED]
    with serving(
        folder, "--dtype", "float32", "--context", "512", environ={"GPTQ_LOADER_API_KEY": "sesame"}
    ) as server:
        yield server


@needs_branches
def test_it_says_where_it_listens_and_which_kernels_run(refused: ServerProcess) -> None:
    assert refused.ready["model"] == REFUSED
    assert refused.ready["quantization"] == "gptq_loader"
    program = [str(python_of("vllm")), "-P", "-m", "gptq_loader_plugin"]
    explained = run_process(
        [*program, "explain", str(BRANCHES[REFUSED]), "--engine", "vllm", "--json"],
        env={"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
        check=True,
    )
    planned = json.loads(explained.stdout)
    assert planned["installed"].startswith("vllm")
    assert planned["kernels"] == refused.ready["kernels"]
    assert sum(refused.ready["kernels"].values()) == 120  # 4 of vLLM's in each of 30 blocks
    assert "any client of OpenAI's" in refused.log
    assert "qkv_proj and layers like it" in refused.log
    assert "Traceback" not in refused.log


@needs_branches
def test_a_chat_is_the_text_that_this_package_writes(refused: ServerProcess) -> None:
    answer = chat(refused, FRANCE, max_tokens=TOKENS)
    greedy = gptq.GenerateOptions(temperature=0, max_new_tokens=TOKENS)
    with gptq.load(BRANCHES[REFUSED], device="cpu", dtype="float32") as loaded:
        messages = [{"role": "user", "content": FRANCE}]
        pieces = list(loaded.chat(messages, greedy))
        prompt = loaded.template.encode(messages, loaded.tokenizer)
    assert answer["choices"][0]["message"]["content"] == "".join(it.text for it in pieces)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["finish_reason"] == pieces[-1].finish


@needs_branches
def test_a_completion_is_the_text_that_this_package_writes(refused: ServerProcess) -> None:
    prompt = "The harbour was quiet before dawn."
    request = {"model": REFUSED, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    choice = post(refused, "/v1/completions", request).json()["choices"][0]
    with gptq.load(BRANCHES[REFUSED], device="cpu", dtype="float32") as loaded:
        greedy = gptq.GenerateOptions(temperature=0, max_new_tokens=TOKENS)
        reply = loaded.generate(prompt, greedy)
    assert choice["text"] == reply.text


@needs_branches
def test_a_stream_is_the_whole_reply_in_pieces_with_its_usage(refused: ServerProcess) -> None:
    whole = chat(refused, FRANCE, max_tokens=TOKENS)
    *pieces, last = stream(refused, FRANCE, max_tokens=TOKENS)
    texts = [it["choices"][0]["delta"].get("content") or "" for it in pieces]
    assert sum(map(bool, texts)) > 1
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@needs_branches
def test_a_reply_ends_at_a_stop_and_at_the_limit(refused: ServerProcess) -> None:
    whole = chat(refused, FRANCE, max_tokens=TOKENS)["choices"][0]["message"]["content"]
    stop = whole.split()[2]
    stopped = chat(refused, FRANCE, max_tokens=TOKENS, stop=[stop])["choices"][0]
    assert stopped["message"]["content"] == whole.partition(stop)[0]
    assert stopped["finish_reason"] == "stop"
    assert chat(refused, FRANCE, max_tokens=3)["choices"][0]["finish_reason"] == "length"


@needs_branches
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations", "/tokenize"])
def test_without_the_key_no_path_answers(refused: ServerProcess, path: str) -> None:
    request = {"model": REFUSED, "messages": [{"role": "user", "content": FRANCE}]}
    for key in ("wrong", None):
        answer = post(refused, path, request, key=key)
        assert answer.status_code == 401
        assert "API key" in answer.json()["error"]["message"]


@needs_branches
def test_ctrl_c_leaves_no_process(refused: ServerProcess) -> None:
    """The last of those that share the server."""
    processes = family(refused)
    session = processes[0]
    assert len(processes) > 1
    refused.process.send_signal(signal.SIGINT)
    assert refused.process.wait(timeout=120) == 130
    wait_until_gone(session)
    eventually(lambda: refused.log.rstrip().endswith("stopped"), awaited="its last word")


@needs_branches
def test_a_branch_that_vllm_takes_is_served_and_ends_with_its_parent() -> None:
    with serving(BRANCHES[TAKEN], "--context", "512") as server:
        assert server.ready["quantization"] == "gptq_loader"  # on a CPU
        answer = chat(server, FRANCE, max_tokens=TOKENS)
        assert answer["choices"][0]["message"]["content"]
        session = family(server)[0]
        server.process.kill()
        server.process.wait(timeout=60)
        wait_until_gone(session)


def test_two_workers_write_what_one_process_writes() -> None:
    folder = DATA / ACT_ORDER
    with serving(folder, "--tensor-parallel", "2", "--dtype", "float32") as server:
        content = chat(server, FRANCE, max_tokens=TOKENS)["choices"][0]["message"]["content"]
    with gptq.load(folder, device="cpu", dtype="float32") as loaded:
        greedy = gptq.GenerateOptions(temperature=0, max_new_tokens=TOKENS)
        pieces = list(loaded.chat([{"role": "user", "content": FRANCE}], greedy))
    assert content == "".join(it.text for it in pieces)


@needs_branches
def test_a_start_that_fails_reports_the_reason_of_vllm() -> None:
    """SmolLM2 has nine heads."""
    failed = run_process(
        command(BRANCHES[REFUSED], "--tensor-parallel", "2"), env=ENVIRON, seconds=600
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "error: vLLM did not start: " in failed.stderr
    assert "attention heads (9) must be divisible by tensor parallel size (2)" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_rules_refuse_the_labels_that_vllm_refuses(tmp_path: Path) -> None:
    altered = [make(it, tmp_path / it) for it in ALTERED]
    folders = [DATA / it for it in NAMES] + altered + list(BRANCHES.values())
    labels = [it for folder in folders if (it := stored_quantization(folder))]
    program = [str(python_of("vllm")), "-c", ASK_VLLM, json.dumps(labels)]
    completed = run_process(program, cwd=tmp_path, check=True)
    answers = [it for it in completed.stdout.splitlines() if it.startswith("ANSWER")]
    expected = ["ANSWER refuses" if config_refusal(it) else "ANSWER takes" for it in labels]
    assert answers == expected
    assert len(set(expected)) == 2


def test_vllm_alone_is_right_where_the_rules_say() -> None:
    """Float16: in bfloat16, vLLM's own kernel ends the process on these widths, on some CPUs.

    Rows without groups that its blocks do not divide are refused for that alone.
    """
    folders = [DATA / it for it in NAMES]
    answers = ask(folders, environ={"VLLM_PLUGINS": ""}, dtype="float16", enforce_eager=True)
    opened = [open_checkpoint(it) for it in folders]
    cpu = find_device("cpu")
    refusals = {it.path.name: refusal(it, fused_layers(it), cpu) for it in opened}
    expected = {
        name
        for name, reason in refusals.items()
        if reason is None or "vLLM cuts rows without groups into blocks" in reason
    }
    right = {
        folder.name
        for folder, answer in zip(folders, answers, strict=True)
        if not answer.error and answer.off_by(ours(folder)) <= HALF_CLOSE
    }
    assert right == expected
    assert expected


def test_a_short_last_group_which_vllm_would_mistake_is_taken_without_being_asked() -> None:
    folder = DATA / SHORT
    (alone,) = ask([folder], environ={"VLLM_PLUGINS": ""}, dtype="float16", enforce_eager=True)
    (taken,) = ask([folder], dtype="float16", enforce_eager=True)
    right = ours(folder)
    assert alone.off_by(right) > HALF_CLOSE  # else this can go
    assert taken.quantization == "gptq_loader"
    assert taken.off_by(right) <= HALF_CLOSE
