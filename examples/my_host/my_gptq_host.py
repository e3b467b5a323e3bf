"""A whole plugin: a host. Other programs send questions as lines of JSON, and read answers so.

    pip install ./examples/my_host
    gptq-loader plugins
    echo '{"prompt": "Hello"}' | python -m my_gptq_host REF

A host is a way for another program to use a loaded model. This one needs no other program but the
one at the other end of the pipe; one that does says in `check` whether that program is here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin import GPTQLoaderError, OptionInvalid, hookimpl
from gptq_loader_plugin.host import NotReady, Readiness, Ready

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from gptq_loader_plugin import Host, LoadedModel

OPTIONS = ("reference", "source", "sink")


@dataclass(frozen=True)
class JSONLines:
    """Answer each line of `source`, {"prompt": ..., "max_new_tokens": ...}, by one of `sink`."""

    name: str = "json-lines"

    def install(self, **options: Any) -> int:  # noqa: ANN401 - Host's signature; checked here
        """Load `reference`, then answer until the lines end; give how many were answered."""
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise OptionInvalid(
                f"json-lines has no option {', '.join(unknown)}",
                hint=f"the options are {', '.join(OPTIONS)}",
            )
        if "reference" not in options:
            raise OptionInvalid("no model was named", hint='name one: install(reference="demo")')
        import gptq_loader_plugin as gptq  # its names are found on first use: torch comes in here

        with gptq.load(options["reference"]) as model:
            return self._answer(
                model, options.get("source", sys.stdin), options.get("sink", sys.stdout)
            )

    def check(self) -> Readiness:
        """Say whether the host can be used here; `gptq-loader plugins` shows it."""
        if sys.stdin is None:
            return NotReady("there is no standard input", "start Python from a terminal")
        return Ready("standard input and output", "one JSON object a line")

    def _answer(self, model: LoadedModel, source: Iterable[str], sink: TextIO) -> int:
        from gptq_loader_plugin import GenerateOptions

        count = 0
        for line in source:
            try:
                asked = json.loads(line)
                messages = [{"role": "user", "content": asked.pop("prompt")}]
                pieces = list(model.chat(messages, GenerateOptions.parse(asked)))
                reply = {"text": "".join(it.text for it in pieces), "tokens": pieces[-1].tokens}
            except GPTQLoaderError as error:  # of ours, each with what to do next
                reply = {"error": error.message, "hint": error.hint}
            except (ValueError, KeyError, AttributeError) as error:
                reply = {"error": f"{error}", "hint": 'send {"prompt": "..."} on a line'}
            print(json.dumps(reply), file=sink, flush=True)
            count += 1
        return count


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer the host, for `Plugins(installed=True).host("json-lines")`."""
    return [JSONLines()]


if __name__ == "__main__":
    JSONLines().install(reference=sys.argv[1])
