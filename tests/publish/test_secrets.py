"""Secrets are found whatever they are, wherever they stand; what is none of them stops nobody."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import smolctl
from smolctl.errors import ExitCode, SmolError
from smolctl.ownership import RECORD
from smolctl.publish.build import Built
from smolctl.publish.secret_rules import CONTEXTS, TOKENS
from smolctl.publish.secrets import Finding, scan
from tests.support.processes import Smolctl
from tests.support.publishing import publish
from tests.support.push_hub import TOKEN, PushHub

CHANCE = random.Random(1)
HEX, UPPER = "0123456789abcdef", string.ascii_uppercase + "234567"


def made(length: int, of: str = string.ascii_letters + string.digits) -> str:
    return "".join(CHANCE.choice(of) for _ in range(length))


UUID = "-".join(made(length, HEX) for length in (8, 4, 4, 4, 12))
# Shapes as their issuers document them; nobody's.
SHAPES = {
    "Hugging Face": "hf_" + made(34, string.ascii_letters),
    "Hugging Face organization": "api_org_" + made(34, string.ascii_letters),
    "OpenAI": f"sk-{made(20)}T3BlbkFJ{made(20)}",
    "OpenAI project": f"sk-proj-{made(74)}T3BlbkFJ{made(74)}",
    "Anthropic": f"sk-ant-api03-{made(93)}AA",
    "OpenRouter": "sk-or-v1-" + made(64, HEX),
    "Groq": "gsk_" + made(52),
    "Replicate": "r8_" + made(37),
    "Perplexity": "pplx-" + made(48),
    "Cohere": "COHERE_API_KEY=" + made(40),
    "Weights & Biases": "wandb login " + made(40, HEX),
    "Kaggle": json.dumps({"username": "me", "key": made(32, HEX)}),
    "GitHub": "ghp_" + made(36),
    "GitHub, fine-grained": f"github_pat_{made(22)}_{made(59)}",
    "GitLab": "glpat-" + made(20),
    "Atlassian": "ATATT3xFfGF0" + made(180),
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + made(70),
    "npm": "npm_" + made(36),
    ".npmrc": f"//registry.npmjs.org/:_authToken={UUID}",
    "RubyGems": "rubygems_" + made(48, HEX),
    "Docker": "dckr_pat_" + made(27),
    "Docker login": json.dumps({"auth": base64.b64encode(b"me:hunter22xx").decode()}),
    "AWS": "AKIA" + made(16, UPPER),
    "AWS secret": "aws_secret_access_key = " + made(40, string.ascii_letters + string.digits + "+"),
    "Google": "AIza" + made(35),
    "Google client": "GOCSPX-" + made(28),
    "Azure storage": f"AccountName=x;AccountKey={made(86)}==;",
    "Azure client": f"abc8Q~{made(34)}",
    "DigitalOcean": "dop_v1_" + made(64, HEX),
    "Databricks": "dapi" + made(32, HEX),
    "Heroku": f"HEROKU_API_KEY={UUID}",
    "Supabase": "sbp_" + made(40, HEX),
    "Vault": "hvs." + made(95),
    "Terraform": f"{made(14)}.atlasv1.{made(67)}",
    "age": "AGE-SECRET-KEY-1" + made(58, UPPER),
    "Slack": f"xoxb-{made(12, string.digits)}-{made(12, string.digits)}-{made(24)}",
    "Slack webhook": f"https://hooks.slack.com/services/T{made(8, UPPER)}/B{made(8, UPPER)}/{made(24)}",
    "Discord": f"M{made(22)}5.{made(6)}.{made(27)}",
    "Telegram": f"{made(10, '123456789')}:AA{made(33)}",
    "Twilio": "SK" + made(32, HEX),
    "SendGrid": f"SG.{made(22)}.{made(43)}",
    "Mailgun": "key-" + made(32, HEX),
    "Mailchimp": made(32, HEX) + "-us12",
    "Stripe": "sk_live_" + made(24),
    "Square": "sq0atp-" + made(22),
    "Shopify": "shpat_" + made(32, HEX),
    "Notion": "ntn_" + made(46),
    "Linear": "lin_api_" + made(40),
    "Airtable": f"pat{made(14)}.{made(64, HEX)}",
    "Grafana": f"glsa_{made(32)}_{made(8, HEX)}",
    "New Relic": "NRAK-" + made(27, UPPER),
    "Datadog": "datadog_api_key: " + made(32, HEX),
    "JSON web token": f"eyJhbGciOiJIUzI1NiJ9.eyJ{made(40)}.{made(43)}",
    "RSA": "-----BEGIN RSA PRIVATE KEY-----",
    "OpenSSH": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "address": "postgres://me:hunter22@db/x",
    "address without a user": "redis://:p4ssw0rd@cache:6379",
    "header": "Authorization: Bearer " + made(40),
    "curl": "curl -u admin:hunter22 https://example.org",
    "netrc": "machine example.org login me password hunter22",
    "password": 'password = "hunter2hunter2"',
    "variable": "DB_PASSWORD=correct9horse",
    "client secret": json.dumps({"client_secret": made(24)}),
    "connection": "Server=db;User Id=sa;Password=Str0ngPw!;",
    "hash": f"me:$apr1$ab12cd34${made(22)}",
    "repeated": "MY_API_KEY=" + "abcd1234" * 4,
    "Kubernetes": f"kind: Secret\nmetadata:\n  name: x\ndata:\n  pw: {made(16)}",
}
# Those that have a mark of their own, and need no word before them.
ALONE = [kind for kind, text in SHAPES.items() if " " not in text and "=" not in text and "://" not in text]


def findings(folder: Path, content: bytes, name: str = "notes") -> tuple[Finding, ...]:
    (folder / name).write_bytes(content)
    return scan(folder, [name])


def test_a_secret_is_found_by_file_and_line_and_not_repeated(tmp_path: Path) -> None:
    found = {kind: findings(tmp_path, f"one\ntwo\n{text}\n".encode()) for kind, text in SHAPES.items()}
    assert [kind for kind, there in found.items() if not there] == []
    for kind, (first, *_) in found.items():
        assert (first.path, first.line >= 3) == ("notes", True), kind
        longest = max(SHAPES[kind].split(), key=len)
        assert longest not in str(first), kind


ENCODED: dict[str, Callable[[str], bytes]] = {
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-32, big end first": lambda text: text.encode("utf-32-be"),
    "a program": lambda text: b"\x7fELF\0\1\2\0" + text.encode() + b"\0more\0",
    "a line of JSON": lambda text: json.dumps({"text": f"a\n{text}\n"}).encode(),
    "Latin-1": lambda text: f"é {text} ü".encode("latin-1"),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_secret_is_found_in_every_encoding_and_in_files_with_nul(encoding: str, tmp_path: Path) -> None:
    missed = [kind for kind, text in SHAPES.items() if not findings(tmp_path, ENCODED[encoding](text + "\n"))]
    assert missed == []


@pytest.mark.parametrize("glued", ["x{}x", "({})", '"{}"', "{};", "token{}_"])
def test_a_secret_is_found_that_is_glued_to_other_characters(glued: str, tmp_path: Path) -> None:
    missed = [kind for kind in ALONE if not findings(tmp_path, glued.format(SHAPES[kind]).encode())]
    assert missed == []


def test_a_secret_is_found_where_two_pieces_of_a_large_file_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.publish.secrets.PIECE", 1_000)
    monkeypatch.setattr("smolctl.publish.secrets.OVERLAP", 200)
    for before in range(900, 1_010, 5):
        text = (
            f"{'.' * 70}\n" * (before // 71) + "." * (before % 71) + " " + SHAPES["GitHub"] + "\nmore\n" * 300
        )
        (finding,) = findings(tmp_path, text.encode())
        assert finding.line == before // 71 + 1


NAMES = """.env .env.local prod.env .netrc _netrc .npmrc .pypirc .git-credentials .pgpass id_rsa ID_RSA
id_ed25519 key.pem server.key a.p12 a.pfx a.kdbx a.jks LICENSE.key kubeconfig prod.kubeconfig .htpasswd
.dockercfg credentials.json kaggle.json secrets.yaml terraform.tfstate service-account-x.json .bash_history"""


def test_a_file_of_secrets_is_found_by_its_name(tmp_path: Path) -> None:
    assert [name for name in NAMES.split() if not findings(tmp_path, b"x", name)] == []
    ordinary = "LICENSE README.md config.json tokenizer.json keys.md environment.json model.safetensors"
    assert [name for name in ordinary.split() if findings(tmp_path, b"x", name)] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMPANY_TOKEN", "correct-horse-battery"),
        ("X", "9f86d081884c7d65"),
        ("PLACE", "dGhpcyBpcyBub3Qgc2Vj"),
        ("DB_PASS", "hunter22"),
        ("API_KEY_OF_MINE", "zebra-quilt-lamp-19"),
    ],
)
def test_the_value_of_a_secret_variable_is_found_whatever_its_name_and_shape(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    (finding,) = findings(tmp_path, f"x\n\ny{value}z\n".encode())
    assert str(finding) == f"notes:3: the value of {name} [{finding.hash}]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", "/home/me/project1"),
        ("HF_ENDPOINT", "https://huggingface.co"),
        ("HF_TOKEN_PATH", "~/.cache/huggingface/token2"),
        ("WANDB_PROJECT", "tiny-language-model-2026"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("CONFIG", "smollm2-135m-pretrain"),
    ],
)
def test_a_variable_that_holds_no_secret_is_passed_over(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert findings(tmp_path, value.encode()) == ()


ORDINARY = r"""
sk-learn, hf_hub_download, AKIA, commit 0123456789abcdef0123456789abcdef01234567
API_KEY = os.environ['API_KEY']
password = getpass.getpass()
http://user@host/ and http://user:password@host/ and https://{user}:{password}@host/
self.access_token = access_token2
tokenizer: HuggingFaceTB/SmolLM2-135M-Instruct
"special_tokens_map.json": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
img_tokens = self.img2bpe_mapping_tensor[img_batch.to("cpu")]
blob_id='ae8c63daedbd4206d7d40126955d4e6ab1c80f8f'
"<|endoftext|>": 0, "pad_token": "<|im_end|>", "token_embd.weight": {"shape": [49152, 576]}
password: ********  secret=<your-secret-here>  token = "changeme1234567890"  API_KEY=${API_KEY1234567890AB}
"""


def test_ordinary_text_is_no_secret(tmp_path: Path) -> None:
    assert findings(tmp_path, ORDINARY.encode()) == ()


def test_the_programs_of_python_and_of_smolctl_hold_no_secret() -> None:
    for folder in (Path(json.__file__).parent.parent / "email", Path(smolctl.__file__).parent):
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
        assert [str(finding) for finding in scan(folder, files)] == []


def test_everything_that_a_run_publishes_is_clean(with_ggufs: Built, with_space: Built) -> None:
    for folder in filter(None, (with_ggufs.folder, with_space.folder, with_space.space)):
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        assert [str(finding) for finding in scan(folder, files)] == []


def test_of_weights_the_header_is_searched_and_their_numbers_are_not(tmp_path: Path) -> None:
    secret = SHAPES["GitHub"]
    values = torch.frombuffer(bytearray(secret.encode()), dtype=torch.uint8)
    save_file({"w": values}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert scan(tmp_path, ["a.safetensors"]) == ()
    save_file({"w": values}, tmp_path / "a.safetensors", metadata={"note": secret})
    assert [finding.kind for finding in scan(tmp_path, ["a.safetensors"])] == ["GitHub token"]


def test_every_rule_says_where_its_shape_is_documented_and_what_to_look_for_first() -> None:
    for rule in (*TOKENS, *CONTEXTS):
        assert rule.source in ("gitleaks", "detect-secrets", "issuer")
        assert all(hint and hint == hint.lower() for hint in rule.hints)


def with_card(built: Built, text: str, folder: Path) -> Built:
    """The same repository, with somebody's own card."""
    assert built.model.folder is not None
    run = shutil.copytree(built.model.folder, folder / "run")
    (run / "README.md").write_text(text)
    return dataclasses.replace(built, model=dataclasses.replace(built.model, folder=run))


def test_a_secret_stops_the_push_before_anything_is_sent(llama: Built, hub: PushHub, tmp_path: Path) -> None:
    built = with_card(llama, f"my notes\n\ntoken {TOKEN}\n", tmp_path)
    with pytest.raises(SmolError, match=r"README\.md:\d+: the value of HF_TOKEN \[[0-9a-f]{12}\]"):
        publish(built, repo="me/tiny")
    assert not hub.requests("^(POST|PUT)")


def test_what_is_no_secret_is_allowed_by_its_hash_and_listed_in_the_plan(
    llama_run: Path, tmp_path: Path, smolctl: Smolctl
) -> None:
    run = shutil.copytree(llama_run, tmp_path / "run")
    (run / "README.md").write_text("-----BEGIN RSA PRIVATE KEY----- of the tests, and password='hunter22b'\n")
    refused = smolctl("push", run, "--dry-run")
    assert refused.code == ExitCode.BAD_INPUT
    key, password = [part.split("]")[0] for part in refused.err.split("[")[1:3]]
    assert f"--allow-secret {key}" in refused.err
    assert smolctl("push", run, "--dry-run", "--allow-secret", key).code == ExitCode.BAD_INPUT
    hashes = [part for hash in (key, password, "012345") for part in ("--allow-secret", hash)]
    allowed = smolctl("push", run, "--dry-run", *hashes)
    assert allowed.code == 0, allowed.err
    row = next(line for line in allowed.out.splitlines() if line.startswith(" allowed"))
    assert key in row
    assert "012345 matches no finding" in " ".join(allowed.out.split())
    assert RECORD in allowed.out
