"""The command as a user meets it: what it prints, to the character, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from altered import ALL, CPU_KERNELS, DATA, ONE, PLUGINS, copy, golden, plugins, set_field
from processes import read_line, run_process, start_process
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.cli.output import ProgressBars
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from click.testing import Result

FEW = ("--max-new-tokens", "4", "--temperature", "0", "--device", "cpu")


PICTURE = DATA.parents[2] / "docs" / "page.png"


def run(*arguments: str | Path, env: dict[str, str] = PLUGINS, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(it) for it in arguments], env=env, **options)


@pytest.mark.parametrize("name", ["gptq-4bit-32g-act-sym", "gptq-3bit-noneg-act-sym"])
def test_inspect(name: str) -> None:
    completed = run("inspect", DATA / name, env=ALL)
    assert completed.exit_code == 0
    golden(f"inspect-{name}.txt", completed.stdout)


def test_inspect_makes_a_table_of_several() -> None:
    names = ("gptq-4bit-noneg-act-sym", "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym")
    completed = run("inspect", *(DATA / it for it in names), env=ALL)
    golden("inspect-several.txt", completed.stdout)


def test_inspect_as_json() -> None:
    report = json.loads(run("inspect", DATA / ONE, "--json", env=ALL).stdout)
    assert report["sources"]["bits"] == "quantize_config.json"
    assert report["exllama"] == {"compatible": True, "reason": "runs all 14 layers"}
    assert report["template"]["stop"] == ["<|im_end|>"]
    assert report["size_bytes"] == (DATA / ONE / "model.safetensors").stat().st_size
    uneven = json.loads(run("inspect", DATA / "gptq-4bit-128g-act-sym", "--json", env=ALL).stdout)
    assert uneven["exllama"]["reason"] == (
        "2 of 14 layers have groups of 64 to 128 rows; ExLlama takes groups of one size"
    )
    several = json.loads(run("inspect", DATA / ONE, DATA / ONE, "--json").stdout)
    assert [it["bits"] for it in several] == [4, 4]


def test_inspect_says_what_is_odd_on_stderr(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    set_field(folder, group_size=64, dataset="wikitext2", model_seqlen=4096)
    completed = run("inspect", folder)
    assert (
        "warning: group_size is 64 in quantize_config.json; the tensors say 32" in completed.stderr
    )
    assert "wikitext2, samples of 4,096 tokens" in completed.stdout
    assert "warning" not in completed.stdout


@pytest.mark.parametrize("device", ["cuda:sm86", "rocm"])
def test_explain_answers_for_a_device_that_is_not_here(device: str) -> None:
    completed = run("explain", DATA / ONE, "--device", device, env=ALL)
    assert completed.exit_code == 0, completed.stderr
    golden(f"explain-{ONE}-{device.replace(':', '-')}.txt", completed.stdout)


def test_explain_for_this_machine() -> None:
    completed = run("explain", DATA / ONE, "--device", "cpu")
    assert re.search(
        r"^    cpu(-int4)? +chosen: weights stay packed", completed.stdout, re.MULTILINE
    )
    plan = json.loads(run("explain", DATA / ONE, "--device", "cpu", "--json").stdout)
    first, *others = CPU_KERNELS
    assert plan["kernels"] == {first: 14}
    assert len(plan["layers"]) == 14
    outranked = [it for it in plan["layers"][0]["outranked"] if it != "cpu-int8"]  # by name alone
    assert outranked == [*others, "dense", "reference"]
    assert plan["checkpoint_bytes"] == (DATA / ONE / "model.safetensors").stat().st_size


def test_a_kernel_that_is_asked_for_by_name_and_cannot_run_is_an_error() -> None:
    completed = run("explain", DATA / "gptq-3bit-128g-act-sym", "--device", "cpu", "--backend",
               "exllama", env=ALL)  # fmt: skip
    assert completed.exit_code == 1
    for words in ("no kernel can run", "exllama    needs a CUDA", "cpu-int4   not exllama, which"):
        assert words in completed.stderr
    assert "hint: leave backend out" in completed.stderr
    completed = run("generate", DATA / ONE, "--prompt", "a", "--backend", "exlama")
    assert (
        "hint: name a kernel that is installed: cpu, cpu-int4, cpu-int8, dense, reference"
        in completed.stderr
    )


def test_inspect_and_explain_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from gptq_loader_plugin.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'\n"
    )
    for command in ("inspect", "explain"):
        run_process([sys.executable, "-c", code, command, str(DATA / ONE)], check=True)


def test_generate_writes_the_reply_alone_to_stdout() -> None:
    completed = run("generate", DATA / ONE, "--prompt", "Hello", *FEW)
    assert completed.exit_code == 0, completed.stderr
    with gptq.load(DATA / ONE, device="cpu", plugins=plugins()) as model:
        options = gptq.GenerateOptions(max_new_tokens=4, temperature=0)
        pieces = model.chat([{"role": "user", "content": "Hello"}], options)
        assert completed.stdout == "".join(it.text for it in pieces) + "\n"
    assert re.search(r"cpu(-int4)? \(all 14 layers\) on cpu, computing in \w+", completed.stderr)
    assert re.search(r"\d tokens, \d+ a second; cpu(-int4)? \(all", completed.stderr)


def test_generate_as_json() -> None:
    completed = run("generate", DATA / ONE, "--prompt", "Hello", "--json", *FEW)
    reply = json.loads(completed.stdout)
    assert reply["kernels"] == {CPU_KERNELS[0]: 14}
    assert (reply["template"], reply["tokens"] <= 4) == ("checkpoint", True)


def test_generate_raw_completes() -> None:
    completed = run("generate", DATA / ONE, "--prompt", "Hello", "--raw", *FEW)
    chat = run("generate", DATA / ONE, "--prompt", "Hello", *FEW)
    assert completed.exit_code == chat.exit_code == 0
    assert completed.stdout != chat.stdout


def test_system_card_takes_what_the_card_recommends(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    completed = run("generate", folder, "--prompt", "Hello", "--system", "card", *FEW)
    assert completed.exit_code == 1
    assert "error: the model card gives no system message" in completed.stderr
    card = "We recommend this system message:\n```\nYou are kind.\n```\n"
    (folder / "README.md").write_text(card)
    by_card = run("generate", folder, "--prompt", "Hello", "--system", "card", *FEW)
    by_hand = run("generate", folder, "--prompt", "Hello", "--system", "You are kind.", *FEW)
    without = run("generate", folder, "--prompt", "Hello", *FEW)
    assert by_card.exit_code == 0
    assert by_card.stdout == by_hand.stdout != without.stdout


def test_chat_keeps_the_conversation() -> None:
    typed = "Hello\n\nAgain\n/explain\n/new\nHello\n/quit\nnever\n"
    completed = run("chat", DATA / ONE, *FEW, input=typed)
    assert completed.exit_code == 0, completed.stderr
    first, second, third = completed.stdout.splitlines()[:3]
    assert first == third, "/new starts again"
    assert first != second
    assert "chosen: weights stay packed" in completed.stderr
    assert "/quit leaves" in completed.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are another thing there")
@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
def test_a_chat_in_a_terminal_goes_on_after_what_it_cannot_take(errors: str) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "gptq_loader_plugin", "chat", str(DATA / ONE), *FEW]
    environment = {**os.environ, **PLUGINS, "PYTHONIOENCODING": f"utf-8:{errors}"}
    with start_process(command, stdin=theirs, env=environment, text=False) as chat:
        os.write(ours, b"Hi \xff\nHello\n/quit\n")
        out, err = chat.communicate(timeout=100)
    os.close(ours)
    os.close(theirs)
    assert chat.returncode == 0, err
    assert b"error: " in err
    assert b"hint: " in err
    assert out.replace(b"> ", b"").strip(), "the next message is answered"


def test_a_chat_ends_where_its_input_ends() -> None:
    assert run("chat", DATA / ONE, *FEW, input="Hello\n").exit_code == 0


def test_perplexity(tmp_path: Path, data: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 100)
    options = ("--text", text, "--window-tokens", "64", "--windows", "3", "--device", "cpu")
    completed = run("perplexity", DATA / ONE, *options, "--json")
    measured = json.loads(completed.stdout)
    assert measured["windows"] == 3
    kept = json.loads(Path(measured["kept"]).read_text())["measured"]
    assert [it["perplexity"] for it in kept] == [measured["perplexity"]]
    assert f"kept in {measured['kept']}; the page's Compare tab draws it" in completed.stderr
    assert Path(measured["kept"]).is_relative_to(data)
    again = run("perplexity", DATA / ONE, *options, "--backend", "reference")
    assert float(again.stdout) == pytest.approx(measured["perplexity"], rel=0.02)
    sampled = run("perplexity", DATA / ONE, "--device", "cpu", "--windows", "2", "--json")
    assert json.loads(sampled.stdout)["window_tokens"] == 256, "of the sample"
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, and no folder")
    completed = run(
        "perplexity", DATA / ONE, *options, env={**PLUGINS, "GPTQ_LOADER_DATA": str(blocked)}
    )
    assert completed.exit_code == 0, "a figure that cannot be kept is told nevertheless"
    assert float(completed.stdout) > 1
    assert "the figure cannot be kept" in completed.stderr
    short = tmp_path / "short.txt"
    short.write_text("a")
    completed = run("perplexity", DATA / ONE, "--text", short)
    assert completed.exit_code == 1
    assert "hint:" in completed.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("inspect", "nowhere"), "names no checkpoint; looked in nowhere", "or demo"),
        (("explain", DATA / ONE, "--device", "gpu"), "no device is called 'gpu'", "cuda:sm86"),
        (("explain", DATA / ONE, "--device", "xpu:7"), "no xpu:7 on this", "one that is here"),
        (("generate", DATA / ONE, "--prompt", "a", "--device", "rocm"), "not on this", "explain"),
        (("generate", DATA / ONE, "--prompt", ""), None, None),
        (
            ("generate", DATA / ONE, "--prompt", "a", "--temperature", "-1"),
            "the option temperature",
            "max_new_tokens",
        ),
        (
            ("generate", DATA / ONE, "--prompt", "a", "--template", "chatlm"),
            "no template is called 'chatlm'",
            ".jinja",
        ),
        (("quantize", "nowhere", "out"), "there is no nowhere", "transformers"),
        (("quantize", "nowhere", "out", "--bits", "5"), "bits", "--help"),
        (("quantize", "a", "b", "--own-chats", "--text", "c"), "--own-chats", "one of them"),
        (("perplexity", DATA / ONE, "--text", "nowhere"), "No such file", "check that path"),
        (("perplexity", DATA / ONE, "--text", PICTURE), "is not UTF-8 text", "saved as UTF-8"),
        (("quantize", "a", "b", "--text", "c"), "there is no file c", "name a text"),
        (("quantize", "a", "b", "--group-size", "0"), "group_size: must be positive", "--help"),
        (("quantize", DATA / ONE, "out"), "is quantised already (gptq)", "not quantised"),
        (("quantize", DATA / ONE, DATA), "is not empty", "a new folder"),
        (("inspect", " "), "the reference is empty", "owner/repo"),
        (("inspect", "~nobody-of-this-name/x"), "names no checkpoint", "or demo"),
        (("generate", DATA / ONE, "--prompt", "a", "--revision", "b"), "no revision b", "leave"),
        (("generate", DATA / ONE, "--prompt", "a", "--seed", "9" * 30), "option seed", "seed"),
    ],
)
def test_an_error_is_two_lines(
    arguments: tuple[str | Path, ...], message: str | None, hint: str | None
) -> None:
    completed = run(*arguments)
    if message is None:
        assert completed.exit_code == 0, completed.stderr
        return
    assert completed.exit_code == 1
    assert completed.stdout == ""
    error, last = completed.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert message in completed.stderr
    assert last.startswith("hint: ")
    assert str(hint) in last


def test_a_name_that_terminals_would_obey_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "a\x1b[31mb")
    for completed in (run("inspect", folder), run("inspect", folder / "c")):
        assert "a\\x1b[31mb" in completed.output
        assert "\x1b" not in completed.output
    assert json.loads(run("inspect", folder, "--json").stdout)["path"] == str(folder)


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 0), ("2>&-", 0), (">/dev/full", 1), ("| head -c 0", 0)]
)
@pytest.mark.parametrize("arguments", [("--help",), ("inspect", str(DATA / ONE))])
def test_streams_that_are_closed_or_full(
    arguments: tuple[str, ...], redirection: str, code: int
) -> None:
    command = shlex.join([sys.executable, "-m", "gptq_loader_plugin", *arguments])
    completed = run_process(["bash", "-c", f"{command} {redirection}"])
    assert completed.returncode == code, completed.stderr
    assert "Traceback" not in completed.stderr
    assert "Exception" not in completed.stderr


def test_a_terminal_of_few_letters() -> None:
    folder, name = DATA / ONE, "é"
    command = [sys.executable, "-m", "gptq_loader_plugin", "inspect", f"{folder}{name}"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    completed = run_process(command, text=False, env=env)
    assert completed.stderr.startswith(b"error: ")
    assert b"\\xe9 names no checkpoint" in completed.stderr


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "gptq_loader_plugin", "--debug", "inspect", "nowhere"]
    completed = run_process(command)
    assert completed.returncode == 1
    assert "Traceback" in completed.stderr
    assert "hint: name a folder" in completed.stderr


def test_help_and_version() -> None:
    commands = run("--help").stdout.partition("Commands:")[2]
    assert "..." not in commands, "a command is cut off"
    for name in ("", "demo", "chat", "generate", "inspect", "explain", "quantize", "perplexity"):
        completed = run(*([name] if name else []), "--help")
        assert completed.exit_code == 0
        assert "Usage:" in completed.stdout
    from importlib.metadata import version

    assert run("--version").stdout.strip().endswith(version("gptq-loader-plugin"))


def test_plugins_lists_what_is_installed() -> None:
    listed = json.loads(run("plugins", "--json").stdout)
    names = [it["name"] for it in listed["kernels"]]
    assert names == ["cpu", "cpu-int4", "cpu-int8", "dense", "reference"]
    assert "chatml" in [it["name"] for it in listed["templates"]]
    completed = run("plugins")
    assert re.search(
        r"^reference +yes +kernel-reference +2 to 8 bits on", completed.stdout, re.MULTILINE
    )
    left_out = r"^kernel-triton +no +gptq-loader-plugin [\d.]+ +left out by GPTQ_LOADER_PLUGINS$"
    assert re.search(left_out, completed.stdout, re.MULTILINE)
    assert completed.stderr == ""


def test_plugins_says_how_to_leave_a_broken_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "broken_thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-thing\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[gptq_loader_plugin]\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    completed = run("plugins", env={})
    assert completed.exit_code == 0
    assert re.search(
        r"^broken +no +broken-thing 1.0 +.*no_such_module", completed.stdout, re.MULTILINE
    )
    assert "cpu-int4" in completed.stdout
    assert "warning: broken stands in the way of every load" in completed.stderr
    named = re.search(r"GPTQ_LOADER_PLUGINS=(\S+)", completed.stderr)
    assert named is not None
    assert "error" not in run("explain", DATA / ONE, env={"GPTQ_LOADER_PLUGINS": named[1]}).stderr


def test_ctrl_c_ends_it_with_130() -> None:
    command = [sys.executable, "-m", "gptq_loader_plugin", "generate", DATA / ONE, "--prompt", "a"]
    command += ["--max-new-tokens", "500", "--temperature", "9", "--top-k", "0", "--top-p", "1"]
    with start_process(command, env=os.environ | PLUGINS) as process:
        assert read_line(process, source="stderr"), "the headline: it is loaded"
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode in (130, 0), rest  # 0 where it was done before the signal came
    assert "Traceback" not in rest


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m gptq_loader_plugin inspect {DATA / ONE} | true"
    completed = run_process(["bash", "-c", command])
    assert "Traceback" not in completed.stderr


def test_progress_in_a_log_is_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars()
    for i in range(101):
        bars.gptq_progress(Progress("quantize", i, 100, "layers", f"layer {i}"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "quantize: 0 % layer 0"
    assert lines[-1] == "quantize: 100 % layer 100"


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    bars = ProgressBars()
    for i in range(11):
        bars.gptq_progress(Progress("weights", i, 10, "bytes", "model.layers.0"))
        time.sleep(0.02)
    bars.close()
    assert "weights" in terminal.getvalue()
    assert "%" in terminal.getvalue()
