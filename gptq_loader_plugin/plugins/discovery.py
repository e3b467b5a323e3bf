"""Find every installed plugin and ask each one alone, so that a broken one hides no other.

What is found is for people: what a plugin offers, where it comes from, whether that works on this
machine, and if not why. A load uses `manager.py`, where a plugin that is broken is an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from gptq_loader_plugin.device import find_devices
from gptq_loader_plugin.errors import PluginError
from gptq_loader_plugin.host import Checkable, NotReady
from gptq_loader_plugin.kernel import LayerSpec
from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS
from gptq_loader_plugin.plugins.manager import GROUP, Plugins, import_plugin, limited_to
from gptq_loader_plugin.verdict import Accepted, Declined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from importlib.metadata import EntryPoint

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.host import Host
    from gptq_loader_plugin.kernel import Kernel
    from gptq_loader_plugin.kernel.packing import Bits

__all__ = ["InstalledPlugin", "Kind", "Offer", "State", "discover", "to_json"]

Kind = Literal["kernel", "template", "reader", "host"]
State = Literal["in force", "left out", "broken"]
Named = TypeVar("Named")

# A layer that every kernel which runs here at all takes, but for its bits: sides that are powers
# of two, groups of 128 in order.
SIDE, GROUP_SIZE = 4096, 128
BITS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 7, 8)
COMMON_BITS: Bits = 4  # what is refused of these is said of the kernel


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing that a plugin offers.

    Attributes:
        kind: what it is.
        name: its name.
        works: whether it works on this machine; None where it cannot tell.
        detail: what it can do here, or why it cannot.
    """

    kind: Kind
    name: str
    works: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """An installed plugin.

    Attributes:
        name: its entry point's name.
        module: what its entry point names.
        distribution: the package that brings it.
        version: that package's version.
        state: "broken" is in the way of every load; "left out" is what the environment does to it.
        error: what is wrong with a broken one, or "".
        offers: what it offers.
    """

    name: str
    module: str
    distribution: str
    version: str
    state: State = "in force"
    error: str = ""
    offers: tuple[Offer, ...] = ()

    @property
    def source(self) -> str:
        """The package and its version."""
        return f"{self.distribution} {self.version}".rstrip()


def discover(
    *, entries: Iterable[EntryPoint] | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[InstalledPlugin, ...]:
    """Find the installed plugins, in the order of their names; nothing they do is raised.

    Args:
        entries: the entry points; None takes those installed.
        environ: where `GPTQ_LOADER_PLUGINS` is looked up.

    Raises:
        PluginError: `GPTQ_LOADER_PLUGINS` names a plugin that is not installed.
    """
    every = list(entry_points(group=GROUP) if entries is None else entries)
    limited = limited_to(environ, {entry.name for entry in every})
    devices = find_devices()
    plugins = [
        _look(entry, devices)
        if limited is None or entry.name in limited
        else replace(_of(entry), state="left out")
        for entry in sorted(every, key=lambda entry: entry.name)
    ]
    return _without_clashes(plugins)


def to_json(installed: Iterable[InstalledPlugin]) -> dict[str, list[dict[str, Any]]]:
    """Return what was found as plain values: a list for each kind, and one of the plugins."""
    plugins = list(installed)
    lists: dict[str, list[dict[str, Any]]] = {
        f"{kind}s": [
            {
                "name": offer.name,
                "works": offer.works,
                "detail": offer.detail,
                "plugin": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
            }
            for plugin in plugins
            for offer in plugin.offers
            if offer.kind == kind
        ]
        for kind in get_args(Kind)
    }
    lists["plugins"] = [
        {
            "name": plugin.name,
            "module": plugin.module,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "state": plugin.state,
            "error": plugin.error or None,
        }
        for plugin in plugins
    ]
    return lists


def _look(entry: EntryPoint, devices: tuple[Device, ...]) -> InstalledPlugin:
    """Import one plugin and ask it for everything it may offer."""
    plugin = _of(entry)
    try:
        plugin_only = Plugins(import_plugin(entry), environ={})
    except PluginError as error:
        return replace(plugin, state="broken", error=error.message)
    errors: list[str] = []
    offers = [
        *(_kernel(kernel, devices) for kernel in _ask(plugin_only.kernels, errors)),
        *(
            _always("template", template.name, template.source)
            for template in _ask(plugin_only.templates, errors)
        ),
        *(_always("reader", reader.name, "") for reader in _ask(plugin_only.readers, errors)),
        *(_host(host) for host in _ask(plugin_only.hosts, errors)),
    ]
    state: State = "broken" if errors else "in force"
    return replace(plugin, state=state, error="; ".join(errors), offers=tuple(offers))


def _of(entry: EntryPoint) -> InstalledPlugin:
    if entry.dist is None:
        return InstalledPlugin(entry.name, entry.value, "unknown", "")
    return InstalledPlugin(entry.name, entry.value, entry.dist.name, entry.dist.version)


def _ask(offers: Callable[[], tuple[Named, ...]], errors: list[str]) -> tuple[Named, ...]:
    """Return what a plugin offers of one kind; add to `errors` what is wrong with it."""
    try:
        return offers()
    except PluginError as error:
        errors.append(error.message)
        return ()


def _always(kind: Kind, name: str, detail: str) -> Offer:
    """Return an offer that works wherever it is installed."""
    return Offer(kind, name, works=True, detail=detail)


def _kernel(kernel: Kernel, devices: tuple[Device, ...]) -> Offer:
    """Ask a kernel about layers of every width, on every device of this machine."""
    runs: list[str] = []
    reasons: list[str] = []
    for device in devices:
        try:
            verdicts = {bits: kernel.consider(_layer(bits), device) for bits in BITS}
        except Exception as error:  # noqa: BLE001 - a plugin's own code, which may raise anything
            return Offer("kernel", kernel.name, works=False, detail=f"it failed: {error}")
        accepted = [bits for bits, verdict in verdicts.items() if isinstance(verdict, Accepted)]
        if accepted:
            runs.append(f"{_range(accepted)} on {device}")
        elif isinstance(refusal := verdicts[COMMON_BITS], Declined):
            reasons.append(refusal.reason)
    detail = "; ".join(runs or dict.fromkeys(reasons))
    return Offer("kernel", kernel.name, works=bool(runs), detail=detail)


def _layer(bits: Bits) -> LayerSpec:
    return LayerSpec(
        name="",
        in_features=SIDE,
        out_features=SIDE,
        bits=bits,
        group_size=GROUP_SIZE,
        desc_act=False,
        sym=True,
        groups=SIDE // GROUP_SIZE,
        group_rows=(GROUP_SIZE, GROUP_SIZE),
        group_unit=GROUP_SIZE,
        zero_range=(2 ** (bits - 1), 2 ** (bits - 1)),
        layout="continuous" if bits in CONTINUOUS_BITS else "planar",
    )


def _range(bits: Sequence[int]) -> str:
    """Write widths as people do: "2 to 8 bits", "2, 3, 4, 8 bits"."""
    if len(bits) > 2 and bits[-1] - bits[0] == len(bits) - 1:
        return f"{bits[0]} to {bits[-1]} bits"
    return f"{', '.join(str(bit) for bit in bits)} bits"


def _host(host: Host) -> Offer:
    if not isinstance(host, Checkable):
        return Offer("host", host.name, works=None, detail="it does not say")
    try:
        readiness = host.check()
    except Exception as error:  # noqa: BLE001 - a plugin's own code, which may raise anything
        return Offer("host", host.name, works=False, detail=f"it failed: {error}")
    if isinstance(readiness, NotReady):
        detail = f"{readiness.reason}; {readiness.hint}"
        return Offer("host", host.name, works=False, detail=detail)
    detail = f"{readiness.program}; {readiness.note}" if readiness.note else readiness.program
    return Offer("host", host.name, works=True, detail=detail)


def _without_clashes(plugins: list[InstalledPlugin]) -> tuple[InstalledPlugin, ...]:
    """Mark what two plugins offer by one name: neither works until one of them is gone."""
    owners: dict[tuple[Kind, str], list[str]] = {}
    for plugin in plugins:
        for offer in plugin.offers:
            owners.setdefault((offer.kind, offer.name), []).append(plugin.name)
    clashing = {key: names for key, names in owners.items() if len(names) > 1}
    return tuple(_marked(plugin, clashing) for plugin in plugins)


def _marked(
    plugin: InstalledPlugin, clashing: Mapping[tuple[Kind, str], list[str]]
) -> InstalledPlugin:
    offers, errors = [], []
    for offer in plugin.offers:
        names = clashing.get((offer.kind, offer.name))
        if names is None:
            offers.append(offer)
            continue
        error = f"{' and '.join(sorted(names))} offer a {offer.kind} named {offer.name}"
        offers.append(replace(offer, works=False, detail=error))
        errors.append(error)
    if not errors:
        return plugin
    return replace(plugin, state="broken", error="; ".join(errors), offers=tuple(offers))
