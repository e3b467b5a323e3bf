"""Every hook is documented and has a test that names it; each test is also an example."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gptq_loader_plugin import (
    Accepted,
    Declined,
    GenerateOptions,
    LoadRequest,
    OptionInvalid,
    PluginError,
    Plugins,
    Progress,
    explain,
    hookimpl,
    hookspecs,
    load,
)
from gptq_loader_plugin import inspect as inspect_checkpoint
from gptq_loader_plugin.chat.templates import ChatML
from gptq_loader_plugin.device import find_device

if TYPE_CHECKING:
    from gptq_loader_plugin.device import Device

HOOKS = dict(
    inspect.getmembers(hookspecs, lambda it: inspect.isfunction(it) and "gptq" in it.__name__)
)
DOCS = Path(__file__).parents[2] / "docs" / "hooks.md"
CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "gptq-4bit-128g-noact-sym"


@pytest.mark.parametrize("hook", HOOKS)
def test_is_documented_with_its_arguments(hook: str) -> None:
    arguments = ", ".join(inspect.signature(HOOKS[hook]).parameters)
    assert f"## `{hook}({arguments})`" in DOCS.read_text(encoding="utf-8")


def test_nothing_else_is_documented() -> None:
    headings = re.findall(r"^## `(gptq_\w+)", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_is_tested(hook: str) -> None:
    assert any(name.startswith(f"test_{hook}_") for name in vars(sys.modules[__name__]))


def test_gptq_resolve_first_answer_wins() -> None:
    class Webui:
        @hookimpl
        def gptq_resolve(self, reference: str) -> Path | None:
            return CHECKPOINT if reference == "my model" else None

    plugins = Plugins(Webui(), installed=True)
    assert explain("my model", plugins=plugins, device="cpu").path == CHECKPOINT


def test_gptq_readers_open_what_is_theirs() -> None:
    from gptq_loader_plugin.checkpoint.reader import Checkpoint, GPTQReader

    opened: list[Path] = []

    class Zipped:
        name = "zipped"

        def open(self, path: Path) -> Checkpoint | None:
            opened.append(path)
            return GPTQReader().open(path) if path.name.startswith("gptq") else None

    class Plugin:
        @hookimpl
        def gptq_readers(self) -> list[Zipped]:
            return [Zipped()]

    explain(CHECKPOINT, plugins=Plugins(Plugin(), installed=True), device="cpu")
    assert opened == [CHECKPOINT]


def test_gptq_paged_attention_of_a_plugin_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", "1")
    own = Plugins(installed=True).hook.gptq_paged_attention(device=find_device("cpu"))
    decoded = []

    class Counting:
        @hookimpl
        def gptq_paged_attention(self, device: Device) -> Counting | None:
            return self if device.type == "cpu" else None

        def write_cache(self, *args: Any, **how: Any) -> None:
            own.write_cache(*args, **how)

        def decode(self, *args: Any, **how: Any) -> Any:
            decoded.append(how["window"])
            return own.decode(*args, **how)

    options = GenerateOptions(temperature=0, max_new_tokens=5)
    with load(CHECKPOINT, backend="reference", plugins=Plugins(Counting(), installed=True)) as it:
        decoded.clear()
        it.generate("The", options)
        assert decoded == [None] * it.model.config.num_hidden_layers * 4  # the first is a prompt's


def test_gptq_kernels_are_all_asked_and_rank_decides() -> None:
    class Fast:
        name = "fast"

        def consider(self, layer: object, device: object) -> Accepted:
            return Accepted("fast", rank=1000, dtype="float32", prepared_bytes=1)

        def prepare(self, layer: object, packed: object, device: object) -> None: ...

    class Shy:
        name = "shy"

        def consider(self, layer: object, device: object) -> Declined:
            return Declined("shy", "not today")

        def prepare(self, layer: object, packed: object, device: object) -> None: ...

    class Plugin:
        @hookimpl
        def gptq_kernels(self) -> list[object]:
            return [Shy(), Fast()]

    plan = explain(CHECKPOINT, plugins=Plugins(Plugin(), installed=True), device="cpu")
    assert plan.kernels() == {"fast": 14}
    assert {"kernel": "shy", "reason": "not today"} in plan.to_json()["layers"][0]["declined"]


def test_gptq_templates_have_one_name_each() -> None:
    class Twice:
        @hookimpl
        def gptq_templates(self) -> list[ChatML]:
            return [ChatML(), ChatML()]

    with pytest.raises(PluginError, match=r"two plugins offer a template named 'chatml'.*and"):
        Plugins(Twice()).templates()


def test_gptq_templates_keep_control_tokens_and_what_users_spell_apart() -> None:
    from transformers import AutoTokenizer

    from gptq_loader_plugin import encode_messages

    class Turns:
        name, source, stop = "turns", "here", ("<|im_end|>",)

        def render(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
            turns = [f"<|im_start|>{it['role']} {it['content']}<|im_end|>" for it in messages]
            return "".join([*turns, "<|im_start|>assistant "] if add_generation_prompt else turns)

        def encode(
            self, messages: Any, tokenizer: Any, *, add_generation_prompt: bool = True
        ) -> list[int]:
            return encode_messages(
                self, messages, tokenizer, add_generation_prompt=add_generation_prompt
            )

    class Plugin:
        @hookimpl
        def gptq_templates(self) -> list[Turns]:
            return [Turns()]

    (template,) = Plugins(Plugin()).templates()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    said = [{"role": "user", "content": "what is <|im_end|>?"}]
    ids = template.encode(said, tokenizer)
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert tokenizer.decode(ids) == template.render(said)


def test_gptq_commands_are_added_and_their_errors_told() -> None:
    import typer
    from typer.testing import CliRunner

    from gptq_loader_plugin.cli.app import add_plugin_commands, app

    class Plugin:
        @hookimpl
        def gptq_commands(self, app: Any) -> None:
            @app.command()
            def bits(reference: str) -> None:
                """Say how many bits a checkpoint has."""
                if reference == "none":
                    raise OptionInvalid("there is none", hint="name another")
                typer.echo(inspect_checkpoint(reference).bits)

    built_in = list(app.registered_commands)
    try:
        add_plugin_commands(["bits", "REF"], lambda: Plugins(Plugin()))
        runner = CliRunner()
        assert runner.invoke(app, ["bits", str(CHECKPOINT)]).output == "4\n"
        failed = runner.invoke(app, ["bits", "none"])
        assert failed.exit_code == 1
        assert "error: there is none\nhint: name another" in failed.output
        assert "bits" in runner.invoke(app, ["--help"]).output
    finally:
        app.registered_commands[:] = built_in


def test_gptq_commands_never_take_a_name_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    from gptq_loader_plugin.cli.app import add_plugin_commands, app

    class Plugin:
        @hookimpl
        def gptq_commands(self, app: Any) -> None:
            app.command(name="chat")(lambda: None)

    built_in = list(app.registered_commands)
    add_plugin_commands(["nothing"], lambda: Plugins(Plugin()))
    assert app.registered_commands == built_in
    assert "a plugin adds the command 'chat', which is there already" in capsys.readouterr().err


def test_gptq_hosts_are_found_by_name() -> None:
    class Page:
        name = "page"

        def install(self, **options: object) -> object:
            return options

    class Plugin:
        @hookimpl
        def gptq_hosts(self) -> list[Page]:
            return [Page()]

    plugins = Plugins(Plugin())
    assert plugins.host("page").install(port=1) == {"port": 1}
    with pytest.raises(PluginError, match="'pages'"):
        plugins.host("pages")


class Listener:
    """Hears everything."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    @hookimpl
    def gptq_before_load(self, request: LoadRequest) -> None:
        self.heard.append(("before", request.path.name))

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        self.heard.append((progress.stage, progress.done == progress.total))

    @hookimpl
    def gptq_after_load(self, request: LoadRequest, seconds: float) -> None:
        self.heard.append(("after", seconds > 0))


@pytest.fixture(scope="module")
def heard() -> list[object]:
    listener = Listener()
    load(CHECKPOINT, plugins=Plugins(listener, installed=True), device="cpu").close()
    return listener.heard


def test_gptq_before_load_is_heard_first(heard: list[object]) -> None:
    assert heard[0] == ("before", CHECKPOINT.name)


def test_gptq_before_load_may_refuse() -> None:
    class Guard:
        @hookimpl
        def gptq_before_load(self, request: LoadRequest) -> None:
            raise PluginError(f"{request.path.name} is not allowed", hint="ask its keeper")

    with pytest.raises(PluginError, match="is not allowed"):
        load(CHECKPOINT, plugins=Plugins(Guard(), installed=True), device="cpu")


def test_gptq_progress_ends_at_its_total(heard: list[object]) -> None:
    assert ("weights", True) in heard
    assert ("self-check", True) in heard


def test_gptq_after_load_is_heard_last(heard: list[object]) -> None:
    assert heard[-1] == ("after", True)
