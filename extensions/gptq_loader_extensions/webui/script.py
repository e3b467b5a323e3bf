"""Load GPTQ checkpoints: adds the loader "GPTQ (gptq_loader_plugin)" to the Model tab.

Written by `gptq-loader webui install`, and removed by `gptq-loader webui uninstall`.
"""

import logging

logger = logging.getLogger("textgen")  # text-generation-webui's own


def setup() -> None:
    """Add the loader; where its package is missing, log how to install it and change nothing."""
    try:
        from gptq_loader_extensions.webui.register import add_loader

        add_loader()
    except ImportError as error:
        logger.error(  # noqa: TRY400 - the message is enough
            "GPTQ checkpoints cannot be loaded: %s. Install the loader with the Python that runs "
            "this program (cmd_linux.sh, cmd_windows.bat or cmd_macos.sh opens it): "
            "pip install gptq-loader-plugin",
            error,
        )
