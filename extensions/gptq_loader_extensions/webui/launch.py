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
    """Run the folder's server.py as the main program."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["server.py", *arguments]
    try:
        register()
    except ModuleNotFoundError as error:
        _exit(
            f"text-generation-webui needs {error.name}, which is not installed in this Python",
            f"install gptq-loader-plugin with text-generation-webui's own Python (cmd_linux.sh, "
            f"cmd_windows.bat or cmd_macos.sh in {folder} opens it), and run gptq-loader there",
        )
    except GPTQLoaderError as error:
        _exit(error.message, error.hint)
    runpy.run_path("server.py", run_name="__main__")


def _exit(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {message}\nhint: {hint}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    launch(Path(sys.argv[1]), sys.argv[2:])
