"""Count the texts that llama.cpp splits otherwise than SentencePiece, after a conversion to GGUF.

    python bench/gguf_tokens.py TEXT...

Trains a SentencePiece model (BPE, with bytes for what it lacks, as Llama's) on the first text,
quantises a tiny Llama with it, converts that to GGUF twice, by its tokenizer.model and by its
tokenizer.json alone, and splits every line of the texts, and a few that are hard, with llama.cpp,
with SentencePiece, and with transformers. Needs llama-cpp-python and sentencepiece.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from llama_cpp import llama_cpp
from planted_faults import TESTS
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.quantize.options import QuantizeOptions
from gptq_loader_plugin.quantize.run import quantize_model

VOCABULARY, CHARACTERS, LINES = 1000, 600_000, 1500
HARD = (
    "two  spaces", " led", "trail ", "tab\tx", "new\nline\n\n\nmore", "été ü ß", "日本語のテキスト",
    "😀🎉 emoji", "a\u00a0b", "1234567", "x=3.14;", "\u200bzero", "\r\n", "   ", "a" * 200,
    "ﬁ ligature", "e\u0301 combining", "<0x41>", "Ω≈ç√", "ß\x07bell",
)  # fmt: skip
SETTINGS = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
    "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False,
}  # fmt: skip


class LlamaTokens:
    """A GGUF file's tokenizer, by llama.cpp's C interface."""

    def __init__(self, file: Path) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        """Split a text, in which no special token counts."""
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 8))()
        count = llama_cpp.llama_tokenize(
            self._vocabulary, content, len(content), ids, len(ids), False, False  # noqa: FBT003
        )  # fmt: skip
        return list(ids[:count])


def write_checkpoint(text: str, folder: Path) -> Path:
    """Quantise a tiny Llama with a tokenizer that is trained on a text."""
    sys.path.insert(0, str(TESTS / "families"))
    from tiny_configs import tiny_config

    source = folder / "source"
    source.mkdir()
    (folder / "text").write_text(text[:CHARACTERS])
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(source / "tokenizer"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True, split_digits=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    config: Any = tiny_config("llama")
    config.vocab_size, config.bos_token_id, config.eos_token_id = VOCABULARY, 1, 2
    config.pad_token_id = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
    options = QuantizeOptions(group_size=32, order="none", effort="fast", samples=4, seq_len=64)
    made = quantize_model(source, folder / "both", options=options, text=folder / "text")
    shutil.copytree(made, folder / "json")
    shutil.copy(source / "tokenizer.model", made)
    return made


def main() -> None:
    """Print how many differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    contents = [file.read_text("utf-8") for file in parser.parse_args().texts]
    lines = [line for content in contents for line in content.splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = write_checkpoint(contents[0], folder)
        own = SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
        theirs = AutoTokenizer.from_pretrained(made)
        # what transformers reads as a special token, SentencePiece and llama.cpp are not asked to
        texts = [line.replace("<unk>", "unk") for line in (*lines[:LINES], *HARD)]
        bare = [text.strip(" ") for text in texts if text.strip(" ")]
        for name in ("both", "json"):
            app(["convert", str(folder / name), str(folder / f"{name}.gguf"), "--to", "gguf"],
                standalone_mode=False)  # fmt: skip
            split = LlamaTokens(folder / f"{name}.gguf")
            differing = sum(split.encode(text) != own.encode(text) for text in texts)
            others = sum(
                split.encode(text) != theirs(text, add_special_tokens=False)["input_ids"]
                for text in bare
            )
            kind = "tokenizer.model" if name == "both" else "tokenizer.json alone"
            print(f"by {kind}: of {len(texts)} texts {differing} are split otherwise than by "
                  f"SentencePiece, of {len(bare)} without spaces around them {others} than by "
                  "transformers", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
