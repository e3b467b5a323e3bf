"""Start text-generation-webui with our loader in it, before it loads the model of `--model`.

python -m gptq_loader_extensions.webui.launch FOLDER [text-generation-webui's own arguments]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from gptq_loader_extensions.webui.register import register
from gptq_loader_plugin.errors import GPTQLoaderError

__all__ = ["launch"]


def launch(folder: Path, arguments: list[str]) -> None:
    """Run the folder's server.py as if it were called by itself."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["server.py", *arguments]
    try:
        register()
    except ModuleNotFoundError as error:
        _leave(
            f"this Python lacks {error.name}, which text-generation-webui needs",
            f"install gptq-loader-plugin with text-generation-webui's own Python (in {folder}, "
            "cmd_linux.sh, cmd_windows.bat or cmd_macos.sh opens it), and run gptq-loader there",
        )
    except GPTQLoaderError as error:
        _leave(error.message, error.hint)
    runpy.run_path("server.py", run_name="__main__")


def _leave(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {message}\nhint: {hint}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    launch(Path(sys.argv[1]), sys.argv[2:])
