"""Load any GPTQ checkpoint, exactly, and say which kernel runs it and why.

```python
import gptq_loader_plugin as gptq

with gptq.load("demo") as model:
    for piece in model.chat([{"role": "user", "content": "What is the capital of France?"}]):
        print(piece.text, end="", flush=True)
```

Importing this package imports neither torch nor pydantic: each name is found on first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
