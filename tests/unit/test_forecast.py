"""What a checkpoint will take, and how fast it will be, by its headers or its config alone."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from altered import ALL, DATA, ONE, edit_json
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.catalog.forecast import BANDWIDTHS, HIGHEST, LOWEST, SHARE, forecast
from gptq_loader_plugin.catalog.headers_alone import with_headers
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.quantize.sizes import forecast_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from hub_server import HubServer

sys.path.insert(0, str(DATA.parents[2] / "bench"))
from forecast import errors, forecast_of, held_parts

# Llama-2-70B's shapes, and the six sizes that its repository's card of 2023 names, in GB.
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
CARD = {
    (4, -1): 35.33, (4, 32): 40.66, (4, 64): 37.99, (4, 128): 36.65, (3, -1): 26.78,
    (3, 128): 28.03,
}  # fmt: skip


def test_the_sizes_of_a_card_come_from_config_json_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    sizes = forecast_sizes(tmp_path, tuple(CARD))
    assert {(it.bits, it.group_size): it.size_bytes / 1e9 for it in sizes} == pytest.approx(
        CARD, abs=0.02
    )


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [("gptq-4bit-32g-act-sym", 4, 32), ("gptq-3bit-128g-act-sym", 3, 128)],
)
def test_a_size_is_that_of_the_file_without_its_header(
    name: str, bits: int, group_size: int
) -> None:
    file = DATA / name / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    (size,) = forecast_sizes(DATA / name, [(bits, group_size)])
    assert size.size_bytes == file.stat().st_size - header


def test_a_config_that_is_no_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(QuantizeError, match="no model can be made"):
        forecast_sizes(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda:sm86"])
def test_the_parts_are_what_the_plan_takes(device: str) -> None:
    plugins = gptq.Plugins(installed=True, environ=ALL)
    plan = gptq.explain(DATA / ONE, device=device, plugins=plugins)
    made = forecast(
        open_checkpoint(DATA / ONE), find_device(device), plugins.kernels(), context=256,
        bandwidth=1e9,
    )  # fmt: skip
    kv_bytes = made.parts.pop("keys and values")
    assert kv_bytes == 256 * (plan.kv_bytes_per_token or 0)
    assert sum(made.parts.values()) == plan.memory_bytes
    assert made.memory_bytes == plan.memory_bytes + kv_bytes


@pytest.mark.parametrize("name", ["gptq-4bit-32g-act-sym", "gptq-3bit-noneg-act-sym"])
def test_each_part_is_what_a_loaded_model_holds(name: str) -> None:
    made = forecast_of(str(DATA / name), "cpu")
    with gptq.load(DATA / name, device="cpu") as model:
        off = errors(made, held_parts(model))
    assert {"quantised layers", "embedding", "keys and values", "together"} <= off.keys()
    assert off == pytest.approx(dict.fromkeys(off, 0), abs=0.03)


def test_a_reply_is_as_fast_as_memory_is_read() -> None:
    plugins = gptq.Plugins(installed=True, environ=ALL)
    checkpoint = open_checkpoint(DATA / ONE)
    kernels = plugins.kernels()
    made = forecast(checkpoint, find_device("cpu"), kernels, context=256, bandwidth=2e9)
    exact = 2e9 / made.token_bytes
    assert made.tokens_per_second == pytest.approx(exact * SHARE)
    assert (made.slowest, made.fastest) == pytest.approx((exact * LOWEST, exact * HIGHEST))
    assert made.at_full_context is not None
    assert made.at_full_context < made.tokens_per_second
    assert made.token_bytes < made.memory_bytes - made.parts["keys and values"]
    gpu = forecast(checkpoint, find_device("cuda:sm86"), kernels, context=256, gpu="RTX 3090")
    assert gpu.bandwidth == BANDWIDTHS["RTX 3090"]
    assert gpu.slowest is None, "a bound has no lower end"
    unknown = forecast(checkpoint, find_device("cuda:sm86"), kernels, context=256)
    assert unknown.tokens_per_second is None


def test_on_a_cpu_the_bandwidth_is_measured() -> None:
    plugins = gptq.Plugins(installed=True)
    made = forecast(open_checkpoint(DATA / ONE), find_device("cpu"), plugins.kernels(), context=8)
    if made.bandwidth is None:
        pytest.skip(f"bandwidth is {made.bandwidth_source}")
    assert made.bandwidth_source == "measured here"
    assert made.bandwidth > 1e8


def test_on_the_hub_the_headers_are_enough(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/tiny-GPTQ", DATA / ONE)
    plugins = gptq.Plugins(installed=True, environ=ALL)
    cpu = find_device("cpu")

    def made(reference: str) -> dict[str, int]:
        return with_headers(
            reference,
            lambda it: forecast(it, cpu, plugins.kernels(), context=9, bandwidth=1e9).parts,
            plugins=plugins,
        )

    assert made("owner/tiny-GPTQ") == made(str(DATA / ONE))
    hub.add("owner/dense", DATA / "base")
    output = CliRunner().invoke(app, ["forecast", "owner/dense", "--json"]).stdout
    assert [it["bits"] for it in json.loads(output)] == [4, 4, 4, 4, 3, 3, 8, 8]
    assert not [it for it in hub.bodies("model.safetensors") if not it.range]


def test_the_command_shows_parts_and_a_speed(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["forecast", str(DATA / ONE), "--bandwidth", "20", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "quantised layers" in shown.stdout
    assert "tokens a second (" in shown.stdout
    shown = run(app, ["forecast", str(DATA / ONE), "--gpu", "4090"])
    assert "at most" in shown.stdout
    assert "its maker's figure for RTX 4090" in shown.stdout
    for name, words in (("Voodoo 2", "is none of the GPUs"), ("A100", "is several of the GPUs")):
        refused = run(app, ["forecast", str(DATA / ONE), "--gpu", name])
        assert refused.exit_code == 1
        assert words in refused.stderr
    folder = tmp_path / "dense"
    folder.mkdir()
    for file in (DATA / "base").iterdir():
        (folder / file.name).symlink_to(file)
    assert "would take" in run(app, ["forecast", str(folder)]).stdout


def test_of_a_mixture_the_experts_in_use_are_read(tmp_path: Path) -> None:
    from altered import copy, edit_tensors

    folder = copy(ONE, tmp_path / "mixture")
    edit_tensors(
        folder, lambda it: {k.replace(".mlp.", ".mlp.experts.0."): v for k, v in it.items()}
    )
    plugins = gptq.Plugins(installed=True, environ=ALL)
    sizes = []
    for used in (1, 4):
        edit_json(
            folder / "config.json",
            lambda it, used=used: it.update(num_experts=4, num_experts_per_tok=used),
        )
        made = forecast(
            open_checkpoint(folder), find_device("cpu"), plugins.kernels(), context=9,
            bandwidth=1e9,
        )  # fmt: skip
        sizes.append(made.token_bytes)
    assert sizes[0] < sizes[1]
