"""A repository on the hub and a branch of it, as a user names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gptq_loader_plugin.errors import (
    OptionInvalid,
)

__all__ = ["HubReference", "parse_hub_reference"]

# no name of git's or the hub's holds two dots; some are made into paths
HUB = re.compile(r"(?!.*\.\.)(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<branch>[\w][\w./-]*))?")
# as a browser's address bar has it: https://huggingface.co/owner/repo/tree/branch
PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<branch>[^?#]+))?/?(?:[?#].*)?"
)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository on the hub, and a branch, tag or commit of it.

    Attributes:
        repo: "owner/name".
        branch: "main" where none was named.
    """

    repo: str
    branch: str = "main"

    def __str__(self) -> str:
        """Write it as a user does."""
        return f"{self.repo}:{self.branch}"

    @property
    def folder_name(self) -> str:
        """The name of its folder in a models directory, as text-generation-webui names it."""
        name = self.repo if self.branch == "main" else str(self)
        return re.sub(r"[/:]", "_", name)


def parse_hub_reference(reference: str, *, revision: str | None = None) -> HubReference | None:
    """Read `owner/repo`, `owner/repo:branch`, or its page's address; None where it is neither.

    Raises:
        OptionInvalid: both a branch and another revision are named.
    """
    if page := PAGE.fullmatch(reference):
        branch = (page["branch"] or "").rstrip("/")
        reference = f"{page['repo']}:{branch}" if branch else page["repo"]
    match = HUB.fullmatch(reference)
    if match is None:
        return None
    if revision is not None and match["branch"] not in (None, revision):
        raise OptionInvalid(
            f"{reference} names the branch {match['branch']}, and revision is {revision}",
            hint="name the branch once",
        )
    return HubReference(match["repo"], revision or match["branch"] or "main")
