"""The model repository: stock tools load it, its card is true, its files hold no secret."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import ExitCode, InputError, SmolError, UsageError
from smolctl.evaluation.task_record import RecordedTask
from smolctl.generation.load import load_model
from smolctl.model.weights import finite_tensors, load_network
from smolctl.outside import fitting
from smolctl.ownership import RECORD
from smolctl.publish.build import Built, build, open_model, repository_name
from smolctl.publish.card import BEGIN, END, merge_card, require_valid
from smolctl.publish.export import check_with_transformers
from smolctl.publish.push import PushOptions, choose_destination
from smolctl.runs.checkpoint_file import read_checkpoint
from smolctl.runs.folder import RunFolder
from smolctl.sources.arrays import Array
from smolctl.sources.base import TokenizerFiles, Weights
from smolctl.sources.huggingface.card import read_metadata, split_card
from smolctl.sources.huggingface.config import to_huggingface_config
from smolctl.sources.huggingface.write import write_model
from tests.support.kin import CLASSES, KINDS, kin_config, kin_network
from tests.support.processes import Smolctl
from tests.support.publishing import LLAMA, build_folder, make_run
from tests.support.tiny_models import continue_prompt
from tests.support.tokenizer_kinds import llama3, qwen2


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.filterwarnings("error::FutureWarning")  # which is how transformers deprecates
@pytest.mark.parametrize("kind", ["learned", "llama", "scaled", "untied"])
def test_transformers_gives_the_same_logits_and_the_same_text(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kind in ("learned", "llama"):
        built: Built = request.getfixturevalue(kind)
    else:
        odd: dict[str, Any] = {"tie_word_embeddings": False}
        if kind == "scaled":
            odd = {"residual_scale": 0.5}
        built = build_folder(tmp_path, **LLAMA["model"] | odd)
    trust = {"trust_remote_code": kind in ("learned", "scaled")}
    assert built.export.network.config.needs_own_code is trust["trust_remote_code"]
    assert (built.folder / "modeling_smolctl.py").exists() is trust["trust_remote_code"]
    theirs = AutoModelForCausalLM.from_pretrained(built.folder, **trust).eval()
    network = load_network(built.model.source)
    ids = torch.randint(0, 290, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, network(ids), rtol=1e-4, atol=1e-4)
        with_cache, without = (
            theirs.generate(ids, max_new_tokens=20, do_sample=False, use_cache=cached, eos_token_id=None)
            for cached in (True, False)
        )
    assert torch.equal(with_cache, without)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # filled up on the left
    with torch.inference_mode():
        padded = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        alone = theirs.generate(ids[:1, 4:], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(padded[0, 9:], alone[0, 5:])
    tokenizer = AutoTokenizer.from_pretrained(built.folder, **trust)
    assert tokenizer("the cat sat")["input_ids"] == built.export.tokenizer.encode("the cat sat")
    assert theirs.generation_config.eos_token_id == 0


def test_a_position_past_the_context_is_an_error_with_words(learned: Built) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(learned.folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="do not fit the model's context of 32"):
        theirs(torch.zeros((1, 40), dtype=torch.long))


@pytest.mark.parametrize("kind", ["learned", "llama"])
def test_smolctl_reads_what_it_publishes(kind: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(kind)
    one, two = load_model(built.model.source.id), load_model(str(built.folder))
    assert two.engine.config == one.engine.config
    assert two.notes == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("command", ["push --dry-run", "quantize --no-measure --out"])
def test_numbers_that_are_not_finite_are_not_published(
    value: float, command: str, llama: Built, tmp_path: Path, smolctl: Smolctl
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    verb, *options = command.split()
    called = smolctl(verb, folder, *options, *([tmp_path / "out"] if "--out" in options else []))
    assert called.code == ExitCode.BAD_INPUT
    assert f"{folder}: model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in called.err
    assert not (tmp_path / "out").exists()


def test_the_step_of_damaged_weights_is_named(llama: Built) -> None:
    class Damaged(Weights):
        def stored(self) -> Iterator[tuple[str, Array]]:
            yield "model.norm.weight", np.array([1.0, math.nan])

    source = dataclasses.replace(llama.model.source, id="runs/x", step=1500, weights=Damaged())
    with pytest.raises(InputError, match=r"^runs/x at step 1,500: model\.norm\.weight holds NaN"):
        list(finite_tensors(source))


def test_weights_without_the_loss_that_their_run_recorded_are_not_published(
    llama_run: Path, tmp_path: Path, smolctl: Smolctl
) -> None:
    content = read_checkpoint(RunFolder(llama_run).checkpoint_path(15), mmap=False)
    content["state_dict"] = {name: tensor * 1.1 for name, tensor in content["state_dict"].items()}
    torch.save(content, tmp_path / "altered.ckpt")
    called = smolctl("push", tmp_path / "altered.ckpt", "--local-dir", tmp_path / "out")
    assert called.code == ExitCode.BAD_INPUT
    assert "held-out sequences, the run recorded" in called.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_loads_as_another_model_stops_the_push(
    llama_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = to_huggingface_config

    def wrong(config: ModelConfig, dtype: str) -> dict[str, Any]:
        return right(config, dtype) | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}

    monkeypatch.setattr("smolctl.sources.huggingface.write.to_huggingface_config", wrong)
    with pytest.raises(SmolError, match="logits in transformers are off by"):
        build(open_model(str(llama_run)), tmp_path, ())


def test_a_chat_template_goes_along_and_does_the_same(llama: Built, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(llama.folder, first)
    second.mkdir()
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (first / "chat_template.jinja").write_text(template)
    (first / "generation_config.json").write_text(
        '{"eos_token_id": [0, 2], "temperature": 0.4, "do_sample": true}'
    )
    (first / ".env").write_text("X=1")
    built = build(open_model(str(first)), second, ())
    assert (second / "chat_template.jinja").read_text() == template
    assert json.loads((second / "generation_config.json").read_text())["temperature"] == 0.4
    messages = [{"role": "user", "content": "hi"}]
    rendered = AutoTokenizer.from_pretrained(second).apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"
    assert "apply_chat_template" in built.write_card("me/x", None, None)
    assert ".env" in built.left_out
    assert not (second / ".env").exists()


def test_the_card_states_what_the_run_recorded(learned: Built, learned_run: Path) -> None:
    card = learned.write_card("me/tiny", "apache-2.0", None)
    metadata = yaml.safe_load(split_card(card)[0].strip().strip("-"))
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "transformers"
    parameters = sum(parameter.numel() for parameter in learned.export.network.parameters())
    records = [json.loads(line) for line in (learned_run / "metrics.jsonl").read_text().splitlines()]
    checks = [record for record in records if record["event"] == "validation"]
    for fact in (
        f"{parameters:,} parameters",
        "1,920 (15 steps × 4 × 32)",
        f"{checks[-1]['bits_per_byte']:.4f} ± {checks[-1]['standard_error']:.4f}",
        "![Training and held-out loss](loss.png)",
        "`the cat` continues with",
        "at step 15",
        "blob/main/training/report.html",
        'from_pretrained("me/tiny", trust_remote_code=True)',
        "smolctl sample me/tiny",
        "With smolctl, the Python program that wrote this card",
        "- corpus",
        "License: apache-2.0",
    ):
        assert fact in card
    assert "llama.cpp" not in card
    assert (learned.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_names_a_folder_of_this_machine(learned: Built, learned_run: Path) -> None:
    learned.write_card("me/tiny", None, None)
    for path in learned.folder.rglob("*"):
        if path.is_file():
            assert str(learned_run.parent).encode() not in path.read_bytes(), path


def test_an_older_step_is_published_with_its_own_records(learned_run: Path, tmp_path: Path) -> None:
    build(open_model(f"{learned_run}@10"), tmp_path, ())
    for name in ("metrics.jsonl", "predictions.jsonl"):
        lines = (tmp_path / "training" / name).read_text().splitlines()
        assert max(json.loads(line)["step"] for line in lines) == 10


def test_gguf_files_go_along_and_learned_positions_are_refused(
    with_ggufs: Built, learned_run: Path, tmp_path: Path
) -> None:
    card = with_ggufs.write_card("me/tiny", None, None)
    assert "llama-cli -hf me/tiny:Q8_0" in card
    assert (with_ggufs.folder / "llama-q8_0.gguf").exists()
    with pytest.raises(InputError, match="learned positions"):
        build(open_model(str(learned_run)), tmp_path / "none", ("q8_0",))


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_llama_cpp_continues_a_published_gguf_as_we_do(scheme: str, llama_run: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    built = build(open_model(str(llama_run)), tmp_path, (scheme,))
    path = built.export.ggufs[0].path
    ours = load_model(str(path))
    theirs = llama_cpp.Llama(str(path), n_ctx=32, verbose=False)
    ids = theirs.tokenize(b"the cat sat", add_bos=False)
    assert ids == ours.tokenizer.encode("the cat sat")
    (expected,) = continue_prompt(ours.engine, ids, 12)
    assert [token for token, _ in zip(theirs.generate(ids, temp=0.0), expected, strict=False)] == expected
    assert len(expected) == 12


@pytest.mark.slow
def test_what_quantize_has_made_and_measured_goes_along(tmp_path: Path, smolctl: Smolctl) -> None:
    run = make_run(tmp_path, **LLAMA)
    called = smolctl("quantize", run, "--to", "int8", "--windows", "2")
    assert called.code == 0, called.err
    target = tmp_path / "out"
    target.mkdir()
    built = build(open_model(str(run)), target, ())
    card = built.write_card("me/tiny", None, None)
    record = json.loads((run / "quantized" / "verdict.json").read_text())["variants"][0]
    assert f"| int8 | {record['bytes'] / 1e6:,.1f} MB |" in card
    assert f"{record['bits_per_byte']:.4f}" in card
    assert "`quantized/int8/` is for smolctl" in card
    assert load_model(str(target / "quantized" / "int8")).notes == ()
    assert str(tmp_path).encode() not in (target / "quantized" / "int8" / "quantization.json").read_bytes()
    older = build(open_model(f"{run}@10"), tmp_path_of(tmp_path), ())
    assert older.quantized == ()  # they were made of another step
    assert "quantized/" in older.left_out
    assert "quantized/ (not made from this step)" in smolctl("push", f"{run}@10", "--dry-run").out


def tmp_path_of(folder: Path) -> Path:
    (folder / "older").mkdir()
    return folder / "older"


def test_the_card_has_a_row_for_every_figure_of_a_task(llama: Built) -> None:
    figures = [("acc", "none", 0.31, 0.012), ("exact_match", "strict-match", 0.5, None)]
    metrics = [dict(zip(("name", "filter", "value", "standard_error"), one, strict=True)) for one in figures]
    asked = {"shots": 0, "items": 1400, "limit": None, "chat": True, "step": 15, "lm_eval": "0.4.13"}
    task = fitting(RecordedTask, {"task": "quiz", "version": "1.0", **asked, "metrics": metrics})
    assert llama.facts is not None
    assert task is not None
    facts = dataclasses.replace(llama.facts, tasks=(task,))
    card = dataclasses.replace(llama, facts=facts).write_card("me/tiny", None, None)
    row = "| quiz (chat template) | 1.0 | 0 | 1,400 |"
    assert f"{row} acc | 0.3100 ± 0.0120 |" in card
    assert f"{row} exact_match, strict-match | 0.5000 |" in card
    assert "lm-evaluation-harness) 0.4.13 through `smolctl eval`" in card
    assert card.count("## Evaluation") == 1


def test_a_card_keeps_what_people_wrote() -> None:
    first = merge_card({"license": "mit", "tags": ["smolctl"]}, "one", None)
    edited = first.replace("license: mit", "# chosen by me\nlicense: apache-2.0\nlanguage: en")
    edited = edited.replace(BEGIN, f"before\n\n{BEGIN}") + "after \\1\n"
    second = merge_card({"license": "mit", "tags": ["smolctl"]}, r"two \1", edited)
    assert second == edited.replace(f"\n\none\n\n{END}", f"\n\ntwo \\1\n\n{END}")
    third = merge_card({"license": "mit", "tags": ["smolctl", "gguf"]}, "3", second, {"license": "bsd"})
    assert yaml.safe_load(split_card(third)[0].strip().strip("-")) == {
        "license": "bsd",
        "language": "en",
        "tags": ["smolctl", "gguf"],
    }


MARKS = (END, BEGIN, f"{BEGIN}\n{END}", "<!--smolctl: end of it -->", f"{END}{END}")


@pytest.mark.parametrize("prompt", MARKS)
def test_a_prompt_that_spells_our_marks_neither_ends_nor_doubles_the_generated_part(prompt: str) -> None:
    card = merge_card({}, f"one\n\n{prompt}\n\nrest", None)
    for version in ("two", "three"):
        card = merge_card({}, f"{version}\n\n{prompt}\n\nrest", card + "their words\n")
        assert card.count("rest") == 1
        assert card.count(BEGIN) == card.count(END) == 1
    assert card.endswith("their words\ntheir words\n")


def test_links_of_the_card_lead_to_the_branch_that_it_is_pushed_to(learned: Built) -> None:
    for revision, spelled in (("main", "main"), ("step-15", "step-15"), ("a/b", "a%2Fb")):
        text = learned.write_card("me/tiny", None, None, revision)
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "me/tiny" in link]
        assert [link.partition("/me/tiny/")[2] for link in links] == [
            f"tree/{spelled}/training",
            f"blob/{spelled}/training/report.html",
            f"blob/{spelled}/training/predictions.md",
        ]
        assert all((learned.folder / link.partition(f"/{spelled}/")[2]).exists() for link in links)
        assert "](./" not in text


@pytest.mark.parametrize(
    ("license", "near"),
    [("Apache 2.0", "apache-2.0"), ("MIT License", "mit"), ("gpl3", "gpl"), ("none of these", "")],
)
def test_a_license_is_one_that_the_hub_knows(license: str, near: str, llama: Built) -> None:
    with pytest.raises(UsageError, match="the Hub does not know the license") as caught:
        PushOptions(license=license)
    assert f"Did you mean {near}?" in caught.value.hint or not near
    with pytest.raises(InputError, match=r"README\.md: the Hub does not know the license"):
        require_valid({"license": ["mit", license]})
    choose_destination(PushOptions(license="apache-2.0"), llama.model)


def test_a_card_without_our_marks_is_kept_whole() -> None:
    merged = merge_card({"tags": ["smolctl"]}, "ours", "# Their card\n\nwords\n")
    assert merged.endswith(f"{END}\n\n# Their card\n\nwords\n")


@pytest.mark.parametrize("front", ["---\na: [\n---\n", "---\n- a\n---\n"])
def test_damaged_metadata_is_refused_with_the_place(front: str) -> None:
    with pytest.raises(InputError, match=r"README\.md"):
        merge_card({"tags": ["smolctl"]}, "ours", front + "text")


@pytest.mark.parametrize(
    "value",
    ["2024-13-45x", "!!int x", '!!float ""', "!!python/name:os.system", "&a [*a]", "[" * 300, "9" * 5_000],
    ids=lambda value: value[:12],
)
def test_metadata_without_end_or_sense_is_refused_and_the_card_stays(value: str) -> None:
    card = f"---\nlicense: mit\nextra: {value}\n---\ntext"
    if value.startswith("2024"):  # is a text
        assert f"extra: {value}\n" in merge_card({"tags": ["smolctl"]}, "ours", card)
        return
    with pytest.raises(InputError, match=r"README\.md: metadata"):
        merge_card({"tags": ["smolctl"]}, "ours", card)


def test_a_date_in_the_metadata_stays_as_it_was_written() -> None:
    merged = merge_card({"tags": ["smolctl"]}, "ours", "---\ndate: 2024-01-31\ntags: [{a: b}]\n---\ntext")
    assert "date: 2024-01-31\n" in merged
    assert read_metadata(split_card(merged)[0])["tags"] == [{"a": "b"}, "smolctl"]


@pytest.mark.parametrize("metadata", [{"tags": "x", "license": 5}, {"datasets": [1]}, {"license": "other"}])
def test_metadata_that_the_hub_would_refuse_is_refused_here(metadata: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"README\.md"):
        require_valid(metadata)


@pytest.mark.usefixtures("no_network")
def test_a_dry_run_needs_no_network_and_no_token(
    llama_run: Path, smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    called = smolctl("push", llama_run, "--dry-run", "--gguf", "q8_0")
    assert called.code == 0, called.err
    for words in ("you/llama, private", "no token: `hf auth login`", "model.safetensors", "llama-q8_0.gguf"):
        assert words in called.out
    document = smolctl("push", llama_run, "--dry-run", "--json").json
    assert document["repo"]["verified"] is False
    assert {"path", "bytes", "sha256"} == set(document["repo"]["files"][0])


@pytest.mark.usefixtures("no_network")
def test_a_local_dir_holds_exactly_what_the_plan_names(
    llama_run: Path, smolctl: Smolctl, tmp_path: Path
) -> None:
    import hashlib

    out = tmp_path / "deep" / "out"
    document = smolctl("push", llama_run, "--local-dir", out, "--json").json
    planned = {file["path"]: file["sha256"] for file in document["repo"]["files"]}
    there = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    recorded = json.loads(there[RECORD].read_text())["files"]  # it says what may be replaced
    assert recorded | {RECORD: planned[RECORD]} == planned
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()} == planned
    assert len({path.stat().st_mode for path in there.values()}) == 1  # whoever may read one may read all
    assert smolctl("push", llama_run, "--local-dir", out).code == 0
    (out / "diary.txt").write_text("mine")
    called = smolctl("push", llama_run, "--local-dir", out)
    assert called.code == 3
    assert "diary.txt, which is not part of this" in called.err
    assert (out / "diary.txt").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--repo", "no-slash"), 2),
        (("--gguf", "q4_k_m"), 2),
        (("--space-sdk", "docker"), 2),
        (("--dry-run", "--preview"), 2),
        (("--create-pr", "--revision", "x"), 2),
    ],
)
def test_what_cannot_be_meant_is_refused(
    options: tuple[str, ...], code: int, llama_run: Path, smolctl: Smolctl
) -> None:
    assert smolctl("push", llama_run, "--dry-run", *options).code == code


def test_names_become_what_the_hub_takes() -> None:
    assert repository_name("nano run (2)") == "nano-run-2"
    assert repository_name("...") == "model"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_near_kin_go_out_as_transformers_own_classes(kind: str, tmp_path: Path) -> None:
    network = kin_network(kin_config(kind, vocab_size=512))
    backend = (qwen2 if kind.startswith("qwen") else llama3)()
    files = TokenizerFiles(backend.to_str(), None, 0, 2, None)
    write_model(tmp_path, network.config, dict(network.state_dict()), "float32", files)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [CLASSES[kind]]
    assert not list(tmp_path.glob("*.py"))
    assert check_with_transformers(tmp_path, network, Tokenizer.from_files(files, "tiny")) < 1e-4


@pytest.mark.slow
def test_a_qwen2_with_another_tokenizer_is_refused_with_the_reason(tmp_path: Path) -> None:
    network = kin_network(kin_config("qwen2", vocab_size=512))
    files = TokenizerFiles(llama3().to_str(), None, 0, 2, None)
    write_model(tmp_path, network.config, dict(network.state_dict()), "float32", files)
    with pytest.raises(SmolError, match="another tokenizer"):
        check_with_transformers(tmp_path, network, Tokenizer.from_files(files, "tiny"))
