"""Let a model write the chats it is calibrated on: what it will meet is what it says itself.

A chat model that is given nothing but the opening of a user's turn writes a question (Magpie,
Xu et al. 2024), and then answers it. Such samples keep a small chat model's answers better than
prose does, and need no corpus (Williams et al. 2024, self-calibration;
docs/decisions/own-chats.md has what it gains).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Chat", "render_chat", "write_chats"]

Chat: TypeAlias = "list[dict[str, str]]"

PLACE = "PLACE OF THE QUESTION"
BATCH_SIZE = 128  # chats
LIKELY_TOKENS = 170  # of a chat; decides how many are written at once
QUESTION_TOKENS, ANSWER_TOKENS = 64, 128
SHORTEST = 8  # characters of a question worth an answer


@torch.inference_mode()
def write_chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    progress: Callable[[Progress], None],
) -> list[Chat]:
    """Sample chats of one question and one answer until they have enough tokens.

    Args:
        model: the model before it is quantised.
        tokenizer: its tokenizer, with a chat template.
        tokens: how many tokens of chat are wanted.
        seed: of the sampling, so that an interrupted run meets the same samples.
        progress: called with the decoding steps done.

    Returns:
        The chats, each a list of messages.

    Raises:
        QuantizeError: the tokenizer has no chat template, or the model writes nothing.
    """
    if not tokenizer.chat_template:
        raise QuantizeError(
            "the model has no chat template, so it cannot write chats to be calibrated on",
            hint="give it a text instead: --text FILE",
        )
    writer = _Writer(model, tokenizer, progress)
    opening, closing = _user_turn(tokenizer)
    count = min(-(-tokens // LIKELY_TOKENS), BATCH_SIZE)
    chats: list[Chat] = []
    written = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while written < tokens:
            writer.expect(QUESTION_TOKENS + ANSWER_TOKENS)
            questions = writer.go_on([opening] * count, QUESTION_TOKENS, closing)
            questions = [question for question in questions if len(question) >= SHORTEST]
            prompts = [
                render_chat(tokenizer, [_turn("user", question)], ask=True)
                for question in questions
            ]
            answers = writer.go_on(prompts, ANSWER_TOKENS, None) if prompts else []
            new = [
                [_turn("user", question), _turn("assistant", answer)]
                for question, answer in zip(questions, answers, strict=True)
                if answer
            ]
            if not new:
                raise QuantizeError(
                    "the model wrote no chats to be calibrated on",
                    hint="give it a text instead: --text FILE",
                )
            chats += new
            written += sum(
                len(tokenizer(render_chat(tokenizer, chat))["input_ids"]) for chat in new
            )
            writer.catch_up()
    return chats


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, ask: bool = False) -> str:
    """Render messages by the tokenizer's own template, with an open reply after them to `ask`."""
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask))


class _Writer:
    """Sample continuations, and tell each step."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Callable[[Progress], None],
    ) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._progress = progress
        self._done = self._total = 0
        eos = getattr(model.generation_config, "eos_token_id", None)
        ends = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
        self._ends = {end for end in ends if end is not None}

    def expect(self, steps: int) -> None:
        """Raise the number of steps that progress counts to."""
        self._total += steps
        self._report()

    def catch_up(self) -> None:
        """Count the steps that were not needed as done."""
        self._done = self._total
        self._report()

    def go_on(self, prompts: Sequence[str], max_new_tokens: int, closing: str | None) -> list[str]:
        """Sample what follows each prompt, up to its end of turn or `closing`."""
        tokenizer = self._tokenizer
        inputs = _padded([tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts])
        ends, stop = set(self._ends), {}
        if closing:
            ids = tokenizer.encode(closing, add_special_tokens=False)
            if len(ids) == 1:
                ends.update(ids)
            else:
                stop = {"stop_strings": [closing], "tokenizer": tokenizer}
        written = self._model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=50,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id or 0,
            eos_token_id=sorted(ends) or None,
            stopping_criteria=[self._step],
            **stop,
        )[:, inputs["input_ids"].shape[1] :]
        marks = [*([closing] if closing else []), *tokenizer.all_special_tokens]
        return [_before(marks, text).strip() for text in tokenizer.batch_decode(written)]

    def _step(self, input_ids: torch.Tensor, _: torch.Tensor, **__: object) -> torch.Tensor:
        """Count a step; as a criterion, stop nothing."""
        self._done += 1
        self._report()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def _report(self) -> None:
        self._progress(Progress("write chats", self._done, self._total, "steps", ""))


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Pad prompts on the left, under a mask."""
    length = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
    }


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what stands before a user's words in the first turn, and what ends them."""
    opening, _, closing = render_chat(tokenizer, [_turn("user", PLACE)]).partition(PLACE)
    return opening, closing.strip()


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _before(marks: Sequence[str], text: str) -> str:
    """Return a text up to the first of some marks."""
    return text[: min((text.find(mark) for mark in marks if mark in text), default=len(text))]
