"""Sizes in config.json that the tensors do not bear out: nothing is built of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy, edit_json, plugins

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from pathlib import Path

HUGE: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 3},
    {"hidden_size": 10**9},
    {"hidden_size": 136},
    {"intermediate_size": 10**9},
    {"head_dim": 10**9},
    {"num_attention_heads": 10**9},
    {"num_key_value_heads": 10**9},
    {"max_position_embeddings": 10**12},
]


@pytest.mark.parametrize("fields", HUGE, ids=str)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_it_is_refused_by_the_headers(
    fields: dict[str, Any], part: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(ONE, tmp_path / "one")

    def built(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("gptq_loader_plugin.model.skeleton._build", built)
    change = fields if part is None else {part: fields}
    edit_json(folder / "config.json", lambda it: it.update(change))
    (name,) = fields
    for use in (gptq.inspect, gptq.explain, gptq.load):
        with pytest.raises(gptq.ConfigInvalid, match=rf"config\.json: {name} is ") as caught:
            use(folder, plugins=plugins())
        if name != "max_position_embeddings":
            assert "the tensors have" in caught.value.message
            assert "model." in caught.value.message or "lm_head" in caught.value.message


def test_a_vocabulary_is_the_tensors(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    edit_json(folder / "config.json", lambda it: it.update(vocab_size=10**9))
    with pytest.raises(gptq.ConfigInvalid, match="vocab_size is 1000000000"):
        gptq.load(folder, plugins=plugins())
