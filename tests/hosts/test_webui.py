"""text-generation-webui itself, headless, with real checkpoints: load, complete, stop, unload."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import branches, needs_python_of
from waiting import eventually
from webui_process import WEBUI, Webui, in_webui

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.host("webui"),
    pytest.mark.skipif(
        not (WEBUI / "server.py").is_file(),
        reason="WEBUI_DIR names no checkout of text-generation-webui",
    ),
    needs_python_of("webui"),
]

NAME = "GPTQ (gptq_loader_plugin)"
DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = DATA / "gptq-4bit-32g-act-sym"
TINY = sorted(it for it in DATA.glob("gptq*") if it.is_dir())
REAL = branches() or [ONE]
# A random model's text is mostly halves of characters, which the host holds back.
needs_words = pytest.mark.skipif(
    not branches(), reason="no model that writes words; bench/branches.py makes build/branches"
)
TOKENS = 40
CLOSE = 0.05  # the two best logits, where bfloat16 may choose either
CHATML = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TURNS = ({"role": "system", "content": "S"}, {"role": "user", "content": "hi"})
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
HALF = "\ufffd"  # a character cut short at the end of a reply, which we leave out
TINY_PROMPT = "<s>The old house on the hill"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    """The host, started with a checkpoint of ours by name and by `--loader gptq`."""
    made = Webui(
        tmp_path_factory.mktemp("webui"),
        ["--nowebui", "--model", ONE.name, "--loader", "gptq"],
    )
    made.add(ONE)
    with made:
        yield made


def prompt_for(checkpoint: Path) -> str:
    return TINY_PROMPT if checkpoint.parent == DATA else QUESTION


def greedy(checkpoint: Path, prompt: str, **options: Any) -> gptq.Reply:
    with gptq.load(checkpoint, device="cpu", **options) as model:
        return model.generate(prompt, gptq.GenerateOptions(max_new_tokens=TOKENS, temperature=0))


def test_it_starts_with_a_model_of_ours(host: Webui) -> None:
    assert f'LOADER: "{NAME}"' in host.log()
    assert 'LOADER: "Transformers"' not in host.log()
    assert "KERNELS: " in host.log()
    text, usage = host.complete(TINY_PROMPT, TOKENS)
    assert text
    assert usage["completion_tokens"] == TOKENS


@pytest.mark.parametrize("checkpoint", [*TINY, *REAL], ids=lambda it: it.name)
def test_in_float32_the_host_generates_our_tokens(host: Webui, checkpoint: Path) -> None:
    prompt = prompt_for(checkpoint)
    assert host.load(host.add(checkpoint), gptq_backend="reference") == NAME
    text, usage = host.complete(prompt, TOKENS)
    reply = greedy(checkpoint, prompt, backend="reference")
    assert text.rstrip(HALF) == reply.text
    assert usage == {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "total_tokens": reply.prompt_tokens + reply.tokens,
    }


@pytest.mark.parametrize("checkpoint", [*TINY[:4], *REAL], ids=lambda it: it.name)
def test_with_the_chosen_kernel_it_differs_only_where_two_tokens_are_as_likely(
    host: Webui, checkpoint: Path
) -> None:
    import torch

    prompt = prompt_for(checkpoint)
    assert host.load(host.add(checkpoint)) == NAME
    answer = host.post(
        "/v1/completions", prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=1
    )["choices"][0]
    with gptq.load(checkpoint, device="cpu") as model:
        ours = model.generate(prompt, gptq.GenerateOptions(max_new_tokens=TOKENS, temperature=0))
        if answer["text"].rstrip(HALF) == ours.text:
            return
        tokens = [next(iter(top)) for top in answer["logprobs"]["top_logprobs"]]
        ids = model.tokenizer(prompt)["input_ids"]
        for token in tokens:
            with torch.inference_mode():
                logits = model.model(torch.tensor([ids])).logits[0, -1].float()
            best = logits.topk(2)
            ids = [*ids, int(best.indices[0])]
            if model.tokenizer.decode(ids[-1:]) != token:
                assert float(best.values[0] - best.values[1]) <= CLOSE
                return


def test_one_model_after_another_and_by_every_name(host: Webui) -> None:
    for name in (NAME, "gptq", "GPTQ", "gptq_loader_plugin", None):
        assert host.load(host.add(ONE), **({} if name is None else {"loader": name})) == NAME
    other = host.add(DATA / "gptq-8bit-128g-act-sym")
    assert host.load(other, gptq_backend="dense") == NAME
    assert "dense (all 14 layers)" in host.log().rpartition("KERNELS:")[2]
    assert host.load(host.add(ONE)) == NAME
    assert "cpu (all 14 layers)" in host.log().rpartition("KERNELS:")[2], "back to auto"
    host.unload()
    assert host.get("/v1/internal/model/info")["model_name"] == "None"


def legacy(host: Webui, weights: str, *, config: bool) -> str:
    """A checkpoint as of 2023: nothing in config.json, and weights by another name."""
    name = f"legacy-{weights}-{config}"
    folder = host.models / host.add(ONE, name)
    written = json.loads((folder / "config.json").read_text())
    del written["quantization_config"]
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "model.safetensors").rename(folder / weights)
    if not config:
        (folder / "quantize_config.json").unlink()
    return name


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        ("model.safetensors", True),
        ("gptq_model-4bit-128g.safetensors", True),
        ("llama-4bit-32g.safetensors", False),
    ],
)
def test_a_checkpoint_of_2023_is_found_and_read(host: Webui, weights: str, config: bool) -> None:
    name = legacy(host, weights, config=config)
    assert name in host.get("/v1/internal/model/list")["model_names"]
    assert host.load(name, gptq_backend="reference") == NAME
    text, _ = host.complete(TINY_PROMPT, TOKENS)
    assert text.rstrip(HALF) == greedy(ONE, TINY_PROMPT, backend="reference").text


def without_template(host: Webui, name: str) -> Path:
    folder = host.models / host.add(ONE, name)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_the_template_is_the_one_our_rules_find(host: Webui) -> None:
    bare = without_template(host, "bare")
    host.load(bare.name)
    assert host.prompt_of(*TURNS) == CHATML
    own = host.add(ONE)
    (host.models / own / "chat_template.jinja").write_text(
        "{% for it in messages %}[{{ it.role }}] {{ it.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    host.load(own)
    assert host.prompt_of(*TURNS).startswith("[system] S\n[user] hi\n[assistant]")
    host.load(own, gptq_template="chatml")
    assert host.prompt_of(*TURNS) == CHATML
    card = without_template(host, "card")
    (card / "README.md").write_text(
        "---\nprompt_template: |\n  {system_message}\n  USER: {prompt}\n  ASSISTANT:\n---\n"
    )
    host.load(card.name)
    assert host.prompt_of(*TURNS).startswith("S\nUSER: hi\nASSISTANT:")
    shutil.rmtree(host.models / own)


def test_the_context_is_what_is_asked_for(host: Webui) -> None:
    host.load(host.add(ONE), gptq_context=64)
    _, usage = host.complete(TINY_PROMPT, 40, auto_max_new_tokens=True, ban_eos_token=True)
    assert usage["total_tokens"] == 64
    why = host.refused(
        "/v1/internal/model/load", model_name=ONE.name, args={"gptq_context": 100_000}
    )
    assert why.startswith("a context of 100,000 tokens was asked for; this model takes 2 to 512")
    assert "\nhint: ask for less" in why


def test_a_load_that_fails_says_why_and_the_host_stays_up(host: Webui) -> None:
    name = host.add(ONE)
    why = host.refused("/v1/internal/model/load", model_name=name, args={"gptq_backend": "triton"})
    assert "needs a CUDA or ROCm GPU; this is cpu" in why
    assert "\nhint: " in why
    assert f"Cannot load {name}: no kernel can run" in host.log()
    damaged = host.models / host.add(ONE, "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    why = host.refused("/v1/internal/model/load", model_name="damaged")
    assert "model.safetensors" in why
    assert "\nhint: download the" in why
    why = host.refused("/v1/internal/model/load", model_name=name, args={"gptq_context": "many"})
    assert "the context must be a number of tokens" in why
    why = host.refused("/v1/internal/model/load", model_name="not-there", args={"loader": "gptq"})
    assert "not-there names no checkpoint" in why
    assert host.load(name) == NAME
    assert host.complete(TINY_PROMPT, 4)[1]["completion_tokens"] == 4


@needs_words
def test_events_stream_with_usage(host: Webui) -> None:
    checkpoint = REAL[0]
    host.load(host.add(checkpoint), gptq_backend="reference")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    events = list(
        host.stream("/v1/chat/completions", **body, stream_options={"include_usage": True})
    )
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1] == {}
    text = "".join(
        event["choices"][0]["delta"].get("content") or ""
        for event in events[:-1]
        if event["choices"]
    )
    whole = host.post("/v1/chat/completions", **body)
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["usage"] == events[-2]["usage"]
    prompt = host.prompt_of(*messages)
    with gptq.load(checkpoint, device="cpu", backend="reference") as model:
        assert whole["usage"]["prompt_tokens"] == len(model.tokenizer(prompt)["input_ids"])
        options = gptq.GenerateOptions(max_new_tokens=12, temperature=0)
        pieces = list(model.chat(messages, options))
    assert text == "".join(it.text for it in pieces)
    assert whole["usage"]["completion_tokens"] == pieces[-1].tokens


@needs_words
def test_stop_texts_end_a_reply(host: Webui) -> None:
    checkpoint = REAL[0]
    host.load(host.add(checkpoint), gptq_backend="reference")
    text, _ = host.complete(QUESTION, TOKENS)
    stop = text.split()[3]
    assert host.complete(QUESTION, TOKENS, stop=[stop])[0] == text.partition(stop)[0]


def long_reply(host: Webui) -> dict[str, Any]:
    """A reply that would take long: it never ends by itself."""
    host.load(host.add(REAL[0]))
    return {
        "prompt": prompt_for(REAL[0]),
        "max_tokens": 400,
        "temperature": 1.5,
        "seed": 1,
        "ban_eos_token": True,
    }


def ended(host: Webui, before: int) -> int:
    """Wait for a reply to end; return how many tokens it has."""
    eventually(
        lambda: len(host.generated()) > before,
        seconds=60,
        awaited="the end of the reply",
        log=host.log,
    )
    return host.generated()[-1]


@needs_words
def test_who_goes_away_ends_the_reply_within_a_token(host: Webui) -> None:
    body = long_reply(host)
    before = len(host.generated())
    events = host.stream("/v1/completions", **body)
    received = [next(events) for _ in range(9)]
    events.close()
    assert received
    # The first event has no token; one more may be on its way, and one be computed.
    assert ended(host, before) <= len(received) - 1 + 2


def test_who_goes_away_without_a_stream_ends_the_reply_too(host: Webui) -> None:
    import socket

    body = json.dumps(long_reply(host)).encode()
    before = len(host.generated())
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", host.port)) as client:
        client.sendall(head.encode() + body)
        time.sleep(0.5)
    assert 0 < ended(host, before) < 400


@needs_words
def test_stop_generation_stops(host: Webui) -> None:
    body = long_reply(host)
    before = len(host.generated())
    events = host.stream("/v1/completions", **body)
    received = [next(events) for _ in range(9)]
    host.post("/v1/internal/stop-generation")
    received += list(events)
    assert received[-1] == {}
    assert ended(host, before) < 40


def test_unloading_ends_a_reply_first(host: Webui) -> None:
    events = host.stream("/v1/completions", **long_reply(host))
    for _ in range(5):
        next(events)
    host.unload()
    events.close()
    assert host.load(host.add(ONE)) == NAME
    assert host.complete(TINY_PROMPT, 4)[1]["completion_tokens"] == 4


def test_twenty_loads_leave_the_memory_of_the_first(host: Webui) -> None:
    names = [host.add(it) for it in REAL[:2]]

    def loaded_and_unloaded(name: str) -> int:
        host.load(name)
        host.complete(prompt_for(REAL[0]), 16)
        host.unload()
        return host.resident()

    first = max(loaded_and_unloaded(it) for it in names)
    last = 0
    for i in range(20):
        last = loaded_and_unloaded(names[i % len(names)])
    assert last <= 1.05 * first, f"{first:,} bytes after the first, {last:,} after twenty more"


def test_the_hosts_own_loader_gives_what_it_gave(host: Webui, tmp_path: Path) -> None:
    plain = DATA / "base"
    assert host.load(host.add(plain)) == "Transformers"
    ours = host.complete(TINY_PROMPT, TOKENS)[0]
    why = host.refused(
        "/v1/internal/model/load", model_name=host.add(ONE), args={"loader": "Transformers"}
    )
    nonsense = host.refused(
        "/v1/internal/model/load", model_name=plain.name, args={"loader": "nonsense"}
    )
    stock = Webui(tmp_path, ["--nowebui"], ours=False)
    stock.add(plain)
    stock.add(ONE)
    with stock:
        assert stock.load(plain.name) == "Transformers"
        assert stock.complete(TINY_PROMPT, TOKENS)[0] == ours
        for loader, reason in (("Transformers", why), ("nonsense", nonsense)):
            name = ONE.name if loader == "Transformers" else plain.name
            assert reason == stock.refused(
                "/v1/internal/model/load", model_name=name, args={"loader": loader}
            )


def test_a_model_that_cannot_be_loaded_at_start_leaves_the_host_up(tmp_path: Path) -> None:
    made = Webui(tmp_path, ["--nowebui", "--model", "damaged"])
    folder = made.models / made.add(ONE, "damaged")
    (folder / "model.safetensors").write_bytes(b"")
    with made:
        assert "Cannot load damaged" in made.log()
        assert "hint: download the" in made.log()
        assert made.get("/v1/internal/model/info")["model_name"] == "None"
        assert made.load(made.add(ONE)) == NAME


def installed(folder: Path) -> None:
    """Put the extension where `webui install` puts it."""
    from gptq_loader_extensions.webui import script

    extension = folder / "user_data" / "extensions" / "gptq_loader"
    extension.mkdir(parents=True)
    shutil.copy(str(script.__file__), extension / "script.py")


def test_as_an_extension_it_adds_the_loader(tmp_path: Path) -> None:
    made = Webui(tmp_path, ["--nowebui", "--extensions", "gptq_loader"], ours=False)
    installed(tmp_path)
    name = made.add(ONE)
    with made:
        assert made.load(name) == NAME
        text, usage = made.complete(TINY_PROMPT, TOKENS)
        assert text
        assert usage["completion_tokens"] == TOKENS


def test_an_extension_says_that_a_model_was_loaded_before_it(tmp_path: Path) -> None:
    """As a dense model with random weights: text-generation-webui reads no quantize_config.json."""
    made = Webui(
        tmp_path,
        ["--nowebui", "--model", "legacy-model.safetensors-True", "--extensions", "gptq_loader"],
        ours=False,
    )
    installed(tmp_path)
    name = legacy(made, "model.safetensors", config=True)
    with made:
        log = " ".join(made.log().split())
        assert f"{name} was loaded at start-up, before the GPTQ loader was added" in log
        assert "start with: gptq-loader webui run" in log
        assert made.load(name) == NAME


def test_an_extension_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "gptq_loader_extensions"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'gptq_loader_extensions'\", "
        "name='gptq_loader_extensions')"
    )
    made = Webui(
        tmp_path,
        ["--nowebui", "--extensions", "gptq_loader"],
        ours=False,
        more={"PYTHONPATH": str(absent.parent)},
    )
    installed(tmp_path)
    with made:
        log = " ".join(made.log().split())
        assert "GPTQ checkpoints cannot be loaded: No module named 'gptq_loader_extensions'" in log
        assert "pip install gptq-loader-plugin" in log
        assert made.load(made.add(DATA / "base")) == "Transformers"


def test_registering_twice_changes_nothing_more() -> None:
    """A restart of the page runs script.py again, as a new module."""
    out = in_webui(
        "sys.argv = ['server.py', '--nowebui', '--loader', 'gptq']\n"
        "from gptq_loader_extensions.webui.register import register\n"
        "from modules import loaders, models, models_settings, shared, text_generation\n"
        "names = [(models, 'load_model'), (models, 'unload_model'),\n"
        "    (models, 'transformers_loader'), (models_settings, 'infer_loader'),\n"
        "    (models_settings, 'get_model_metadata'), (text_generation, 'generate_reply_HF')]\n"
        "def state():\n"
        "    names_of = loaders.list_model_elements\n"
        "    values = [getattr(*it) for it in names]\n"
        "    return values, list(loaders.loaders_and_params), names_of().copy()\n"
        "register()\n"
        "once = state()\n"
        "register()\n"
        "assert state() == once\n"
        "assert shared.args.loader in loaders.loaders_and_params\n"
        "print(once[1][-1], once[2].count('gptq_backend'))"
    )
    assert out.splitlines()[-1] == f"{NAME} 1"


def test_every_change_is_undone() -> None:
    out = in_webui(
        "sys.argv = ['server.py', '--nowebui', '--api', '--loader', 'gptq']\n"
        "from gptq_loader_extensions.webui.register import register\n"
        "from gptq_loader_plugin.system.patch import undo_all\n"
        "from modules import loaders, logging_colors, models, models_settings, shared\n"
        "from modules import text_generation, utils\n"
        "import modules.api.script\n"
        "def state():\n"
        "    names = [it for it in sys.modules if it.startswith('modules.')]\n"
        "    owners = [vars(sys.modules[it]) for it in names]\n"
        "    owners += map(vars, (shared.args, shared.original_args, shared.args_defaults))\n"
        "    owners += [loaders.loaders_and_params, loaders.loaders_samplers]\n"
        "    values = [{key: id(value) for key, value in it.items()} for it in owners]\n"
        "    return names, values, list(logging_colors.logger.filters)\n"
        "before = state()\n"
        "patches = register()\n"
        "changed = state() != before\n"
        "undo_all(patches)\n"
        "print(changed, state() == before)"
    )
    assert out.splitlines()[-1] == "True True"


def test_portable_is_left_alone() -> None:
    out = in_webui(
        "sys.argv = ['server.py', '--portable', '--nowebui']\n"
        "from gptq_loader_extensions.webui.register import register\n"
        "from modules import loaders, models\n"
        "def state():\n"
        "    return list(loaders.loaders_and_params), vars(models).copy()\n"
        "before = state()\n"
        "register()\n"
        "print(before == state(), 'torch' in sys.modules)"
    )
    assert out.splitlines()[-1] == "True False"


def test_a_host_that_lacks_a_name_is_left_alone_and_the_name_is_reported() -> None:
    out = in_webui(
        "sys.argv = ['server.py', '--nowebui']\n"
        "from gptq_loader_extensions.webui.register import add_loader, register\n"
        "from gptq_loader_plugin import PluginError\n"
        "from modules import loaders, models_settings\n"
        "del models_settings.infer_loader\n"
        "add_loader()\n"
        "try:\n"
        "    register()\n"
        "except PluginError as error:\n"
        "    print(error, '|', error.hint)\n"
        "print(len(loaders.loaders_and_params))"
    )
    *_, error, count = out.splitlines()
    assert "has no modules.models_settings.infer_loader" in error
    assert "update gptq-loader-plugin" in error
    assert count == "5"
