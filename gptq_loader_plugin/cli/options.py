"""The options that several commands share: their names, types and help."""

from __future__ import annotations

from typing import Annotated

import typer

from gptq_loader_plugin.events import Head as HeadName

__all__ = ["DeviceMap", "MaxMemory"]

Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A folder, a file, owner/repo:branch, or demo.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, xpu.")]
Backend = Annotated[str | None, typer.Option("--backend", help="Use this kernel, or fail.")]
Template = Annotated[
    str | None, typer.Option("--template", help="chatml, checkpoint, card, or a .jinja file.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
]
System = Annotated[
    str | None,
    typer.Option("--system", help="A system message; card takes the one the model card gives."),
]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", help="The most tokens of a reply.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the likeliest token every time.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Keep tokens of this probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep this many tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens less likely than this.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Make sampling repeatable.")]
Head = Annotated[
    HeadName | None,
    typer.Option(
        "--head",
        help="stored picks tokens by the whole head, slower; int8 makes it 8-bit, less exact.",
    ),
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Check kernels and logits once loaded.")
]
KvCache = Annotated[
    str | None, typer.Option("--kv-cache", help="int8: half the memory for the context, slower.")
]
OffloadFolder = Annotated[
    str | None, typer.Option("--offload-folder", help="Where weights go that stay on the disk.")
]


DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto: over several devices, block by block.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", help="With --device-map: cuda:0=8GB,cpu=10GB,disk."),
]
