"""What a model card is written from: headers, sizes, engines' rules, the template, the old card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.branches import list_branches
from gptq_loader_plugin.catalog.headers_alone import with_headers
from gptq_loader_plugin.catalog.report import make_report
from gptq_loader_plugin.catalog.where import ask_where
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.errors import HubError, TemplateError
from gptq_loader_plugin.hub.error_messages import is_away
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.catalog.branches import BranchReport
    from gptq_loader_plugin.catalog.engines.engine import Answer
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.card import Card
    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["CardFacts", "ProvidedFile", "gather_card_facts"]

READ = ("README.md", "chat_template.jinja", "tokenizer_config.json", "generation_config.json")
PROMPT, SYSTEM = "{prompt}", "{system_message}"


@dataclass(frozen=True, slots=True)
class ProvidedFile:
    """One branch or folder, as the card's table has it.

    Attributes:
        branch: its name.
        bits: the width of a code.
        group_size: rows of a group, or -1.
        desc_act: act-order.
        damp_percent: GPTQ's damping, where it is known.
        dataset: what it was calibrated on, where that is known.
        seq_len: the tokens of a calibration sample.
        size_bytes: its weights.
        exllama: whether ExLlama runs it.
        desc: the card's words of before.
        answers: which programs take it.
    """

    branch: str
    bits: int | None
    group_size: int | None
    desc_act: bool | None
    damp_percent: float | None
    dataset: str | None
    seq_len: int | None
    size_bytes: int | None
    exllama: bool | None
    desc: str | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What is known of a checkpoint, or of a repository and its branches.

    Attributes:
        name: what a person calls it.
        repo: "owner/name", where it is on the hub.
        model_type: the architecture.
        prompt_template: the prompt with {prompt} and maybe {system_message} in it, None where the
            checkpoint has no template of that form.
        stop: what ends a reply.
        context: the longest sequence, where config.json says it.
        files: the branches, main first.
        card: what the card of now says.
    """

    name: str
    repo: str | None
    model_type: str
    prompt_template: str | None
    stop: tuple[str, ...]
    context: int | None
    files: tuple[ProvidedFile, ...]
    card: Card


def gather_card_facts(
    references: Sequence[str],
    *,
    plugins: Plugins,
    device: Device,
    hub: HubReference | None = None,
) -> CardFacts:
    """Gather what a card says; of weights only headers are read.

    Args:
        references: a checkpoint, or several of one model: the first is the main one.
        plugins: the plugins in force.
        device: the device whose kernels say what ExLlama runs.
        hub: the repository, where the reference is one and no folder here: all of its branches.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    hosts, kernels = plugins.hosts(), plugins.kernels()

    def describe(checkpoint: Checkpoint, reference: str) -> tuple[CardFacts, ProvidedFile]:
        report = make_report(checkpoint, kernels, reference=reference)
        template = find_template(checkpoint.folder, card=checkpoint.card)
        context = checkpoint.model_config.get("max_position_embeddings")
        name = checkpoint.card.model_name or reference.rstrip("/").rpartition("/")[2]
        file = ProvidedFile(
            branch=local_path(reference).name or reference,
            bits=report.bits,
            group_size=report.group_size,
            desc_act=report.desc_act,
            damp_percent=report.damp_percent,
            dataset=report.dataset,
            seq_len=report.seq_len,
            size_bytes=report.size_bytes,
            exllama=report.exllama.compatible,
            desc=None,
            answers=ask_where(checkpoint, hosts),
        )
        facts = CardFacts(
            name=name,
            repo=None,
            model_type=report.model_type,
            prompt_template=_prompt_template(template),
            stop=tuple(template.stop),
            context=context if isinstance(context, int) else None,
            files=(),
            card=checkpoint.card,
        )
        return facts, file

    described = [
        with_headers(it, partial(describe, reference=it), plugins=plugins, files=READ)
        for it in references
    ]
    first = described[0][0]
    if hub is None:
        return _with_files(first, [file for _, file in described], repo=None)
    try:
        report = list_branches(hub, device=device, kernels=kernels, progress=plugins.progress)
    except HubError as error:
        if error.__cause__ is None or not is_away(error.__cause__):
            raise
        raise HubError(
            error.message, hint=f"for a card of the branch that is here, name it: {hub}; or "
            f"{error.hint}", status=error.status,
        ) from error  # fmt: skip
    files = [_of_branch(it) for it in report.branches if it.is_gptq]
    return _with_files(first, files, repo=hub.repo)


def _of_branch(branch: BranchReport) -> ProvidedFile:
    return ProvidedFile(
        branch=branch.branch,
        bits=branch.bits,
        group_size=branch.group_size,
        desc_act=branch.desc_act,
        damp_percent=branch.damp_percent,
        dataset=branch.dataset,
        seq_len=branch.seq_len,
        size_bytes=branch.size_bytes,
        exllama=branch.exllama.compatible if branch.exllama else None,
        desc=branch.desc,
        answers=branch.engines,
    )


def _with_files(facts: CardFacts, files: Sequence[ProvidedFile], *, repo: str | None) -> CardFacts:
    name = repo.rpartition("/")[2] if repo and facts.card.model_name is None else facts.name
    return replace(facts, files=tuple(files), repo=repo, name=name)


def _prompt_template(template: Template) -> str | None:
    """Render a template around placeholders, with a system message where it takes one."""
    turn: dict[str, Any] = {"role": "user", "content": PROMPT}
    for messages in ([{"role": "system", "content": SYSTEM}, turn], [turn]):
        try:
            text = template.render(messages, add_generation_prompt=True)
        except TemplateError:
            continue
        if text.count(PROMPT) == 1 and (len(messages) == 1 or text.count(SYSTEM) == 1):
            return text
    return None
