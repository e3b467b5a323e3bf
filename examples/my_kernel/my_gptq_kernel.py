"""A whole plugin: a kernel for 8-bit layers and a chat template.

    pip install ./examples/my_kernel
    gptq-loader explain REF --backend int8rows
    pytest --pyargs gptq_loader_plugin.conformance --kernel int8rows

The kernel keeps 8-bit codes as bytes (half of bfloat16's memory) and dequantises a block of rows
at a time. Importing this module imports no torch: `gptq-loader inspect` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin import Accepted, Declined, encode_messages, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin import Device, Kernel, LayerSpec, PackedLinear, Template


@dataclass(frozen=True)
class Int8Rows:
    """Multiply 8-bit layers without dequantising them as a whole."""

    name: str = "int8rows"

    def consider(self, layer: LayerSpec, device: Device) -> Accepted | Declined:
        """Say yes or no from the shapes alone; a no is read by people."""
        del device  # plain torch runs anywhere
        if layer.bits != 8:
            return Declined(self.name, f"{layer.bits}-bit; this takes 8-bit only")
        return Accepted(
            self.name,
            rank=5,  # above reference (1), below dense (10): it saves memory, not time
            dtype="float32",
            prepared_bytes=layer.in_features * (layer.out_features + 8)
            + layer.groups * layer.out_features * 5,
            note="codes stay bytes; dequantised block by block",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Unpack once; called with the layer's tensors, zeros already true."""
        import torch

        class Int8Linear(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                tensors = {
                    "codes": packed.codes().t().contiguous(),  # [N, K]
                    "zeros": packed.zeros.t().contiguous(),  # [N, G]
                    "scales": packed.scales.float().t().contiguous(),  # [N, G]
                    "groups": packed.g_idx.long(),  # [K]
                    "bias": packed.bias,
                }
                for name, tensor in tensors.items():  # a saved model has no use for them
                    self.register_buffer(name, tensor, persistent=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                blocks = []
                for start in range(0, layer.out_features, 1024):
                    rows = slice(start, start + 1024)
                    zeros = self.zeros[rows, self.groups].float()
                    weight = (self.codes[rows].float() - zeros) * self.scales[rows][:, self.groups]
                    blocks.append(x.float() @ weight.t())
                y = torch.cat(blocks, dim=-1)
                return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

        return Int8Linear().to(device.torch_name)


@dataclass(frozen=True)
class Plain:
    """A template without control tokens, for base models: `user: ...`, `assistant: ...`."""

    name: str = "plain"
    source: str = "my-gptq-kernel"
    stop: tuple[str, ...] = ("\nuser:",)

    def render(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> str:
        turns = [f"{message['role']}: {message['content']}" for message in messages]
        return "\n".join([*turns, "assistant:"] if add_generation_prompt else turns)

    def encode(
        self,
        messages: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        # nothing that a user types becomes a control token; the template's own tokens count
        return encode_messages(
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt
        )


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the kernel; it is asked about every layer."""
    return [Int8Rows()]


@hookimpl
def gptq_templates() -> list[Template]:
    """Offer the template, for `template="plain"`."""
    return [Plain()]
