"""Find plugins and ask them."""

from __future__ import annotations

import functools
import os
import sys
from importlib.metadata import entry_points
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

import pluggy

from gptq_loader_plugin import hookspecs
from gptq_loader_plugin.errors import GPTQLoaderError, PluginError
from gptq_loader_plugin.host import Host
from gptq_loader_plugin.kernel import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from importlib.metadata import EntryPoint

    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.reader import Reader
    from gptq_loader_plugin.events import Progress

__all__ = ["GROUP", "Plugins", "import_plugin", "limited_to"]

GROUP = "gptq_loader_plugin"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Offer = TypeVar("Offer", bound=_Named)


class Plugins:
    """The plugins in force: those installed, or those a caller hands over.

    Args:
        plugins: objects or modules with hook implementations.
        installed: whether to add every plugin of the entry-point group `gptq_loader_plugin`, or
            those that `GPTQ_LOADER_PLUGINS` names, separated by commas.
        environ: where `GPTQ_LOADER_PLUGINS` and `GPTQ_LOADER_TRACE` are looked up.

    Raises:
        PluginError: a plugin cannot be imported, or implements a hook that does not exist.
    """

    def __init__(
        self,
        *plugins: object,
        installed: bool = False,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._sources: dict[str, str] = {}
        for plugin in plugins:
            self._register(plugin, getattr(plugin, "__name__", type(plugin).__name__), "given")
        if installed:
            self._register_installed(environ)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                str(error), hint="name only hooks that docs/hooks.md lists"
            ) from error
        if environ.get("GPTQ_LOADER_TRACE") == "1":
            self._manager.trace.root.setwriter(sys.stderr.write)
            self._manager.enable_tracing()
        self.hook = self._manager.hook

    def names(self) -> dict[str, str]:
        """Name the plugins in force, each with where it came from: a distribution, or "given"."""
        return dict(sorted(self._sources.items()))

    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel on offer, in name order.

        Raises:
            PluginError: a plugin offers something that is no kernel, or a name already taken.
        """
        return self._offers(Kernel, "kernel", self.hook.gptq_kernels)

    def templates(self) -> tuple[Template, ...]:
        """Every template on offer, in name order.

        Raises:
            PluginError: a plugin offers something that is no template, or a name already taken.
        """
        from gptq_loader_plugin.chat.template import Template

        return self._offers(Template, "template", self.hook.gptq_templates)

    def readers(self) -> tuple[Reader, ...]:
        """Every reader on offer, in name order.

        Raises:
            PluginError: a plugin offers something that is no reader, or a name already taken.
        """
        from gptq_loader_plugin.checkpoint.reader import Reader

        return self._offers(Reader, "reader", self.hook.gptq_readers)

    def hosts(self) -> tuple[Host, ...]:
        """Every host on offer, in name order.

        Raises:
            PluginError: a plugin offers something that is no host, or a name already taken.
        """
        return self._offers(Host, "host", self.hook.gptq_hosts)

    def host(self, name: str) -> Host:
        """Find one host by name.

        Raises:
            PluginError: no plugin offers it.
        """
        for host in self.hosts():
            if host.name == name:
                return host
        raise PluginError(
            f"no installed plugin offers the host {name!r}",
            hint="install gptq-loader-plugin with the extra of that name, and see gptq-loader "
            "plugins",
        )

    def progress(self, progress: Progress) -> None:
        """Call every listener with how far a piece of work has come."""
        self.hook.gptq_progress(progress=progress)

    def with_plugin(self, plugin: object) -> Plugins:
        """Make another set of plugins: these, and one more."""
        more = Plugins(environ={})
        for name, registered in self._manager.list_name_plugin():
            if registered is not None:
                source = self._sources.get(name, "given")
                more._register(registered, name, source)
                if source != "given":
                    more._guard(name)
        more._register(plugin, type(plugin).__name__, "given")
        return more

    def _register_installed(self, environ: Mapping[str, str]) -> None:
        installed = {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}
        limited = limited_to(environ, set(installed))
        for name in sorted(installed if limited is None else limited):
            entry = installed[name]
            self._register(import_plugin(entry), name, _source(entry))
            self._guard(name)

    def _register(self, plugin: object, name: str, source: str) -> None:
        unique = name
        while self._manager.has_plugin(unique):
            unique += "'"
        try:
            self._manager.register(plugin, unique)
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginError(
                f"the plugin {name} does not fit the hooks: {error}",
                hint="compare its hooks' arguments with docs/hooks.md",
            ) from error
        self._sources[unique] = source

    def _guard(self, name: str) -> None:
        """Have an installed plugin's faults told by its name; a caller's own stay as they are."""
        for caller in self._manager.get_hookcallers(self._manager.get_plugin(name)) or ():
            for implementation in caller.get_hookimpls():
                if implementation.plugin_name == name:
                    blamed = _blamed(implementation.function, name, caller.name)
                    setattr(implementation, "function", blamed)  # noqa: B010 - Final, by its type

    def _offers(
        self, kind: type[Offer], word: str, hook: Callable[[], Iterable[Iterable[object]]]
    ) -> tuple[Offer, ...]:
        try:
            offers = list(chain.from_iterable(hook()))
        except GPTQLoaderError:
            raise
        except Exception as error:
            raise PluginError(
                f"a plugin that offers a {word} failed: {error}",
                hint="find it with gptq-loader plugins; leave it out with GPTQ_LOADER_PLUGINS",
            ) from error
        by_name: dict[str, Offer] = {}
        for offer in offers:
            if not isinstance(offer, kind):
                raise PluginError(
                    f"{offer!r} is not a {word}",
                    hint=f"give it what a {word} needs (docs/hooks.md)",
                )
            if offer.name in by_name:
                first, second = _whence(by_name[offer.name]), _whence(offer)
                raise PluginError(
                    f"two plugins offer a {word} named {offer.name!r}: {first} and {second}",
                    hint="uninstall one, or leave it out with GPTQ_LOADER_PLUGINS",
                )
            by_name[offer.name] = offer
        return tuple(by_name[name] for name in sorted(by_name))


def _blamed(function: Callable[..., object], plugin: str, hook: str) -> Callable[..., object]:
    @functools.wraps(function)
    def call(*args: object) -> object:
        try:
            return function(*args)
        except GPTQLoaderError:
            raise
        except Exception as error:
            raise PluginError(
                f"the plugin {plugin} failed in {hook}: {error}",
                hint="update or uninstall it, or leave it out with GPTQ_LOADER_PLUGINS",
            ) from error

    return call


def limited_to(environ: Mapping[str, str], installed: set[str]) -> set[str] | None:
    """Read which plugins `GPTQ_LOADER_PLUGINS` leaves in; None where it is not set: all.

    Raises:
        PluginError: it names one that is not installed.
    """
    named = environ.get("GPTQ_LOADER_PLUGINS")
    if named is None:
        return None
    names = {name.strip() for name in named.split(",")} - {""}
    if missing := names - installed:
        raise PluginError(
            f"GPTQ_LOADER_PLUGINS names {', '.join(sorted(missing))}, which is not installed",
            hint=f"name some of: {', '.join(sorted(installed))}",
        )
    return names


def import_plugin(entry: EntryPoint) -> object:
    """Import the module that an entry point names.

    Raises:
        PluginError: it cannot be imported.
    """
    try:
        plugin: object = entry.load()
    except Exception as error:
        source = _source(entry)
        raise PluginError(
            f"the plugin {entry.name} of {source} cannot be imported: {error}",
            hint=f"update or uninstall {source}, or leave it out with GPTQ_LOADER_PLUGINS",
        ) from error
    return plugin


def _source(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown"


def _whence(offer: object) -> str:
    return f"{type(offer).__module__}.{type(offer).__qualname__}"
