"""From tokens to text: sampling, keys and values, replies one by one or side by side."""
