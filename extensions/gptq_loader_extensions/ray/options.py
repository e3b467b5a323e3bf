"""Parse the options of a deployment: its model, its replicas, and how each of them serves."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DeploymentOptions", "parse_options"]

KEY = "GPTQ_LOADER_API_KEY"
REPLICAS = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")


class DeploymentOptions(BaseModel):
    """What is served, by how many replicas, and how.

    Attributes:
        reference: what each replica loads.
        name: what clients call the model; None takes the reference, or its folder's name.
        replicas: how many, "2"; or the range within which Ray scales, "1-4".
        threads: of each replica.
        gpus: of each replica; a fraction of one is shared.
        device: where each replica computes.
        backend: one kernel for every layer, by name.
        template: the chat template, by name or as a .jinja file.
        context: the longest sequence.
        head: "int8" makes the output head 8-bit.
        check: whether to check the kernels and the logits once loaded.
        kv_cache: "int8" keeps the context in 8 bits.

    The others are those of `openai.settings.Settings`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: str
    name: str | None = None
    replicas: str = Field("1", coerce_numbers_to_str=True)
    threads: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    device: str | None = None
    backend: str | None = None
    template: str | None = None
    context: int | None = None
    head: Literal["int8", "stored"] | None = None
    check: bool = True
    kv_cache: Literal["int8"] | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = Field(None, repr=False)
    no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    max_queue: int = 64
    max_num_seqs: int = Field(
        16, ge=1, validation_alias=AliasChoices("max_num_seqs", "most_at_once")
    )
    timeout: float = 600.0
    max_body: int = 4 * 2**20
    max_new_tokens: int | None = None
    grace: int = 5
    as_json: bool = False

    def replica_range(self) -> tuple[int, int]:
        """Return the minimum and the maximum of replicas.

        Raises:
            OptionInvalid: it is neither a number nor a range.
        """
        match = REPLICAS.fullmatch(self.replicas)
        minimum, maximum = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if minimum > maximum:
            raise OptionInvalid(
                f"{self.replicas!r} is not a number of replicas",
                hint="write a number, 2; or a minimum and a maximum, 1-4",
            )
        return minimum, maximum

    def settings(self) -> Settings:
        """Return the settings of each replica's server.

        Raises:
            OptionInvalid: they are impossible, or would let anyone on the network in.
        """
        settings = Settings(
            host=self.host,
            port=self.port,
            api_key=self.api_key,
            no_auth=self.no_auth,
            allowed_hosts=self.allowed_hosts,
            cors=self.cors,
            max_queue=self.max_queue,
            max_num_seqs=self.max_num_seqs,
            timeout=self.timeout,
            max_body=self.max_body,
            max_new_tokens=self.max_new_tokens,
            grace=self.grace,
            as_json=self.as_json,
        )
        settings.check()
        return settings

    def load_options(self) -> LoadOptions:
        """Return how each replica loads the model.

        Raises:
            OptionInvalid: an option has an impossible value.
        """
        names = ("device", "backend", "template", "context", "head", "check", "kv_cache")
        return LoadOptions(**{name: getattr(self, name) for name in names})


def parse_options(
    args: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> DeploymentOptions:
    """Parse options, and take the key from the environment where they have none.

    Raises:
        OptionInvalid: one is unknown or has an impossible value.
    """
    key = {"api_key": environ[KEY]} if KEY in environ else {}
    try:
        options = DeploymentOptions.model_validate({**key, **args})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        raise OptionInvalid(
            f"there is no option {name!r}" if unknown else f"{name}: {first['msg']}",
            hint=f"the options are {', '.join(sorted(DeploymentOptions.model_fields))}"
            if unknown
            else "choose another value",
        ) from error
    options.replica_range()
    return options
