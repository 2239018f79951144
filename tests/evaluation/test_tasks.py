"""`smolctl eval`: the real lm-eval on tasks from local files."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, processors

from tests.support.processes import Smolctl
from tests.support.tiny_models import tiny_tokenizer, write_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is missing: pip install 'smolctl[eval]'"),
    pytest.mark.xdist_group("lm-eval"),  # whose imports take seconds
]

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "birds", "in", "grass"]
CONTEXT = 160  # which some items do not fit
KINDS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}} ",  # a space at the end belongs to the answer
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "bare": {  # answers without a context
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [" on", "\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """A task of every kind of request, as YAML files in one folder with their items."""
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(count))

    folder.mkdir()
    items = [
        {"context": words(8 + 10 * number), "choices": [words(1 + n) for n in range(4)], "answer": number % 4}
        for number in range(6)
    ]
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
    for name, kind in KINDS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        }
        common = {"task": name, **data, "test_split": "test", "metadata": {"version": 1.5}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | kind))
    return folder


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in results.items() if not isinstance(value, str)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["plain", "chat", "bos"])
def test_items_and_answers_are_those_of_transformers(tmp_path: Path, smolctl: Smolctl, kind: str) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = write_folder(tmp_path / "model", context=CONTEXT)
    tiny_tokenizer().save(model)
    if kind == "bos":  # which the tokenizer puts in front of every text
        backend = Tokenizer.from_file(str(model / "tokenizer.json"))
        begin = backend.id_to_token(0)
        backend.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, 0)])
        backend.save(str(model / "tokenizer.json"))
    tasks = write_tasks(tmp_path / "tasks")
    file = tmp_path / "samples.jsonl"
    chat = ["--apply-chat-template", "--system-instruction", "sat"] if kind == "chat" else []
    ours = smolctl("eval", model, "--tasks", tasks, "--num-fewshot", 1, *chat, "--samples", file, "--json")
    assert ours.code == 0, ours.err
    assert "cut at the beginning" in ours.err
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(model), device="cpu", dtype="float32"),
        tasks=list(KINDS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=1,
        apply_chat_template=bool(chat),
        system_instruction="sat" if chat else None,
    )
    assert theirs is not None
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for task in KINDS:
        results, expected_results = (numbers(one["results"][task]) for one in (ours.json, theirs))
        assert results == pytest.approx(expected_results, rel=1e-4)
        samples = [one for one in found if one["task"] == task]
        for one, other in zip(samples, theirs["samples"][task], strict=True):
            assert one["arguments"] == json.loads(json.dumps(other["arguments"]))
            for answer, expected in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(expected, tuple | list):
                    assert answer == [pytest.approx(expected[0], rel=1e-4), expected[1]]
                else:
                    assert answer == (
                        expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-4)
                    )
    assert ours.json["versions"] == dict.fromkeys(KINDS, 1.5)


def test_results_of_a_run_go_into_its_record_and_faults_have_a_remedy(
    here: Path, tmp_path: Path, smolctl: Smolctl
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (here / "runs/llama/tasks.json").mkdir()
    lost = smolctl("eval", "runs/llama@10", "--tasks", tasks / "bare.yaml", "--json")
    assert lost.code == 1
    assert lost.json["results"]["bare"]  # before what cannot be written
    assert "tasks.json: cannot be written" in lost.err
    (here / "runs/llama/tasks.json").rmdir()
    called = smolctl("eval", "runs/llama@10", "--tasks", tasks / "bare.yaml", "--limit", 5)
    assert called.code == 0, called.err
    (line,) = (line for line in called.out.splitlines() if line.startswith("bare"))
    assert line.split()[:5] == ["bare", "1.5", "0", "5", "acc"]
    (kept,) = json.loads((here / "runs/llama/tasks.json").read_text())["tasks"]
    assert {key: kept[key] for key in ("task", "step", "limit", "items")} == {
        "task": "bare", "step": 10, "limit": 5, "items": 5,
    }  # fmt: skip
    bare = yaml.safe_load((tasks / "bare.yaml").read_text())
    for name, change in {
        "bad": {"doc_to_choice": "chances"},
        "loops": {"doc_to_text": "{% for n in range(10**9) %}{% endfor %}"},
        "huge": {"doc_to_text": "{{ 'x' * 10**9 }}"},
        "long": {"doc_to_text": "{{ 'x' * (10**6 + 1) }}"},
        "itemless": {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "empty.jsonl")}}},
        "unspoken": {"output_type": None},
        "nothing": {"metric_list": []},
        "minus": {"num_fewshot": -1},
        "many": {"num_fewshot": 10**9},
        "silent": {**KINDS["words"], "generation_kwargs": {"until": [], "max_gen_toks": 0}},
        "odd": {
            **KINDS["words"],
            "generation_kwargs": {"max_gen_toks": 4, "do_sample": True, "temperature": -1},
        },
    }.items():
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(bare | {"task": name} | change))
    (tmp_path / "empty.jsonl").touch()
    faults = {
        ("--tasks", tasks / "bad.yaml"): (3, "bad.yaml: lm-eval failed with"),
        ("--tasks", tasks / "loops.yaml"): (3, "takes more than 2 s"),
        ("--tasks", tasks / "huge.yaml"): (3, "needs more than 512 MB of memory"),
        ("--tasks", tasks / "long.yaml"): (3, "writes more than 1,000,000 characters"),
        ("--tasks", tasks / "itemless.yaml"): (3, "the task has no items"),
        ("--tasks", tasks / "unspoken.yaml"): (3, "unspoken: the task has no output_type"),
        ("--tasks", tasks / "nothing.yaml"): (3, "the task has no metric to show"),
        ("--tasks", tasks / "minus.yaml"): (3, "minus: num_fewshot is -1"),
        ("--tasks", tasks / "many.yaml"): (3, "1,000,000,000 examples are asked for, and the task has 6"),
        ("--tasks", tasks / "silent.yaml"): (3, "asks for 0 new tokens"),
        ("--tasks", tasks / "odd.yaml"): (3, "generation_kwargs: temperature -1"),
        ("--tasks", tasks / "none.yaml"): (3, "none.yaml: no such file"),
        ("--tasks", tasks / "none"): (3, "none: no such file"),
        ("--tasks", tasks / "bare.yaml", "--apply-chat-template"): (3, "no chat template"),
        ("--tasks", tasks / "words.yaml", "--gen-kwargs", "num_beams=4"): (3, "num_beams=4"),
        ("--tasks", tasks / "words.yaml", "--gen-kwargs", "max_gen_toks=999"): (3, "999 new tokens"),
        ("--tasks", tasks / "bare.yaml", "--limit", "1.5"): (2, "--limit 1.5"),
        ("--tasks", tasks / "bare.yaml", "--samples", tasks / "bare.yaml"): (2, "smolctl did not write it"),
        (): (2, "--tasks is missing"),
        ("--tasks", ","): (2, "no task is named"),
    }
    for options, (code, message) in faults.items():
        called = smolctl("eval", "runs/llama", *options)
        assert (called.code, called.out) == (code, ""), options
        assert message in called.err


def test_a_chat_template_that_writes_too_much_is_refused(tmp_path: Path, smolctl: Smolctl) -> None:
    model = write_folder(tmp_path / "model", context=CONTEXT)
    tiny_tokenizer().save(model)
    (model / "chat_template.jinja").write_text("{{ 'x' * (10**6 + 1) }}")
    tasks = write_tasks(tmp_path / "tasks")
    called = smolctl("eval", model, "--tasks", tasks / "bare.yaml", "--apply-chat-template", "--quiet")
    assert (called.code, called.out) == (3, "")
    assert "more than 1,000,000 characters" in called.err
