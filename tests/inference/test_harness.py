"""lm-eval on a run directory, and on its export by transformers: the same numbers, with no network.

Skipped where lm-eval is not installed; `make test-transformers` has it.
"""

import json
import os
import subprocess
import sys

import pytest
from hugging_face_kit import make_run, model

from gqa_scaling import cli
from gqa_scaling.inference.hugging_face_export import export

CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{t}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: tiny_writing
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{t}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
WORDS = [
    "The",
    "cache",
    "of",
    "every",
    "query",
    "head",
    "keeps",
    "what",
    "a",
    "token",
    "has",
    "read",
    "before",
    "it",
]


def write_tasks(folder):
    """Three tasks over six documents, some longer than the context of the model."""
    folder.mkdir()
    documents = [
        {
            "q": " ".join(WORDS[i : i + 5]),
            "c": [f" {WORDS[i]}", f" {WORDS[-i]} twice", " é"],
            "a": i % 3,
            "t": " ".join(WORDS[i:] * 9),
        }
        for i in range(6)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    for text in (CHOICE, ROLLING, WRITING):
        name = text.split()[1]
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{text}{source}test_split: test\n")
    return "tiny_choice,tiny_rolling,tiny_writing"


def evaluated(words, out):
    """The results and the samples of lm-eval in a process of its own, with no network."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    env |= {"HF_HOME": str(out.parent / "home"), "HF_DATASETS_CACHE": str(out.parent / "cache")}
    command = [sys.executable, "-c", *words, "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            key = path.name.split("_2")[0], sample["doc_id"]
            samples.setdefault(key, []).append(sample["resps"])
    return json.loads(results.read_text())["results"], samples


OURS = "import sys\nfrom gqa_scaling.cli import main\nsys.exit(main())"
THEIRS = "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()"


def numbers(value):
    """The numbers and texts of nested lists, in order."""
    if isinstance(value, list | tuple):
        return [each for part in value for each in numbers(part)]
    return [value]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs lm-eval: make test-transformers has it")
    folder = tmp_path_factory.mktemp("harness")
    trained = make_run(folder, model(), context_length=64, batch_tokens=64)
    tasks = write_tasks(folder / "tasks")
    words = ["--tasks", tasks, "--include_path", str(folder / "tasks")]
    run = ["harness", str(trained.directory.path), *words]
    return folder, trained, words, evaluated([OURS, *run], folder / "ours")


def test_a_run_directory_is_evaluated(ours):
    *_, (results, samples) = ours
    assert results["tiny_rolling"]["bits_per_byte,none"] > 5  # random parameters
    assert 0 <= results["tiny_choice"]["acc,none"] <= 1
    assert len(samples) == 18
    texts = [
        text for (task, _), each in samples.items() if "writing" in task for text in numbers(each)
    ]
    assert len(texts) == 6
    assert all("e" not in text for text in texts)
    assert any(texts)


def test_an_export_says_the_same_as_hf(ours):
    pytest.importorskip("torch", reason="needs PyTorch: make test-transformers has it")
    folder, trained, words, (results, samples) = ours
    export(trained, folder / "export")
    args = f"pretrained={folder / 'export'},dtype=float32"
    theirs = evaluated(
        [THEIRS, "--model", "hf", "--model_args", args, "--device", "cpu", *words],
        folder / "theirs",
    )
    assert theirs[1].keys() == samples.keys()
    for key, expected in theirs[1].items():
        for mine, other in zip(numbers(samples[key]), numbers(expected), strict=True):
            try:
                assert float(mine) == pytest.approx(float(other), abs=1e-3)
            except ValueError:
                assert mine == other
    for task, values in theirs[0].items():
        for name, value in values.items():
            if isinstance(value, float):
                assert results[task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_without_lm_eval_the_verb_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trained = make_run(tmp_path, model(n_layers=1))
    assert cli.main(["harness", str(trained.directory.path), "--tasks", "x"]) == 2
    assert "pip install 'gqa-scaling[harness]'" in capsys.readouterr().err
