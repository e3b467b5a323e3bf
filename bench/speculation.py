"""Time replies with guessed tokens and without, by turns: a summary, a code edit, a free story.

    python bench/speculation.py REF [--draft REF] [--rounds 3] [--tokens 256]

A factor above 1 is time saved. The replies are greedy, and it says whether both wrote the same
text: they do on one thread; on several, attention adds in an order that goes by a step's length.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gptq_loader_plugin as gptq

ARTICLE = (
    "The lighthouse at Cape Florida was built in 1825 and rebuilt in 1846. It guided mariners off "
    "the Florida Reef, which starts near Key Biscayne and extends southward a few miles offshore. "
    "The light was run by staff, with interruptions, until 1878, when it was replaced by Fowey "
    "Rocks lighthouse. The lighthouse was put back into use in 1978 by the U.S. Coast Guard to "
    "mark the Florida Channel, the deepest natural channel into Biscayne Bay. They decommissioned "
    "it in 1990. Within the Bill Baggs Cape Florida State Park since 1966, the lighthouse was "
    "relit in 1996."
)
CODE = """class Account:
    def __init__(self, owner, balance):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance = self.balance + amount
        return self.balance

    def withdraw(self, amount):
        self.balance = self.balance - amount
        return self.balance
"""
ASKED = {
    "summary": f"Summarize this text in a few sentences:\n\n{ARTICLE}",
    "code edit": f"Rewrite this class with a docstring in each method:\n\n```python\n{CODE}```",
    "story": "Write a story about a clockmaker who finds a door in the sea.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("--draft", default="ngram", help="a smaller checkpoint that guesses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    options = gptq.GenerateOptions(temperature=0, max_new_tokens=arguments.tokens)
    with gptq.load(
        arguments.reference, device="cpu", draft=arguments.draft, dtype=arguments.dtype
    ) as model:
        draft = model.draft
        for name, asked in ASKED.items():
            times: dict[bool, list[float]] = {True: [], False: []}
            texts = set()
            for _ in range(arguments.rounds):
                for guesses in (True, False):
                    model.draft = draft if guesses else None
                    model.forget()
                    pieces = model.chat([{"role": "user", "content": asked}], options)
                    text = next(pieces).text  # the prompt is read
                    began = time.perf_counter()
                    for piece in pieces:
                        text += piece.text
                    times[guesses].append(time.perf_counter() - began)
                    texts.add(text)
            with_guesses, without = (statistics.median(times[it]) for it in (True, False))
            same = "the same text" if len(texts) == 1 else "OTHER TEXTS"
            print(
                f"{name}: {without / with_guesses:.2f} times as fast; {piece.tokens} tokens, {same}"
            )
        model.draft = draft


if __name__ == "__main__":
    main()
