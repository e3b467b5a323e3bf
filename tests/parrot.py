"""A checkpoint that always writes the same reply: a real one, whose layers add nothing.

Each token's embedding picks the next token in the output head, so no token may come twice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from altered import ONE, copy, edit_json, edit_tensors
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from altered import Tensors

__all__ = ["TEMPLATE", "parrot"]

TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OLD = 384  # tokens of the checkpoint that it is made of


def parrot(
    folder: Path,
    pieces: Sequence[str],
    *,
    template: str = TEMPLATE,
    special: Sequence[str] = (),
    after: str = "\n",
    end: str = "<|im_end|>",
) -> Path:
    """Write the checkpoint.

    Args:
        folder: where.
        pieces: the reply's tokens, each another text.
        template: its chat template.
        special: which of the pieces are special tokens, which texts leave out.
        after: the prompt's last token.
        end: the token that ends the reply.
    """
    copy(ONE, folder)
    (folder / "chat_template.jinja").write_text(template)
    added = list(dict.fromkeys([*pieces, after, end, *special]))
    known = AutoTokenizer.from_pretrained(folder)
    added = [it for it in added if len(known.encode(it, add_special_tokens=False)) > 1]

    def add(content: dict[str, Any]) -> None:
        content["added_tokens"] += [
            {
                "id": OLD + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": text in special,
            }
            for i, text in enumerate(added)
        ]

    edit_json(folder / "tokenizer.json", add)
    rows = OLD + len(added)
    edit_json(folder / "config.json", lambda it: it.update(vocab_size=rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def single(text: str) -> int:
        (index,) = tokenizer.encode(text, add_special_tokens=False)
        return int(index)

    chain = [single(it) for it in (after, *pieces, end)]
    assert len(set(chain)) == len(chain), "a token comes twice"

    def rewrite(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.scales", "down_proj.scales")):
                tensor.zero_()
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(rows, 128, generator=generator)
        embedding /= embedding.norm(dim=1, keepdim=True)
        head = torch.zeros(rows, 128)
        for token, following in pairwise(chain):
            head[following] = 100 * embedding[token]
        tensors["model.embed_tokens.weight"] = embedding.bfloat16()
        tensors["lm_head.weight"] = head.bfloat16()
        tensors["model.norm.weight"] = torch.ones(128).bfloat16()

    edit_tensors(folder, rewrite)
    return folder
