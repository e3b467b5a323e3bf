"""Work that is killed: a process that has imported everything, and forks one for each job.

A fork is there at once, so that many can be killed in a few seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Jobs"]

ROOM = 8000  # bytes of a file
START, JOB = 300, 120  # seconds until everything is imported, and between two reports of a job


class Jobs:
    """A process that starts jobs; a context manager."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read(START) == {"ready": 0}
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._process.communicate(timeout=60)  # it ends where its input does
        finally:
            self._process.kill()

    def run(self, name: str, *args: Any, kill_after: float | None = None) -> list[Any]:
        """Run a job to its end, or kill it some seconds after its first words; give them all."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *map(str, args)]) + "\n")
        self._process.stdin.flush()
        pid = self._read()["pid"]
        reports = []
        if kill_after is not None:
            reports.append(self._read()["reported"])
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        while "status" not in (line := self._read()):
            reports.append(line["reported"])
        assert line["status"] == 0 or kill_after is not None, reports
        return reports

    def _read(self, seconds: float = JOB) -> dict[str, Any]:
        from processes import read_line  # of the tests: where this runs as a program, it is not

        line: dict[str, Any] = json.loads(read_line(self._process, seconds))
        return line


def report(**content: object) -> None:
    """Write a line in one piece: whoever is killed has written it or has not."""
    os.write(1, (json.dumps(content) + "\n").encode())


def save_settings(folder: str, first: str) -> None:
    """Save the settings of one model after the other, for ever; report what was saved."""
    from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings, SettingsFile

    file = SettingsFile(Path(folder))
    for number in count(int(first)):
        note = file.save("model", ModelSettings(context=number, system="words " * 2000))
        report(reported=[number, note])


def save_without_room(folder: str) -> None:
    """Save settings that the disk has no room for; report the error."""
    from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings, SettingsFile

    with _little_room():
        SettingsFile(Path(folder)).save("model", ModelSettings(system="words " * 2000))


def install_for_ever(folder: str) -> None:
    """Put the extension into a folder of text-generation-webui's again and again."""
    from gptq_loader_extensions.webui.install import install

    report(reported="begun")
    while True:
        install(Path(folder))


def quantize(source: str, out: str, bits: str = "4") -> None:
    """Quantise a model."""
    from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model

    options = QuantizeOptions(bits=int(bits), samples=4, seq_len=64, shard_bytes=100_000)  # type: ignore[arg-type]
    quantize_model(source, out, options=options, progress=lambda it: report(reported=it.done))


def quantize_or_refuse(source: str, out: str, bits: str) -> None:
    """Quantise a model; report "made", or the words of the refusal."""
    from gptq_loader_plugin.errors import QuantizeError

    try:
        quantize(source, out, bits)
    except QuantizeError as error:
        report(reported=[error.message, error.hint])
    else:
        report(reported="made")


def prepare_demo(source: str, cache: str, bits: str) -> None:
    """Prepare the demo of a small model, of fewer samples."""
    import gptq_loader_plugin.quantize as package
    from gptq_loader_plugin.quantize import demo

    fewer = {"bits": int(bits), "samples": 4, "seq_len": 64, "shard_bytes": 100_000}
    real = package.quantize_model

    def quantize_model(*where: Any, options: Any, **how: Any) -> Path:
        return real(*where, options=options.model_copy(update=fewer), **how)

    package.quantize_model = quantize_model  # type: ignore[assignment]
    demo.find_demo_model = lambda **_: Path(source)  # type: ignore[assignment]
    environ = {"GPTQ_LOADER_CACHE": cache}
    report(reported="begun")
    demo.prepare_demo(progress=lambda it: report(reported=it.done), environ=environ)


def write_numbers(kind: str, folder: str, first: str) -> None:
    """Write one number after the other to a file, for ever; report each that was written."""
    for number in count(int(first)):
        # a name in the list stays with what it was given: each number has its own
        name = f"one-{number}" if kind == "listed" else "one"
        _write(kind, Path(folder), name, number)
        report(reported=number)


def add_entries(kind: str, folder: str, name: str, entries: str) -> None:
    """Add some entries to a file."""
    for number in range(int(entries)):
        widths = (2, 3) if name == "one" else (4, 8)
        _write(kind, Path(folder), f"{name}-{number}", number, bits=widths[number % 2])


def read_number(kind: str, folder: Path) -> int:
    """Read the number that was written last; 0 where none was. A damaged file is an error."""
    return max(_read(kind, folder).values(), default=0)


def read_entries(kind: str, folder: Path) -> set[str]:
    """List the entries of a file."""
    return set(_read(kind, folder))


def _write(kind: str, folder: Path, name: str, number: int, *, bits: int = 4) -> None:
    """Write a number under a name, to the file of one kind."""
    match kind:
        case "settings":
            from gptq_loader_extensions.gradio.storage.settings_file import (
                ModelSettings,
                SettingsFile,
            )

            settings = ModelSettings(context=number, system="words " * 2000)
            if note := SettingsFile(folder).save(name, settings):
                raise AssertionError(note)
        case "figures":
            from gptq_loader_plugin.measure.results import Measured, MeasuredFiles, MeasuredText

            text = MeasuredText(name=name, digest=name, windows=1, window_tokens=64)
            MeasuredFiles(folder).keep(
                Measured(
                    name="model", path="/model", bits=4, group_size=32, desc_act=True,
                    size_bytes=1, text=text, perplexity=number + 1.5, kernels=(), seconds=1.0,
                )
            )  # fmt: skip
        case "tiles":
            from gptq_loader_kernels.triton import tuning
            from gptq_loader_kernels.triton.tiles import BUCKETS, candidates
            from gptq_loader_plugin.device import Device

            os.environ["GPTQ_LOADER_CACHE"] = str(folder)
            offered = candidates((8, 0), bits, BUCKETS[0])
            best = {(bits, BUCKETS[0]): offered[number % len(offered)]}
            tuning._write(Device("cuda", name="GPU", capability=(8, 0)), (8, 0), best, {})
        case "listed":
            from gptq_loader_extensions.llm.listing import add_to_list

            folder.mkdir(parents=True, exist_ok=True)
            add_to_list(folder, name, str(number))


def _read(kind: str, folder: Path) -> dict[str, int]:
    """Read the numbers of a file by their names; raise an error where it is damaged."""
    match kind:
        case "settings":
            file = folder / "page-settings.json"
            stored = json.loads(file.read_text())["models"] if file.exists() else {}
            return {name: it["context"] for name, it in stored.items()}
        case "figures":
            stored = [
                it
                for file in folder.rglob("[!.]*.json")
                for it in json.loads(file.read_text())["measured"]
            ]
            return {it["text"]["name"]: round(it["perplexity"] - 1.5) for it in stored}
        case "tiles":
            files = list(folder.rglob("[!.]*.json"))
            return dict.fromkeys(json.loads(files[0].read_text())["tiles"], 0) if files else {}
        case _:
            file = folder / "gptq-loader.json"
            stored = json.loads(file.read_text())["models"] if file.exists() else {}
            return {name: int(it) for name, it in stored.items()}


def quantize_without_room(source: str, out: str) -> None:
    """Quantise a model where the disk has no room for its weights."""
    with _little_room():
        quantize(source, out)


@contextmanager
def _little_room() -> Iterator[None]:
    """Let no file grow beyond some bytes, inside; report the error that comes of it."""
    import resource

    from gptq_loader_plugin.errors import GPTQLoaderError

    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    try:
        yield
    except GPTQLoaderError as error:
        report(reported=[error.message, error.hint])


def load_on_disk(folder: str, offload: str) -> None:
    """Load a model whose weights lie in files, and answer."""
    import gptq_loader_plugin as gptq

    report(reported="begun")
    everything: dict[str, str] = {"": "disk"}
    with gptq.load(folder, device_map=everything, offload_folder=offload) as model:
        short = gptq.GenerateOptions(max_new_tokens=8, temperature=0)
        report(reported=model.generate("Hello", short).text)


JOBS: dict[str, Callable[..., None]] = {
    it.__name__: it
    for it in (
        save_settings,
        save_without_room,
        install_for_ever,
        quantize,
        quantize_or_refuse,
        quantize_without_room,
        prepare_demo,
        write_numbers,
        add_entries,
        load_on_disk,
    )
}


def main() -> None:
    """Fork a process for each line on stdin, and say how it ended."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - what jobs need

    import gptq_loader_plugin.generation.loaded
    import gptq_loader_plugin.loading
    import gptq_loader_plugin.model.build
    import gptq_loader_plugin.quantize.run  # noqa: F401

    torch.set_num_threads(1)
    report(ready=0)
    for line in sys.stdin:
        name, *args = json.loads(line)
        pid = os.fork()
        if not pid:
            status = 1
            report(pid=os.getpid())
            try:
                JOBS[name](*args)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        report(status=status)


if __name__ == "__main__":
    main()
