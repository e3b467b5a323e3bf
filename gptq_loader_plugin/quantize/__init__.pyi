from .options import QuantizeOptions
from .run import quantize, quantize_model

__all__ = ["QuantizeOptions", "quantize", "quantize_model"]
