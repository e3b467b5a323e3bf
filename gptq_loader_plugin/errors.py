"""Everything this package raises.

* GPTQLoaderError ............. the base: `message`, and `hint`, which says what to do next
  + BadReference .............. what the user typed does not name one checkpoint
    - CheckpointNotFound ...... it names none; carries where it looked
    - AmbiguousReference ...... it names several; carries them
  + CheckpointError ........... the files are there and are wrong; carries the path
    - ConfigInvalid ........... a config file does not parse, or a field has an impossible value
    - UnsupportedFormat ....... valid, and of a kind that no installed reader reads
    - TensorMismatch .......... a tensor is missing, or its shape or dtype is not what it must be
    - UnsafeFile .............. a pickle that wants to run code; nothing of it was run
    - CorruptCheckpoint ....... a file is cut short, or holds values no checkpoint can have
  + NoBackend ................. every kernel declined; carries each one's reason
  + NotEnoughMemory ........... a model that does not fit into memory; carries the bytes
  + OptionInvalid ............. an option of a call is misspelt or out of range
    - EmptyPrompt ............. there is nothing to go on with
  + PromptTooLong ............. a prompt that does not fit the context
  + TemplateError ............. there is no chat template, or it cannot render these messages
  + PluginError ............... a plugin broke its side of a hook, or is not installed
  + HubError .................. the model hub could not be reached, or refused
    - DownloadCancelled ....... a caller ended a download; what was fetched is kept
  + QuantizeError ............. a model cannot be quantised as asked
  + CodeTooLarge .............. a code does not fit into the bits it is to be packed in
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptq_loader_plugin.verdict import Declined

__all__ = [
    "AmbiguousReference",
    "BadReference",
    "CheckpointError",
    "CheckpointNotFound",
    "CodeTooLarge",
    "ConfigInvalid",
    "CorruptCheckpoint",
    "DownloadCancelled",
    "EmptyPrompt",
    "GPTQLoaderError",
    "HubError",
    "NoBackend",
    "NotEnoughMemory",
    "OptionInvalid",
    "PluginError",
    "PromptTooLong",
    "QuantizeError",
    "TemplateError",
    "TensorMismatch",
    "UnsafeFile",
    "UnsupportedFormat",
    "is_out_of_memory",
]

# What torch, the native kernel and Python say when there is no memory, where they have no class.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "out of memory",
    "can't start new thread",
)


class GPTQLoaderError(Exception):
    """The base of every error here; catch this to catch them all.

    Args:
        message: what is wrong, and with what.
        hint: what to do next, in the imperative.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        if not message or not hint:
            raise ValueError("an error says what is wrong, and what to do next")
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.add_note(f"hint: {hint}")  # so that a traceback shows it too


class BadReference(GPTQLoaderError):
    """A reference does not name one checkpoint.

    Attributes:
        reference: what the user typed.
        tried: where it was looked for, or what it could mean.
    """

    def __init__(self, message: str, *, reference: str, tried: Sequence[str], hint: str) -> None:
        super().__init__(message, hint=hint)
        self.reference = reference
        self.tried = tuple(tried)


class CheckpointNotFound(BadReference):
    """A reference names no checkpoint."""


class AmbiguousReference(BadReference):
    """A reference names several checkpoints."""


class CheckpointError(GPTQLoaderError):
    """A checkpoint's files are there and are wrong.

    Attributes:
        path: the file or folder that is wrong.
    """

    def __init__(self, message: str, *, path: Path, hint: str) -> None:
        super().__init__(f"{path}: {message}", hint=hint)
        self.path = path


class ConfigInvalid(CheckpointError):
    """A config file does not parse, or a field has a value no GPTQ checkpoint can have."""


class UnsupportedFormat(CheckpointError):
    """A valid checkpoint of a kind that no installed reader reads."""


class TensorMismatch(CheckpointError):
    """A tensor is missing, left over, or of the wrong shape or dtype.

    Attributes:
        tensor: the tensor's name in the checkpoint, where one tensor is to blame.
    """

    def __init__(self, message: str, *, path: Path, hint: str, tensor: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.tensor = tensor


class UnsafeFile(CheckpointError):
    """A pickle holds something other than tensors; nothing of it was run."""


class CorruptCheckpoint(CheckpointError):
    """A file is cut short, or holds values that no checkpoint can have.

    Attributes:
        tensor: the tensor's name in the checkpoint, where one tensor is to blame.
    """

    def __init__(self, message: str, *, path: Path, hint: str, tensor: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.tensor = tensor


class NoBackend(GPTQLoaderError):
    """Every kernel declined a layer.

    Attributes:
        layer: the layer, in words.
        declined: each kernel that was asked, with its reason, in the order of their names.
    """

    def __init__(self, layer: str, declined: Sequence[Declined], *, hint: str) -> None:
        reasons = "".join(f"\n  {verdict.kernel:<10} {verdict.reason}" for verdict in declined)
        super().__init__(
            f"no kernel can run {layer}:{reasons or ' no kernel is installed'}", hint=hint
        )
        self.layer = layer
        self.declined = tuple(declined)


class NotEnoughMemory(GPTQLoaderError):
    """A model needs more memory than is free.

    Attributes:
        needed: the bytes it needs.
        free: the bytes that are free.
    """

    def __init__(self, message: str, *, needed: int, free: int, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.free = free


class OptionInvalid(GPTQLoaderError):
    """An option of a call is misspelt or out of range."""


class EmptyPrompt(OptionInvalid):
    """A prompt has no tokens, and the tokenizer has none that begins a text."""


class PromptTooLong(GPTQLoaderError):
    """A prompt does not fit the model's context.

    Attributes:
        tokens: the prompt's length in tokens.
        context: the longest sequence the model was loaded for.
        exact: whether it has just as many tokens, and not more.
    """

    def __init__(
        self, message: str, *, tokens: int, context: int, hint: str, exact: bool = True
    ) -> None:
        super().__init__(message, hint=hint)
        self.tokens = tokens
        self.context = context
        self.exact = exact


class TemplateError(GPTQLoaderError):
    """There is no chat template, or it cannot render these messages."""


class PluginError(GPTQLoaderError):
    """A plugin broke its side of a hook, or one that is needed is not installed."""


class HubError(GPTQLoaderError):
    """The model hub could not be reached, or refused.

    Attributes:
        status: the HTTP status it answered with, where it answered.
    """

    def __init__(self, message: str, *, hint: str, status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class DownloadCancelled(HubError):
    """A caller ended a download; what was fetched is kept for the next."""


class QuantizeError(GPTQLoaderError):
    """A model cannot be quantised as asked."""


class CodeTooLarge(GPTQLoaderError, ValueError):
    """A code does not fit into the bits it is to be packed in."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, Python's, the system's or torch's, or this came of one."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False
