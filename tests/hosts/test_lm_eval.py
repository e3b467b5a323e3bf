"""EleutherAI's harness itself, on tasks made here: the same numbers as for plain weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import needs_python_of, python_of
from processes import run_process
from server_process import serving

if TYPE_CHECKING:
    import subprocess

pytestmark = [
    needs_python_of("lm-eval"),
    pytest.mark.host("lm-eval"),
    pytest.mark.timeout(1200),  # seconds: the harness is started twice
]

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = "gptq-3bit-32g-noact-asym"
OURS = ("-m", "gptq_loader_extensions.lm_eval")
THEIRS = ("-m", "lm_eval")
# The checkpoint as a plain model: its weights dequantised, in transformers' own format.
WRITE_DENSE = """
import shutil, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from gptq_loader_plugin.checkpoint.reader import GPTQReader

source, target = map(Path, sys.argv[1:])
checkpoint = GPTQReader().open(source)
weights = {
    name: checkpoint.tensor(name).float()
    for name in checkpoint.headers
    if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
}
weights |= {f"{it}.weight": checkpoint.packed(it).dequantize() for it in checkpoint.layers}
config = AutoConfig.from_pretrained(source)
del config.quantization_config
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
missing = model.load_state_dict(weights, strict=False).missing_keys
assert set(missing) <= {"lm_head.weight"}, missing
model.tie_weights()
model.save_pretrained(target)
for file in [*source.glob("tokenizer*"), *source.glob("*.jinja")]:
    shutil.copy(file, target)
"""
CHOICE = {
    "task": "made_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
}
ROLLING = {
    "task": "made_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "question",
}
GENERATE = {
    "task": "made_generate",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over forty questions, and the checkpoint's dequantised weights."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {
            "question": f"Some count by {step}: {', '.join(str(n * step) for n in range(1, 5))},",
            "choices": [f" {5 * step}", f" {5 * step + 1}", f" {4 * step}, of course"],
            "answer": 0,
        }
        for step in range(1, 41)
    ]
    data = folder / "made.json"
    data.write_text("\n".join(json.dumps(it) for it in rows))
    (folder / "tasks").mkdir()
    for task in (CHOICE, ROLLING, GENERATE):
        whole = {
            **task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        # JSON is YAML
        (folder / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(whole))
    completed = run(folder, "-c", WRITE_DENSE, str(DATA / ONE), str(folder / "dense"))
    assert completed.returncode == 0, completed.stderr
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [str(python_of("lm-eval")), *arguments]
    return run_process(command, cwd=folder, env=environ, seconds=500)


def evaluate(
    folder: Path,
    program: tuple[str, ...],
    model: str,
    arguments: str,
    *more: str,
    tasks: str = "made_choice,made_rolling,made_generate",
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run tasks: what the harness reports, and each sample's answers, by task."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = (*program, "--model", model, "--model_args", arguments, "--tasks", tasks)
    options = ("--include_path", "tasks", "--output_path", "out", "--log_samples", "--limit", "40")
    completed = run(folder, *command, *options, *more)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    samples = {}
    for file in out.rglob("samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = [it["resps"] for it in sorted(lines, key=lambda it: it["doc_id"])]
    return results, samples


def plain(samples: list[Any]) -> list[str]:
    """Leave out what stands for half a letter: the server sends none, transformers its marks."""
    return [text.rstrip("\ufffd") for [[text]] in samples]


def test_the_server_answers_as_transformers(folder: Path) -> None:
    with serving("--backend", "reference", "--dtype", "float32") as server:
        arguments = (
            f"model={ONE},base_url={server.url}/v1/completions,num_concurrent=8,"
            "tokenizer=dense,tokenized_requests=False"
        )
        found, ours = evaluate(
            folder, THEIRS, "local-completions", arguments, tasks="made_generate"
        )
    right, theirs = evaluate(
        folder, THEIRS, "hf", "pretrained=dense,dtype=float32", "--device", "cpu",
        tasks="made_generate",
    )  # fmt: skip
    texts = plain(ours["made_generate"])
    assert texts == plain(theirs["made_generate"])
    assert len({*texts}) > 5, "they differ by prompt"
    scores = [it["results"]["made_generate"]["exact_match,none"] for it in (found, right)]
    assert scores[0] == scores[1]


def numbers(value: Any) -> list[float]:
    """Collect the log-likelihoods in what the harness writes of a sample's answers."""
    if isinstance(value, list):
        return [number for it in value for number in numbers(it)]
    try:
        return [float(value)]
    except ValueError:
        return []


def test_it_agrees_with_transformers_on_the_dequantised_weights(folder: Path) -> None:
    name = DATA / ONE
    found, mine = evaluate(
        folder, OURS, "gptq-loader", f"pretrained={name},backend=reference,dtype=float32"
    )
    _, right = evaluate(folder, THEIRS, "hf", "pretrained=dense,dtype=float32", "--device", "cpu")
    for task, count in (("made_choice", 120), ("made_rolling", 40)):
        assert len(numbers(mine[task])) >= count
        assert numbers(mine[task]) == pytest.approx(numbers(right[task]), rel=1e-5, abs=1e-5)
    assert len({str(it) for it in mine["made_choice"]}) > 30, "the samples differ"
    assert mine["made_generate"] == right["made_generate"]
    assert found["config"]["gptq_kernels"] == {"reference": 14}
    assert found["config"]["gptq_bits"] == 3


def test_the_chosen_kernels_are_near_in_batches_too(folder: Path) -> None:
    _, mine = evaluate(folder, OURS, "gptq-loader", f"pretrained={DATA / ONE}", "--batch_size", "4")
    _, right = evaluate(
        folder, OURS, "gptq-loader", f"pretrained={DATA / ONE},backend=reference,dtype=float32"
    )
    # bfloat16 keeps 8 bits: a logit of about 10 is off by 0.03, and a choice has some ten of them
    assert numbers(mine["made_choice"]) == pytest.approx(numbers(right["made_choice"]), abs=0.3)
    assert any(it % 0.125 for it in numbers(mine["made_choice"])), (
        "sums are not rounded to bfloat16"
    )


def test_errors_are_said_in_two_lines(folder: Path) -> None:
    tasks = ("--tasks", "made_choice", "--include_path", "tasks")
    for arguments, words in (
        (f"pretrained={DATA / ONE},backend=nope", "nope"),
        (f"pretrained={DATA / ONE},bakend=cpu", "no option bakend"),
        ("pretrained=nowhere", "names no checkpoint"),
    ):
        completed = run(folder, *OURS, "--model", "gptq-loader", "--model_args", arguments, *tasks)
        assert completed.returncode == 1
        assert "error: " in completed.stderr
        assert words in completed.stderr
        assert "\nhint: " in completed.stderr
        assert "Traceback" not in completed.stderr


def test_a_script_registers_it_beside_the_harness_own(folder: Path) -> None:
    code = f"""
from gptq_loader_plugin import Plugins
Plugins(installed=True).host("lm-eval").install()
Plugins(installed=True).host("lm-eval").install()
from lm_eval.api.registry import get_model
assert get_model("hf").__name__ == "HFLM"
model = get_model("gptq-loader").create_from_arg_string("pretrained={DATA / ONE}")
turns = [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "The answer is"}}]
print([model.apply_chat_template(turns[:1]), model.apply_chat_template(turns, False)])
print(model.chat_template(True)[:2])
"""
    completed = run(folder, "-c", code)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-2:] == [
        str(
            [
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe answer is",
            ]
        ),
        "{%",
    ]
