"""Commands that answer: demo, chat, generate."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.options import (
    Backend,
    Check,
    Device,
    DeviceMap,
    Head,
    KvCache,
    MaxMemory,
    MaxNew,
    MinP,
    OffloadFolder,
    Penalty,
    Ref,
    Revision,
    Seed,
    System,
    Temperature,
    Template,
    TopK,
    TopP,
)
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.planning.placement import read_limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["add_to"]

HELP = "/new starts again, /explain says which kernels run, /quit leaves; Ctrl-C stops a reply"


def add_to(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(short_help="Answer with a small model, or open a chat page with it.")(
        reported(demo)
    )
    app.command()(reported(chat))
    app.command()(reported(generate))


def demo(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Answer this in the terminal; without it a chat page opens."),
    ] = None,
    *,
    device: Device = None,
    backend: Backend = None,
    max_new_tokens: MaxNew = 256,
    host: Annotated[str, typer.Option("--host", help="The page's address.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="The page's port.")] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Prepare a small model once, then answer PROMPT, or open a chat page with it loaded."""
    model = _load("demo", device=device, backend=backend)
    if prompt is None:
        from gptq_loader_plugin.plugins import Plugins

        page = Plugins(installed=True).host("gradio")
        page.install(model=model, host=host, port=port, open_browser=browser)
        return
    options = _options(max_new_tokens=max_new_tokens, temperature=0.0)
    _answer(model, model.chat([{"role": "user", "content": prompt}], options))


def generate(  # noqa: PLR0913 - each is an option a user may want
    reference: Ref,
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="What to answer, or to complete.")],
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the prompt as it is, without a template.")
    ] = False,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 40,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End the reply here; may be repeated.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    backend: Backend = None,
    template: Template = None,
    revision: Revision = None,
    head: Head = None,
    check: Check = True,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    kv_cache: KvCache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the reply as JSON.")] = False,
) -> None:
    """Answer one prompt and leave; stdout has the reply alone."""
    options = _options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    model = _load(
        reference,
        device=device,
        backend=backend,
        template=template,
        revision=revision,
        head=head,
        check=check,
        device_map=device_map,
        max_memory=read_limits(max_memory),
        offload_folder=offload_folder,
        kv_cache=kv_cache,
    )
    if raw:
        pieces = model.stream(prompt, options)
    else:
        pieces = model.chat([*_system(model, system), {"role": "user", "content": prompt}], options)
    if not as_json:
        _answer(model, pieces)
        return
    whole = list(pieces)
    print_json(
        {
            "text": "".join(piece.text for piece in whole),
            "tokens": whole[-1].tokens,
            "finish": whole[-1].finish,
            "template": model.template.name,
            "kernels": model.plan.kernels(),
        }
    )


def chat(  # noqa: PLR0913 - each is an option a user may want
    reference: Ref,
    *,
    system: System = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 40,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = None,
    device: Device = None,
    backend: Backend = None,
    template: Template = None,
    revision: Revision = None,
    head: Head = None,
    check: Check = True,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    kv_cache: KvCache = None,
) -> None:
    """Chat in the terminal."""
    options = _options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    model = _load(
        reference,
        device=device,
        backend=backend,
        template=template,
        revision=revision,
        head=head,
        check=check,
        device_map=device_map,
        max_memory=read_limits(max_memory),
        offload_folder=offload_folder,
        kv_cache=kv_cache,
    )
    say(HELP)
    first = _system(model, system)
    messages: list[dict[str, str]] = [*first]
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:  # as a terminal of another encoding writes
            say("error: that was no valid text\nhint: set the terminal to UTF-8")
            continue
        match text:
            case "":
                continue
            case "/quit":
                return
            case "/new":
                messages = [*first]
            case "/explain":
                say(model.explain())
            case _:
                asked = [*messages, {"role": "user", "content": text}]
                try:
                    reply = _turn(model, asked, options)
                except GPTQLoaderError as error:
                    if not sys.stdin.isatty():
                        raise
                    say(f"error: {error.message}\nhint: {error.hint}")  # and the next may be better
                    continue
                messages = [*asked, {"role": "assistant", "content": reply}]


def _turn(model: LoadedModel, messages: list[dict[str, str]], options: GenerateOptions) -> str:
    """Answer one turn; Ctrl-C ends the reply and not the chat."""
    reply = ""
    try:
        for piece in model.chat(messages, options, when_too_long="drop-oldest"):
            if piece.warning:
                say(f"warning: {piece.warning}")
            reply += piece.text
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("\n(stopped)")
    sys.stdout.write("\n")
    return reply


def _answer(model: LoadedModel, pieces: Iterator[Piece]) -> None:
    """Write a reply to stdout as it comes, and what it took to stderr."""
    began = time.monotonic()
    last = None
    for last in pieces:
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if last is not None:
        rate = last.tokens / max(time.monotonic() - began, 1e-9)
        say(f"{last.tokens} tokens, {rate:.0f} a second; {model.plan.headline()}")


def _options(**fields: Any) -> GenerateOptions:  # noqa: ANN401 - checked by the model
    from gptq_loader_plugin.generation.options import GenerateOptions

    return GenerateOptions.parse(fields)


def _load(reference: str, **options: Any) -> LoadedModel:  # noqa: ANN401 - load's own
    """Load with a progress bar; say on stderr what was chosen."""
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.plugins import Plugins

    bars = ProgressBars()
    try:
        model = gptq.load(reference, plugins=Plugins(bars, installed=True), **options)
    finally:
        bars.close()
    say(model.plan.headline())
    for warning in model.warnings:
        say(f"warning: {warning}")
    return model


def _system(model: LoadedModel, system: str | None) -> list[dict[str, str]]:
    """Make the system message: the user's, or with "card" the one the model card gives."""
    if system is None:
        return []
    if system != "card":
        return [{"role": "system", "content": system}]
    if model.card.system is None:
        from gptq_loader_plugin.errors import TemplateError

        raise TemplateError(
            "the model card gives no system message",
            hint="write one yourself: --system 'You are ...'",
        )
    return [{"role": "system", "content": model.card.system}]
