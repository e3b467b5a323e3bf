"""Answer prompts under several settings; a run that is interrupted goes on where it stopped."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hub.error_messages import GOES_ON
from gptq_loader_plugin.sampling.report import Answered, Report, Result, Stat, read_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import LogitsProcessor

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.sampling.settings import Setting

__all__ = ["sample_replies"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
WRITE_EVERY = 5.0  # seconds between two times that the replies so far are written


def sample_replies(
    model: LoadedModel,
    prompts: Sequence[str],
    settings: Sequence[Setting],
    file: Path,
    *,
    name: str,
    args: dict[str, Any],
    samples: int = 2,
    seed: int = 42,
    system: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Answer every prompt under every setting, and write the report.

    Until it is whole its file is called `.NAME.partial.json`; the same call reads that and goes on,
    and leaves a report that is whole as it is. A setting that does not sample is asked once.

    Args:
        model: the model.
        prompts: what to answer.
        settings: how.
        file: the report's.
        name: what the report calls the model.
        args: what the report says of how it was made.
        samples: replies to a prompt under one setting.
        seed: of the first reply; each has its own.
        system: a system message for all, where a setting has none.
        progress: called with the replies done.

    Raises:
        KeyboardInterrupt: with a note of what is kept.
        GPTQLoaderError: a reply fails; see `errors`.
    """
    unfinished = file.with_name(f".{file.stem}.partial.json")
    made = {
        "settings": [[setting.name, setting.params, setting.system] for setting in settings],
        "system": system,
        "checkpoint": _identity(model.plan.path),
    }
    new = Report(
        model_name=name,
        date=datetime.now(tz=UTC).replace(tzinfo=None).isoformat(),
        args=args,
        prompts=[],
        made=made,
    )
    report = next((it for it in map(_read, (file, unfinished)) if _goes_on(it, new, prompts)), new)
    each = sum(samples if setting.is_random else 1 for setting in settings)

    def told(before: int, done: int = 0) -> None:
        if progress is not None:
            progress(Progress("sample", before + done, each * len(prompts), "replies", name))

    written = time.monotonic()
    try:
        for at in range(len(report.prompts), len(prompts)):
            answered, stats = _answered(
                model, prompts[at], settings, samples, seed + at * samples, system,
                told=partial(told, at * each),
            )  # fmt: skip
            report.prompts.append(answered)
            report.stats.append(stats)
            if time.monotonic() - written > WRITE_EVERY:
                report.write(unfinished)
                written = time.monotonic()
    except BaseException as error:
        if report.prompts:
            report.write(unfinished)
        if isinstance(error, KeyboardInterrupt):
            kept = f"{len(report.prompts)} of {len(prompts)} prompts"
            error.add_note(f"the replies to {kept} are kept; {GOES_ON}")
        raise
    report.write(file)
    for left in (unfinished, unfinished.with_name(f"{unfinished.stem}.stats.json")):
        left.unlink(missing_ok=True)
    told(each * len(prompts))
    return report


def _answered(
    model: LoadedModel,
    prompt: str,
    settings: Sequence[Setting],
    samples: int,
    seed: int,
    system: str | None,
    *,
    told: Callable[[int], None],
) -> tuple[Answered, list[list[Stat]]]:
    """Answer a prompt under every setting; `told` hears of the replies done."""
    results: list[Result] = []
    stats: list[list[Stat]] = []
    done = 0
    for setting in settings:
        replies = []
        for number in range(samples if setting.is_random else 1):
            told(done)
            replies.append(_reply(model, prompt, setting, seed + number, system))
            done += 1
        results.append(
            Result(
                sampling_config=setting.name,
                sampling_params=setting.params,
                outputs=[text for text, _ in replies],
            )
        )
        stats.append([stat for _, stat in replies])
    return Answered(prompt=prompt, results=results), stats


def _identity(path: Path) -> list[str | int]:
    """Return what tells a checkpoint from another in its place: its path, and when it changed."""
    files = [path] if path.is_file() else list(path.iterdir())
    times = [file.stat().st_mtime_ns for file in files if file.suffix in WEIGHTS]
    return [str(path.resolve()), max(times, default=0)]


def _read(file: Path) -> Report | None:
    """Read a report of ours; None where there is none."""
    try:
        return read_report(file) if file.is_file() else None
    except OptionInvalid:
        return None


def _goes_on(old: Report | None, new: Report, prompts: Sequence[str]) -> TypeGuard[Report]:
    """Return whether a report that lies there is the beginning of the new one, or all of it."""
    if old is None or len(old.stats) != len(old.prompts) or len(old.prompts) > len(prompts):
        return False
    same = (old.model_name, old.args, old.made) == (new.model_name, new.args, new.made)
    return same and all(
        answered.prompt == prompt for answered, prompt in zip(old.prompts, prompts, strict=False)
    )


def _reply(
    model: LoadedModel, prompt: str, setting: Setting, seed: int, system: str | None
) -> tuple[str, Stat]:
    """Answer a prompt once, by the chat template where there is one."""
    from transformers import MinNewTokensLengthLogitsProcessor

    from gptq_loader_plugin.chat.find_template import NoTemplate

    stop: tuple[str, ...] = ()
    if isinstance(model.template, NoTemplate):
        ids = model.encode(prompt)
    else:
        system = setting.system or system
        before = [{"role": "system", "content": system}] if system else []
        ids, _ = model.encode_chat([*before, {"role": "user", "content": prompt}])
        stop = tuple(model.template.stop)
    options = setting.options(seed)
    text, stat = _write(model, ids, options, stop, ())
    # An end that comes too early is drawn again without it: as if it could not have been drawn.
    if stat.tokens <= setting.min_new_tokens and stat.finish == "stop" and not text:
        ends = sorted(model.end_ids(stop))
        shortest = MinNewTokensLengthLogitsProcessor(
            len(ids), setting.min_new_tokens, ends, device=model.plan.device.torch_name
        )
        text, stat = _write(model, ids, options, stop, (shortest,))
    return text, stat


def _write(
    model: LoadedModel,
    ids: Sequence[int],
    options: GenerateOptions,
    stop: Sequence[str],
    processors: Sequence[LogitsProcessor],
) -> tuple[str, Stat]:
    began = time.perf_counter()
    text, tokens, finish = "", 0, "stop"
    for piece in model.stream_ids(ids, options, stop=stop, processors=processors):
        text += piece.text
        tokens, finish = piece.tokens, piece.finish or finish
    return text, Stat(tokens=tokens, seconds=time.perf_counter() - began, finish=finish)
