"""How much of a layer the extension dequantises. Imports nothing heavy."""

from __future__ import annotations

__all__ = ["MULTIPLE", "dequantised_rows"]

# The kernel takes 32 rows a step and has no tail; columns that are missing to 32 are padded.
MULTIPLE = 32
# A product of more than 32 rows dequantises the whole weight and uses cuBLAS, where the weight has
# at most so many elements; exllamav2's own limit (config.py, max_dq_size).
MAX_ELEMENTS = 512 * 1024**2
ROWS_STEP = 128  # the extension rounds the rows it may dequantise down to multiples of it


def dequantised_rows(in_features: int, columns: int) -> int:
    """Say how many rows the extension may dequantise: all, rounded up, or none where too large."""
    rows = -(-in_features // ROWS_STEP) * ROWS_STEP
    return rows if rows * columns <= MAX_ELEMENTS else 0
