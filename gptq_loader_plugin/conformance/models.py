"""Hold whole models to one call without a cache: `python -m gptq_loader_plugin.conformance.models`.

Tiny random models of many families, their linears packed and prepared by a kernel, write replies as
a loaded model writes them: prompts in parts, kept prefixes, edited and cancelled turns, several
replies at a time, scored prompts. Each token's logits are compared with those of the same model by
transformers alone, in float32, over the whole sequence at once.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from gptq_loader_plugin.conformance.families import FAMILIES, make_config
from gptq_loader_plugin.conformance.layers import Case, make_layer, roll_columns
from gptq_loader_plugin.conformance.model_report import ModelReport
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.engine.attention import NotPaged
from gptq_loader_plugin.engine.paged_engine import PagedEngine
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.generate import Generation
from gptq_loader_plugin.generation.kv_cache import PrefixCache, make_cache
from gptq_loader_plugin.generation.model_runner import ModelRunner
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.generation.rotation import LengthRotation
from gptq_loader_plugin.kernel import Finisher
from gptq_loader_plugin.model.experts import PackedExperts, expert_weights, experts_layout
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.generation.engine import Engine
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.kernel import Batcher, Kernel, PagedAttention

__all__ = ["CHECKS", "ModelReport", "Subject", "check_family", "main", "make_subject"]

# Both sides compute in float32; the order of their sums differs: 1e-6 to 1e-5 measured.
TOLERANCE = 1e-4
# PhiMoE leaves experts out whose score is just below a threshold: a change of 2e-7 of the embedding
# moved its logits by 1e-4 in three of six draws.
TOLERANCES = {"phimoe-longrope": 1e-3}
PACKED = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "fc1", "fc2",
)  # fmt: skip
GREEDY = GenerateOptions(temperature=0)
REPLY = 4  # tokens
CONTEXT = 256  # tokens, no less than any check's sequences have
SEQUENCES = 8  # no fewer than any check writes side by side


@dataclass(slots=True)
class Subject:
    """A model under test, and what it must answer like.

    Attributes:
        model: with packed linears, finished by the kernel.
        batcher: steps several of its sequences at a time, or None.
        plain: transformers' own model of the same weights.
        engine: reads its tokens, in place of the model itself; or None.
        adapters: none: what is tried is the model alone.
        worst: how far the worst logits were off.
    """

    model: Any
    batcher: Batcher | None
    plain: Any
    engine: Engine | None = None
    adapters: None = None
    worst: float = 0.0

    @torch.inference_mode()
    def compare(self, ids: Sequence[int], logits: torch.Tensor) -> None:
        """Compare the logits after the last of some tokens with those of one call over all."""
        if LengthRotation(self.plain).varies:
            self.plain(input_ids=torch.tensor([[0]]), use_cache=False)  # forget longer ones
        right = self.plain(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        error = float((logits.flatten() - right).norm() / right.norm())
        self.worst = max(self.worst, error if error == error else float("inf"))  # noqa: PLR0124 - not a number

    def begin(
        self,
        ids: Sequence[int],
        kept: PrefixCache | None = None,
        *,
        tokens: int = REPLY,
        cancel: threading.Event | None = None,
        sequence: list[int] | None = None,
    ) -> Generation:
        """Begin a reply, each of whose tokens is compared, and added to `sequence`."""
        sequence = list(ids) if sequence is None else sequence

        def watch(token: int, logits: torch.Tensor) -> None:
            self.compare(sequence, logits)
            sequence.append(token)

        return Generation(
            self.model,
            cast("Any", _Letters()),
            ids,
            GREEDY,
            max_new_tokens=tokens,
            stop=(),
            stop_ids=frozenset(),
            kept=kept,
            engine=self.engine,
            cancel=cancel,
            watch=watch,
        )

    @torch.inference_mode()
    def write(
        self, ids: Sequence[int], kept: PrefixCache | None = None, part: int = 2048
    ) -> list[int]:
        """Write a reply, its prompt in parts; return prompt and reply."""
        sequence = list(ids)
        generation = self.begin(ids, kept, sequence=sequence)
        while not generation.finished:
            logits = generation.forward_pending(part)
            if generation.cancelled() is None:
                generation.sample(logits)
        generation.close()
        return sequence


class _Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: list[int], **_: object) -> str:
        """Join the letters."""
        return "".join(chr(97 + token % 26) for token in tokens)


def make_subject(
    family: str, kernel: Kernel, attention: PagedAttention | None = None, *, seed: int = 0
) -> Subject:
    """Make a random model of a family, and the same one with linears that a kernel prepared.

    Args:
        family: one of `FAMILIES`.
        kernel: what multiplies.
        attention: makes an engine that reads the tokens; None for none.
        seed: of the weights.

    Raises:
        NotPaged: there is an attention, and the engine does not run this family.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    plain: Any = AutoModelForCausalLM.from_config(make_config(family)).float().eval()
    plain.requires_grad_(requires_grad=False)
    prepared: dict[str, torch.nn.Module] = {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.normal_(0, 0.3)
        if type(module) is not torch.nn.Linear:
            continue
        module.weight.normal_(0, module.in_features**-0.5)
        if not name.endswith(PACKED) or module.in_features % 32:
            continue
        linear = _prepare(kernel, module.weight, module.bias, shift=3 * len(prepared))
        if linear is not None:
            prepared[name] = linear
    fused = {it: each for it, each in plain.named_modules() if experts_layout(each) is not None}
    experts = {name: _prepare_experts(kernel, module) for name, module in fused.items()}
    plain.tie_weights()
    model = copy.deepcopy(plain)
    for name, module in prepared.items():
        model.set_submodule(name, module)
    for name, parts in experts.items():
        if parts is not None:
            model.set_submodule(name, _separate(model.get_submodule(name), parts))
    batcher = kernel.finish(model).batcher if isinstance(kernel, Finisher) else None
    engine = None
    if attention is not None:
        engine = PagedEngine(model, attention, CONTEXT)
        engine.probe()
        engine.fuse()
        engine.max_sequences = SEQUENCES
    return Subject(model, batcher, plain, engine)


def _separate(
    fused: torch.nn.Module, parts: dict[tuple[int, str], torch.nn.Module]
) -> PackedExperts:
    """Put linears in the place of fused experts."""
    experts = PackedExperts(fused)
    for (expert, role), part in parts.items():
        experts.place(expert, role, part)
    return experts


def _prepare_experts(
    kernel: Kernel, fused: torch.nn.Module
) -> dict[tuple[int, str], torch.nn.Module] | None:
    """Have a kernel prepare the linears of fused experts; None where it takes only some."""
    layout = experts_layout(fused)
    assert layout is not None
    parts: dict[tuple[int, str], torch.nn.Module] = {}
    for expert, role, weight, bias in expert_weights(fused, layout):
        linear = _prepare(kernel, weight, bias, shift=3 * len(parts))  # no two of them alike
        if linear is None:
            return None
        parts[expert, role] = linear
    return parts


def _prepare(
    kernel: Kernel, weight: torch.Tensor, bias: torch.Tensor | None, *, shift: int
) -> torch.nn.Module | None:
    """Have a kernel prepare a random layer, whose weight and bias these become; None for none."""
    columns, rows = weight.shape
    if rows % 32:
        return None
    case = Case(group_size=32, sym=False, rows=rows, columns=columns, bias=bias is not None)
    spec, one, its_weight = make_layer(case)
    packed, unpacked = roll_columns(one, its_weight, shift)
    device = find_device("cpu")
    if isinstance(kernel.consider(spec, device), Declined):
        return None
    weight.copy_(unpacked)
    if bias is not None and packed.bias is not None:
        bias.copy_(packed.bias)
    return kernel.prepare(spec, packed, device)


def _prompt(length: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)  # noqa: S311 - a seeded draw
    return [draw.randrange(3, 250) for _ in range(length)]


def _chunks(subject: Subject) -> None:
    """Read prompts in parts of several sizes, on both sides of 64 tokens."""
    for length, part in ((1, 2048), (40, 7), (62, 33), (90, 32), (20, 1), (140, 2048)):
        subject.write(_prompt(length), part=part)


def _kept(subject: Subject) -> None:
    """Begin with what was kept: longer, shorter, edited, cancelled, and another conversation."""
    kept = PrefixCache(max_sequences=2)
    first = subject.write(_prompt(50), kept)
    cancel = threading.Event()
    cancelled = subject.begin([*first, *_prompt(20, 2)], kept, cancel=cancel)
    with torch.inference_mode():
        cancelled.forward_chunk(9)
    cancel.set()
    cancelled.cancelled()
    cancelled.close()
    long = subject.write([*first, *_prompt(30, 3)], kept)
    subject.write(first[:30], kept)
    subject.write([*long[:40], 7, *long[41:]], kept)
    subject.write(_prompt(70, 4), kept)
    subject.write(_prompt(70, 4)[:20], kept)
    subject.write([*long, *_prompt(3, 5)], kept, 5)


def _batch(subject: Subject) -> None:
    """Write replies side by side that join, leave and are cancelled."""
    batch = Batch(cast("LoadedModel", subject))
    cancel = threading.Event()
    lengths = (5, 60, 1, 100, 12, 58)
    waiting = [
        subject.begin(_prompt(length, seed=i), tokens=REPLY + 2 * i)
        for i, length in enumerate(lengths)
    ]
    waiting.insert(2, subject.begin(_prompt(30, 9), tokens=100, cancel=cancel))
    for turn in range(400):
        if waiting and turn % 2 == 0:
            batch.add(waiting.pop(0))
        if turn == 9:
            cancel.set()
        for _, what in batch.step():
            if isinstance(what, Exception):
                raise what
        if not waiting and not len(batch):
            return
    raise RuntimeError("the replies did not end")


@torch.inference_mode()
def _scores(subject: Subject) -> None:
    """Score every token of a prompt, read in parts."""
    ids, past = _prompt(100, 6), 0
    runner, cache = ModelRunner(subject.model), make_cache(subject.model)
    if LengthRotation(subject.plain).varies:
        subject.plain(input_ids=torch.tensor([[0]]), use_cache=False)
    right = subject.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for size in (16, 1, 40, 43) if runner.takes_parts else (len(ids),):
        part = ids[past : past + size]
        logits, cache = runner.run(part, cache, past=past, length=len(ids))
        expected = right[past : past + size]
        error = float((logits[0] - expected).norm() / expected.norm())
        subject.worst = max(subject.worst, error if error == error else float("inf"))  # noqa: PLR0124
        past += size


CHECKS: dict[str, Callable[[Subject], None]] = {
    "parts": _chunks,
    "kept": _kept,
    "batch": _batch,
    "scores": _scores,
}


def check_family(
    family: str,
    kernel: Kernel,
    checks: Sequence[str] = tuple(CHECKS),
    attention: PagedAttention | None = None,
) -> ModelReport:
    """Run the checks of one family: by an engine, where there is an attention to make it of."""
    report = ModelReport(family)
    try:
        subject = make_subject(family, kernel, attention)
    except NotPaged as reason:
        report.not_paged = str(reason)
        return report
    except Exception as error:  # noqa: BLE001 - whatever it is, the family was not tested
        report.failed = dict.fromkeys(checks, f"{type(error).__name__}: {error}")
        return report
    report.fused = isinstance(subject.engine, PagedEngine) and subject.engine.fused
    for name in checks:
        subject.worst = 0.0
        try:
            CHECKS[name](subject)
        except Exception as error:  # noqa: BLE001 - it has failed, whatever was raised
            report.failed[name] = f"{type(error).__name__}: {error}"
            continue
        if subject.worst <= TOLERANCES.get(family, TOLERANCE):
            report.passed[name] = subject.worst
        else:
            report.failed[name] = f"off by {subject.worst:.1e}"
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the families that the command line names.

    Returns:
        0 where every check of every family held.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gptq_loader_plugin.conformance.models",
        description="Hold whole models' replies to one call of transformers without a cache.",
    )
    parser.add_argument(
        "--kernel", default="reference", help="what multiplies; reference by default"
    )
    parser.add_argument(
        "--family", action="append", choices=sorted(FAMILIES), help="all by default"
    )
    parser.add_argument(
        "--engine", action="store_true", help="read by the engine for accelerators, on the CPU"
    )
    options = parser.parse_args(arguments)
    plugins = Plugins(installed=True)
    kernels = {kernel.name: kernel for kernel in plugins.kernels()}
    attention = None
    if options.engine:
        attention = plugins.hook.gptq_paged_attention(device=find_device("cpu"))
    if options.kernel not in kernels:
        parser.error(f"no kernel is named {options.kernel!r}; there is {', '.join(kernels)}")
    reports = []
    for family in options.family or FAMILIES:
        report = check_family(family, kernels[options.kernel], attention=attention)
        reports.append(report)
        if report.not_paged is not None:
            sys.stdout.write(f"{family}: no engine, {report.not_paged}\n")
            continue
        worst = max(report.passed.values(), default=0.0)
        words = [f"{len(report.passed)} of {len(CHECKS)} checks held, at most {worst:.0e} off"]
        words += [f"  {name}: {why}" for name, why in report.failed.items()]
        sys.stdout.write(f"{family}: " + "\n".join(words) + "\n")
        sys.stdout.flush()
    failed = sum(len(report.failed) for report in reports)
    sys.stdout.write(
        f"{len(reports)} families x {len(CHECKS)} checks by {options.kernel}: {failed} failed\n"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
