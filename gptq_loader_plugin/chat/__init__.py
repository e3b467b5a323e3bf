"""From messages to tokens: templates, and the tokenizer."""
