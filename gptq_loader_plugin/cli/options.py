"""The options that several commands share, each defined once: its name, its type, its help."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptq_loader_plugin.events import Head
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = [
    "JSON",
    "Checkpoint",
    "FitContext",
    "FitDevice",
    "ShowThoughts",
    "System",
    "hub_reference",
    "load_options",
    "sampling",
    "valid_text",
]


def _complete_reference(incomplete: str) -> list[str]:
    """List the checkpoints of this machine that begin so; a shell adds folders by itself."""
    from gptq_loader_plugin.catalog.local import local_models

    names = ["demo", *(model.name for model in local_models())]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def valid_text(text: str | None) -> str | None:
    """Refuse what a terminal wrote in another encoding than it is read in."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(
            "the terminal is not set to UTF-8, in which this is written; set LANG=C.UTF-8"
        ) from None
    return text


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="A folder, a file, owner/repo:branch, or demo.",
        autocompletion=_complete_reference,
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
System = Annotated[
    str | None,
    typer.Option(
        "--system",
        help="A system message; card takes the one the model card gives.",
        callback=valid_text,
    ),
]
ShowThoughts = Annotated[
    Literal["show", "fold"],
    typer.Option("--thoughts", help="Of a model that thinks: show them, or their time alone."),
]
FitDevice = Annotated[
    str | None,
    typer.Option("--device", help="Where it is to fit: cpu, cuda, cuda:1; else the best here."),
]
FitContext = Annotated[
    int, typer.Option("--context", min=1, help="Tokens of context to keep room for.")
]

# The fields of LoadOptions, as a command line has them.
LOAD: dict[str, tuple[Any, Any]] = {
    "device": (
        Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, xpu.")],
        None,
    ),
    "backend": (
        Annotated[str | None, typer.Option("--backend", help="Use this kernel, or fail.")],
        None,
    ),
    "dtype": (
        Annotated[
            str | None,
            typer.Option("--dtype", help="What is not quantised: float32, float16 or bfloat16."),
        ],
        None,
    ),
    "template": (
        Annotated[
            str | None,
            typer.Option("--template", help="chatml, checkpoint, card, or a .jinja file."),
        ],
        None,
    ),
    "revision": (
        Annotated[
            str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
        ],
        None,
    ),
    "context": (
        Annotated[
            int | None,
            typer.Option("--context", help="The longest sequence; shorter takes less memory."),
        ],
        None,
    ),
    "head": (
        Annotated[
            Head | None,
            typer.Option(
                "--head",
                help="stored picks tokens by the whole head, slower; int8 makes it 8-bit, less "
                "exact.",
            ),
        ],
        None,
    ),
    "check": (
        Annotated[
            bool,
            typer.Option("--check/--no-check", help="Check kernels and logits once loaded."),
        ],
        True,
    ),
    "device_map": (
        Annotated[
            str | None,
            typer.Option("--device-map", help="auto: over several devices, block by block."),
        ],
        None,
    ),
    "max_memory": (
        Annotated[
            str | None,
            typer.Option("--max-memory", help="With --device-map: cuda:0=8GB,cpu=10GB,disk."),
        ],
        None,
    ),
    "offload_folder": (
        Annotated[
            str | None,
            typer.Option("--offload-folder", help="Where weights go that stay on the disk."),
        ],
        None,
    ),
    "kv_cache": (
        Annotated[
            str | None,
            typer.Option("--kv-cache", help="int8: half the memory for the context."),
        ],
        None,
    ),
    "draft": (
        Annotated[
            str | None,
            typer.Option("--draft", help="A smaller model that guesses tokens; ngram, or none."),
        ],
        None,
    ),
    "lora": (
        Annotated[
            list[str] | None,
            typer.Option("--lora", help="A LoRA adapter, NAME=REF or REF; may be repeated."),
        ],
        None,
    ),
}

# The fields of GenerateOptions.
SAMPLING: dict[str, tuple[Any, Any]] = {
    "max_new_tokens": (
        Annotated[int, typer.Option("--max-new-tokens", help="The most tokens of a reply.")],
        512,
    ),
    "temperature": (
        Annotated[
            float,
            typer.Option("--temperature", help="0 takes the most probable token every time."),
        ],
        0.7,
    ),
    "top_p": (
        Annotated[float, typer.Option("--top-p", help="Keep tokens of this probability.")],
        0.95,
    ),
    "top_k": (
        Annotated[int, typer.Option("--top-k", help="Keep this many tokens; 0 keeps all.")],
        40,
    ),
    "min_p": (
        Annotated[float, typer.Option("--min-p", help="Drop tokens less probable than this.")],
        0.0,
    ),
    "repetition_penalty": (
        Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")],
        1.0,
    ),
    "seed": (
        Annotated[int | None, typer.Option("--seed", help="Make sampling repeatable.")],
        None,
    ),
}


def load_options(
    *names: str, device: object = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a load, in place of its parameter `load`, a LoadOptions.

    Args:
        *names: the options it takes; none named are all.
        device: another type and help for `--device`.
    """
    options = {name: LOAD[name] for name in names or LOAD}
    if device is not None:
        options["device"] = (device, None)
    return functools.partial(
        _expand, parameter="load", options=options, make=lambda values: LoadOptions(**values)
    )


def sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the sampling options, in place of its parameter `options`."""
    return _expand(command, parameter="options", options=SAMPLING, make=_generate_options)


def _generate_options(values: Mapping[str, Any]) -> GenerateOptions:
    from gptq_loader_plugin.generation.options import GenerateOptions

    return GenerateOptions.parse(values)


def _expand(
    command: Callable[..., None],
    *,
    parameter: str,
    options: Mapping[str, tuple[Any, Any]],
    make: Callable[[dict[str, Any]], object],
) -> Callable[..., None]:
    """Replace one parameter of a command by options, as typer reads them from its signature."""

    @functools.wraps(command)
    def run(*args: Any, **values: Any) -> None:  # noqa: ANN401 - the command's own
        fields = {name: values.pop(name) for name in options}
        command(*args, **values, **{parameter: make(fields)})

    hints = _type_hints(command)
    expanded: list[inspect.Parameter] = []
    signature = inspect.signature(command)
    for parameter_ in signature.parameters.values():
        if parameter_.name != parameter:
            expanded.append(parameter_.replace(annotation=hints[parameter_.name]))
            continue
        expanded += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
            )
            for name, (annotation, default) in options.items()
        ]
    vars(run)["__signature__"] = signature.replace(parameters=expanded)
    run.__annotations__ = {option.name: option.annotation for option in expanded}
    return run


def _type_hints(command: Callable[..., None]) -> dict[str, Any]:
    """Evaluate a command's annotations, but for those of parameters that are still replaced."""
    hints = dict(command.__annotations__)
    for name, hint in hints.items():
        holder = types.SimpleNamespace(__annotations__={name: hint})
        names = inspect.unwrap(command).__globals__
        with contextlib.suppress(NameError):  # imported for type checkers alone
            hints[name] = typing.get_type_hints(holder, names, include_extras=True)[name]
    return hints


def hub_reference(reference: str, *, revision: str | None = None) -> HubReference:
    """Read what must name a repository on the hub.

    Raises:
        OptionInvalid: it names something else.
    """
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.hub.hub_reference import parse_hub_reference

    hub = parse_hub_reference(reference, revision=revision)
    if hub is None:
        raise OptionInvalid(
            f"{reference} names nothing on the hub",
            hint="write owner/repo, or owner/repo:branch",
        )
    return hub
