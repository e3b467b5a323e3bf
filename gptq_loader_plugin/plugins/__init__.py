"""Find plugins and ask them."""

from __future__ import annotations

from gptq_loader_plugin.plugins.manager import GROUP, Plugins, import_plugin, limited_to

__all__ = ["GROUP", "Plugins", "import_plugin", "limited_to"]
