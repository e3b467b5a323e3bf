"""Every change to text-generation-webui is made once, and can be undone.

A stand-in is used here: the modules and the names in them that are used, and no more. The real one
is in tests/hosts/test_webui.py.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA, ONE

import gptq_loader_plugin as gptq
from gptq_loader_extensions.webui.generate import find_generate
from gptq_loader_extensions.webui.host_modules import NAME
from gptq_loader_extensions.webui.register import SETTINGS, add_loader, register
from gptq_loader_plugin.system.patch import undo_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULES = {
    "shared": """
import copy
from argparse import Namespace
args = Namespace(portable=False, nowebui=True, api=False, public_api=False, loader=None, cpu=True)
original_args, args_defaults = copy.deepcopy(args), Namespace()
settings, user_config, lora_names = {}, {}, []
model = tokenizer = generation_lock = None
model_name, stop_everything, model_dirty_from_training = "None", False, False
def fix_loader_name(name):
    return name
""",
    "loaders": """
import functools
loaders_and_params = {"Transformers": ["cpu"]}
loaders_samplers = {"Transformers": {"top_k"}}
def transformers_samplers():
    return {"top_k"}
@functools.cache
def list_model_elements():
    return ["loader", "cpu"]
@functools.cache
def list_all_samplers():
    return sorted(set().union(*loaders_samplers.values()))
@functools.cache
def get_all_params():
    return sorted({name for names in loaders_and_params.values() for name in names})
""",
    "models_settings": """
def infer_loader(model_name, model_settings, hf_quant_method=None):
    return "Transformers"
def get_model_metadata(model):
    settings = {}
    return settings | {"loader": infer_loader(model, settings)}
""",
    "models": """
from modules import shared
from modules.models_settings import get_model_metadata
def transformers_loader(model_name):
    return "their model", "their tokenizer"
def load_model(model_name, loader=None):
    shared.args.loader = loader or get_model_metadata(model_name)["loader"]
    shared.model, shared.tokenizer = transformers_loader(model_name)
    return shared.model, shared.tokenizer
def unload_model(keep_model_name=False):
    shared.model = shared.tokenizer = None
""",
    "text_generation": "def generate_reply_HF(*args, **kwargs):\n    return args",
    "utils": f"""
from pathlib import Path
def resolve_model_path(name):
    return Path({str(DATA)!r}) / name
def get_available_instruction_templates():
    return ["ChatML"]
""",
    "logging_colors": "import logging\nlogger = logging.getLogger('stand-in for textgen')",
    "ui_model_menu": """
from modules.loaders import get_all_params, list_model_elements
from modules.models import load_model, unload_model
from modules.models_settings import get_model_metadata
def create_ui(): ...
def create_event_handlers(): ...
def load_model_wrapper(name): ...
def save_model_settings(model, state): ...
def handle_load_model_event_final(length, loader, state): ...
""",
    "api.script": """
from modules.api import completions
class HTTPException(Exception):
    def __init__(self, detail):
        super().__init__(detail)
""",
    "api.completions": """
from modules.models import load_model
def encode(prompt): ...
def generate_reply(): ...
def generate_chat_reply(): ...
""",
}


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules, imported anew; an attribute of what this gives is one of them."""
    for name, text in MODULES.items():
        file = tmp_path / "modules" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["server.py", "--loader", "gptq"])
    for name in MODULES:
        if not name.startswith("api"):
            importlib.import_module(f"modules.{name}")
    yield importlib.import_module("modules")
    for name in loaded_modules():
        del sys.modules[name]


def loaded_modules() -> list[str]:
    return [name for name in sys.modules if name == "modules" or name.startswith("modules.")]


def state(webui: Any) -> dict[str, Any]:
    """Everything in the modules, and what the host keeps in objects that are changed in place."""
    shared, loaders = webui.shared, webui.loaders
    names = [f"modules.{name}" for name in MODULES if not name.startswith("api")]
    return {
        **{name: dict(vars(sys.modules[name])) for name in names},
        "arguments": [
            dict(vars(arguments))
            for arguments in (shared.args, shared.original_args, shared.args_defaults)
        ],
        "loaders": [dict(loaders.loaders_and_params), dict(loaders.loaders_samplers)],
        "lists": [
            list(cached())
            for cached in (
                loaders.list_model_elements,
                loaders.list_all_samplers,
                loaders.get_all_params,
            )
        ],
        "filters": list(webui.logging_colors.logger.filters),
    }


@pytest.mark.parametrize("page", [False, True])
@pytest.mark.parametrize("api", [False, True])
def test_it_is_done_once_and_undone_exactly(webui: Any, page: bool, api: bool) -> None:
    webui.shared.args.nowebui, webui.shared.args.api = not page, api
    before = state(webui)
    patches = register()
    once = state(webui)
    assert once["lists"][0] == ["loader", "cpu", *SETTINGS]
    assert list(once["loaders"][0]) == ["Transformers", NAME]
    assert "gptq_explain" in once["lists"][2]
    assert webui.shared.args.loader == NAME
    for name in ("load_model", "unload_model"):
        assert getattr(webui.ui_model_menu, name) is getattr(webui.models, name)
        assert getattr(webui.models, name) is not before["modules.models"][name]
    assert (webui.ui_model_menu.create_ui is before["modules.ui_model_menu"]["create_ui"]) != page
    assert register() is patches
    assert state(webui) == once
    undo_all(patches)
    assert state(webui) == before
    assert register() is not patches, "and it can be done again"
    assert state(webui)["lists"] == once["lists"]


def test_a_host_that_lacks_something_is_left_as_it_is(
    webui: Any, caplog: pytest.LogCaptureFixture
) -> None:
    del webui.text_generation.generate_reply_HF
    before = state(webui)
    with pytest.raises(gptq.PluginError, match=r"has no modules\.text_generation\.generate_reply"):
        register()
    add_loader()
    assert "update gptq-loader-plugin" in caplog.text
    assert state(webui) == before


def test_the_portable_build_is_left_as_it_is(webui: Any) -> None:
    webui.shared.args.portable = True
    before = state(webui)
    assert register() == []
    assert state(webui) == before


def test_a_checkpoint_of_ours_is_loaded_and_unloaded(webui: Any) -> None:
    patches = register()
    webui.shared.args.loader = None
    model, tokenizer = webui.ui_model_menu.load_model(ONE)
    assert find_generate(model) is not None
    assert tokenizer.eos_token_id is not None
    assert webui.shared.args.loader == NAME
    assert webui.shared.settings["truncation_length"] == 512
    webui.ui_model_menu.unload_model()
    assert find_generate(model) is None
    webui.shared.args.loader = None
    assert webui.ui_model_menu.load_model("base") == ("their model", "their tokenizer")
    assert webui.shared.args.loader == "Transformers"
    undo_all(patches)
    assert webui.ui_model_menu.load_model(ONE) == ("their model", "their tokenizer")


def test_an_api_that_starts_later_is_patched_by_the_next_load(webui: Any) -> None:
    patches = register()
    webui.shared.generation_lock = object()  # the host is up, so a load that fails is an error
    script = importlib.import_module("modules.api.script")
    theirs = script.HTTPException, script.completions.encode
    patched = set()
    for _ in range(2):
        with pytest.raises(gptq.GPTQLoaderError, match="not-there"):
            webui.models.load_model("not-there", "gptq")
        patched.add((script.HTTPException, script.completions.encode))
    assert len(patched) == 1
    assert not {*patched.pop()} & {*theirs}
    try:
        webui.models.load_model("not-there", "gptq")
    except gptq.GPTQLoaderError:
        assert "hint: " in str(script.HTTPException(detail="Failed to load the model."))
    assert str(script.HTTPException(detail="another")) == "another"
    undo_all(patches)
    assert (script.HTTPException, script.completions.encode) == theirs
