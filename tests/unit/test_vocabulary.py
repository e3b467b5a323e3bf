"""Tokenizers and configs that have more tokens than the model, or fewer."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA, ONE, copy, edit_json, edit_tensors, error, expected, plugins
from served import COMPLETE, running

import gptq_loader_plugin as gptq
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from pathlib import Path

    import torch

ROWS = 380
SHORT = GenerateOptions(max_new_tokens=3, temperature=0)
ADDED = {
    "id": 384, "content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False, "special": True,
}  # fmt: skip


def shorten(folder: Path, rows: int = ROWS) -> None:
    """Cut the embedding and the head, so that the tokenizer has more tokens than they."""

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:rows].clone()

    edit_tensors(folder, cut)


def set_config(folder: Path, **fields: Any) -> None:
    edit_json(folder / "config.json", lambda it: it.update(fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy(ONE, tmp_path / "models" / "one")


@pytest.mark.parametrize("padding", [382, 10**9, -1, -400])
def test_a_padding_token_that_the_embedding_lacks_changes_nothing(
    padding: int, folder: Path
) -> None:
    shorten(folder)
    set_config(folder, vocab_size=ROWS, pad_token_id=padding)
    ids, right = expected(ONE)
    with gptq.load(folder, device="cpu", backend="reference", plugins=plugins()) as model:
        below = ids.clamp(max=ROWS - 1)
        if bool((below == ids).all()):
            assert error(model.model(ids).logits, right[..., :ROWS]) < 1e-5
        assert model.generate("The fox", SHORT).text


@pytest.mark.parametrize("stated", [383, 385, 500, 1])
def test_the_tensors_rows_win_over_vocab_size(stated: int, folder: Path) -> None:
    set_config(folder, vocab_size=stated)
    ids, right = expected(ONE)
    with gptq.load(folder, device="cpu", backend="reference", plugins=plugins()) as model:
        assert error(model.model(ids).logits, right) < 1e-5
        assert model.model.config.vocab_size == 384
        warning = f"vocab_size is {stated} in config.json; the tensors say 384, and they win"
        assert model.warnings.count(warning) == 1
    assert warning in gptq.inspect(folder, plugins=plugins()).warnings


def test_rows_that_differ_are_named(folder: Path) -> None:
    edit_tensors(
        folder, lambda it: it.update({"lm_head.weight": it["lm_head.weight"][:ROWS].clone()})
    )
    with pytest.raises(gptq.TensorMismatch, match=r"lm_head\.weight is \[380, 128\]"):
        gptq.load(folder, device="cpu", plugins=plugins())


def test_a_prompts_token_beyond_the_embedding_is_named(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda it: it["added_tokens"].append(ADDED))
    message = r"the prompt has <pad> \(id 384\), and the model knows the ids 0 to 383"
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        for use in (model.generate, model.stream, model.encode):
            with pytest.raises(gptq.OptionInvalid, match=message):
                use("Hello <pad> there")
        with pytest.raises(gptq.OptionInvalid, match=message):
            model.begin([1, 384], SHORT)
        with pytest.raises(gptq.OptionInvalid, match=message):
            model.stream_ids([1, 384], SHORT)
        with pytest.raises(gptq.OptionInvalid, match="id -1"):
            model.stream_ids([1, -1], SHORT)
        words = "".join(it.text for it in model.chat([{"role": "user", "content": "<pad>"}], SHORT))
        assert words  # what a user types is text


def test_the_servers_clients_are_told_of_the_token(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda it: it["added_tokens"].append(ADDED))
    with running(tmp_path, names=(), start=str(folder)) as server:
        for prompt in ("Hello <pad> there", [1, 384]):
            answer = server.post(COMPLETE, prompt=prompt, max_tokens=2)
            assert answer.status_code == 400, answer.text
            assert "384" in answer.json()["error"]["message"]
        assert server.chat("Hi <pad>", max_tokens=4).status_code == 200
        assert server.chat(max_tokens=4, logit_bias={"384": 5}).status_code == 400
        form = {"type": "json_object"}
        assert server.chat(max_tokens=4, response_format=form).status_code == 200


@pytest.mark.parametrize("size", ["config", "tensors"])
def test_chatml_is_not_offered_where_its_tokens_are_beyond_the_embedding(
    size: str, folder: Path
) -> None:
    shorten(folder)
    set_config(folder, vocab_size=ROWS if size == "config" else 384)
    (folder / "chat_template.jinja").unlink()
    checkpoint = open_checkpoint(folder)
    assert gptq.inspect(folder, plugins=plugins()).template.name == "none"
    if size == "config":
        assert find_template(folder, card=checkpoint.card).name == "none"
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        with pytest.raises(gptq.TemplateError):
            model.encode_chat([{"role": "user", "content": "Hi"}])
        assert model.generate("Hi", SHORT).tokens
        assert all(end < ROWS for end in model.end_ids(("<|im_end|>",)))
    with (
        gptq.load(folder, device="cpu", template="chatml", plugins=plugins()) as model,
        pytest.raises(gptq.OptionInvalid, match=r"the prompt has <\|im_start\|>"),
    ):
        model.encode_chat([{"role": "user", "content": "Hi"}])


def test_chatml_is_offered_where_its_tokens_are_the_models(tmp_path: Path) -> None:
    shutil.copytree(DATA / ONE, tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").unlink()
    assert gptq.inspect(tmp_path / "one", plugins=plugins()).template.name == "chatml"
