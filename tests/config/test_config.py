"""Config files: what they may say, who wins, and that the shipped ones are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from smolctl.config import RunConfig, load_run_config, preset_names, presets_folder
from smolctl.errors import InputError, UsageError

KEY = re.compile(r"^ *[a-z_]+:")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_presets_of_the_design_are_there() -> None:
    assert {"nano", "smollm2-135m", "smollm2-135m-hub", "smollm2-135m-pretrain"} <= set(preset_names())


def test_the_chat_preset_s_rate_fits_the_model_and_the_user_s_is_kept(tmp_path: Path) -> None:
    written = load_run_config("chat").optimizer.learning_rate
    small, whole = (load_run_config(name).model for name in ("nano", "smollm2-135m"))
    large = whole.model_copy(update={"hidden_size": 2 * whole.hidden_size})
    rates = [load_run_config("chat", model=model).optimizer.learning_rate for model in (small, whole, large)]
    assert rates == [pytest.approx(3e-3), written, pytest.approx(written / 4)]
    assert (
        load_run_config("chat", ["optimizer.learning_rate=2e-5"], model=small).optimizer.learning_rate == 2e-5
    )
    own = tmp_path / "chat.yaml"
    own.write_text("data: {format: chat, sequence_length: 128}\noptimizer: {learning_rate: 5.0e-5}\n")
    assert load_run_config(str(own), model=small).optimizer.learning_rate == 5e-5


@pytest.mark.parametrize("preset", preset_names())
def test_every_shipped_config_loads_and_comments_every_key(preset: str) -> None:
    config = load_run_config(preset)
    path = presets_folder() / f"{preset}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # A fine-tuning recipe has no model of its own: it comes with --init-from.
    absent = {"model", "tokenizer"} if preset in ("finetune", "chat") else set()
    record = {"init_from"}  # which training writes, and nobody sets
    assert set(content) == set(RunConfig.model_fields) - absent - record
    for name, section in content.items():
        schema = getattr(config, name)
        if isinstance(schema, BaseModel):
            assert set(section) == set(type(schema).model_fields), name
    before = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        is_section = line.split(":")[0] in content and line.split("#")[0].rstrip().endswith(":")
        if KEY.match(line) and not is_section:
            assert "#" in line or before.lstrip().startswith("#"), f"{preset}: no comment on {line.strip()}"
        before = line


def test_smollm2_135m_is_the_brief() -> None:
    config = load_run_config("smollm2-135m").with_whole_steps()
    model, schedule = config.model, config.schedule
    assert (model.position_embedding, model.max_position_embeddings) == ("learned", 1_024)
    assert model.residual_scale == 2**-0.5
    assert (schedule.warmup_steps, schedule.decay_start, schedule.decay_steps) == (2_000, 1_600_000, 400_000)
    assert (config.train.steps, config.checkpoint.every, config.predictions.every) == (5_000, 500, 500)


def test_smollm2_135m_hub_is_the_published_model() -> None:
    model = load_run_config("smollm2-135m-hub").model
    assert model.model_type == "llama"
    assert (model.rope_theta, model.max_position_embeddings) == (100_000, 8_192)


def test_smollm2_135m_pretrain_is_the_published_recipe() -> None:
    config = load_run_config("smollm2-135m-pretrain")
    assert config.model.model_type == "llama"
    assert (config.model.rope_theta, config.model.max_position_embeddings) == (10_000, 2_048)
    assert config.tokens_per_step == 1_048_576
    assert config.train.steps == 2_000_000
    assert config.optimizer.learning_rate == 3e-3


def test_flags_beat_set_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "train: {steps: 11, batch_size: 12, seed: 13}\n")
    config = load_run_config(path, ["train.steps=21", "train.batch_size=22"], {"train": {"steps": 31}})
    assert (config.train.steps, config.train.batch_size, config.train.seed) == (31, 22, 13)
    assert config.train.gradient_clip == RunConfig().train.gradient_clip


@pytest.mark.parametrize("key", ["train.steps", "train.minutes", "train.batch_size"])
def test_a_number_that_nobody_can_mean_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: .*less than or equal to"):
        load_run_config("nano", [f"{key}={10**20}"])


def test_set_keeps_the_other_keys_of_its_section() -> None:
    changed = load_run_config("nano", ["model.num_hidden_layers=2"])
    assert changed.model.num_hidden_layers == 2
    assert changed.model.hidden_size == load_run_config("nano").model.hidden_size


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E-5", 1e-5), ("3.0e-4", 3e-4), ("1_000", 1000.0), (".5", 0.5)]
)
def test_numbers_may_be_written_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path / "c.yaml", f"optimizer: {{learning_rate: {text}}}\n")
    assert load_run_config(path).optimizer.learning_rate == value
    assert load_run_config("nano", [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value


def test_shares_become_whole_steps_of_the_run() -> None:
    settings = ["train.steps=1000", "schedule.warmup_steps=0.05", "schedule.decay_steps=0.2"]
    schedule = load_run_config("smollm2-135m-hub", settings).with_whole_steps().schedule
    assert (schedule.warmup_steps, schedule.decay_start, schedule.decay_steps) == (50, 800, 200)
    cosine = load_run_config(
        "smollm2-135m-hub", [*settings, "schedule.name=cosine", "schedule.decay_steps=0"]
    )
    resolved = cosine.with_whole_steps().schedule
    assert (resolved.decay_start, resolved.decay_steps) == (50, 950)


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("train.stepz=1", "unknown key train.stepz", "Did you mean train.steps?"),
        ("steps=1", "unknown key steps", "Did you mean train.steps?"),
        ("train.learning_rate=1", "unknown key train.learning_rate", "Did you mean optimizer.learning_rate?"),
        ("seed=1", "unknown key seed", "Did you mean data.seed or train.seed?"),
        ("optimiser.eps=1", "unknown key optimiser", "Did you mean optimizer?"),
        ("model.n_layers=3", "unknown key model.n_layers", "num_hidden_layers"),
        ("train.steps=many", "train.steps: must be a valid integer, got 'many'", "Change the value"),
        ("train.steps=0", "train.steps", "Change the value"),
        ("schedule.name=wobbly", "schedule.name", "Change the value"),
        ("model.num_key_value_heads=2", "is not divisible by num_key_value_heads 2", "Change the value"),
        ("data.sequence_length=4096", "exceeds model.max_position_embeddings", "Change the value"),
        ("train.micro_batch_size=3", "is not divisible by train.micro_batch_size 3", "Change the value"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_a_remedy(setting: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as raised:
        load_run_config("smollm2-135m", [setting])
    assert message in raised.value.message
    assert hint in raised.value.hint


def floats_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that takes a number with a fraction, alone or in a list."""
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from floats_of(kind, f"{prefix}{name}.")
        elif "float" in str(kind):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", list(floats_of(RunConfig)))
def test_no_number_of_a_config_is_nan_or_infinite(key: str, number: str) -> None:
    lists = {"optimizer.betas": f"[0.9, {number}]", "data.weights": f"[{number}]"}
    with pytest.raises(InputError) as raised:
        load_run_config("nano", [f"{key}={lists.get(key, number)}"])
    assert f"nano: {key}" in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.betas=[1, 0.9]",
        "optimizer.betas=[0.9, 1.0]",
        "train.seed=4294967296",
        "trainer.devices=0",
        "trainer.devices=-1",
        "trainer.num_nodes=0",
        "schedule.warmup_steps=1.5",
        "schedule.decay_steps=-1",
    ],
)
def test_a_value_that_a_library_would_refuse_later_is_named(setting: str) -> None:
    with pytest.raises(InputError) as raised:
        load_run_config("nano", [setting])
    assert raised.value.message.startswith(f"nano: {setting.partition('=')[0]}")


@pytest.mark.parametrize(
    ("settings", "batch", "micro"),
    [
        (["train.batch_size=2"], 2, 2),
        (["train.batch_size=12"], 12, 6),
        (["train.batch_size=13"], 13, 1),
        (["train.batch_size=64"], 64, 8),
        (["train.batch_size=6", "train.micro_batch_size=3"], 6, 3),
        (["train.batch_size=6", "train.micro_batch_size=0"], 6, 0),
    ],
)
def test_another_batch_size_lowers_a_micro_batch_size_that_does_not_fit(
    settings: list[str], batch: int, micro: int
) -> None:
    train = load_run_config("nano", settings).train
    assert (train.batch_size, train.micro_batch_size) == (batch, micro)


def test_two_sizes_that_do_not_fit_are_refused_where_the_user_named_both() -> None:
    with pytest.raises(InputError, match=r"train.batch_size 2 is not divisible by train.micro_batch_size 8"):
        load_run_config("nano", ["train.batch_size=2", "train.micro_batch_size=8"])


def parts(preset: str, *settings: str) -> tuple[float, float | None, float, float]:
    found = load_run_config(preset, settings).with_whole_steps().schedule
    return found.warmup_steps, found.decay_start, found.decay_steps, found.min_learning_rate


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("times", [0.1, 10])
def test_the_schedule_of_a_preset_scales_with_its_steps(preset: str, times: float) -> None:
    steps = round(load_run_config(preset).train.steps * times)
    before, after = parts(preset), parts(preset, f"train.steps={steps}")
    assert after[:3] == pytest.approx([(part or 0) * times for part in before[:3]], rel=0.02, abs=1)
    assert after[3] == before[3]


def test_what_the_user_sets_of_a_schedule_stays() -> None:
    assert parts("smollm2-135m", "train.steps=500", "schedule.warmup_steps=50")[:3] == (50, 160_000, 40_000)
    chosen = ["schedule.warmup_steps=7", "schedule.decay_start=300", "schedule.decay_steps=11"]
    assert parts("smollm2-135m", "train.steps=500", *chosen)[:3] == (7, 300, 11)
    assert parts("nano", "schedule.min_learning_rate=1e-5", "optimizer.learning_rate=3e-3")[3] == 1e-5


def test_a_schedule_in_a_users_own_file_stays(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml",
        "train: {steps: 100}\nschedule: {warmup_steps: 10, decay_start: 80, decay_steps: 20}",
    )
    assert parts(path, "train.steps=1000")[:3] == (10, 80, 20)


def test_a_preset_s_least_rate_follows_its_peak() -> None:
    assert parts("nano", "optimizer.learning_rate=6e-4")[3] == 3e-5


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("preset", ["nano", "smollm2-135m", "smollm2-135m-pretrain"])
def test_another_schedule_falls_to_the_last_step(preset: str, name: str) -> None:
    warmup, start, decay, _ = parts(preset, f"schedule.name={name}")
    assert start == warmup
    assert start + decay == load_run_config(preset).train.steps


def test_a_file_without_a_schedule_warms_up_for_a_share_of_its_steps(tmp_path: Path) -> None:
    assert parts(write(tmp_path / "c.yaml", "train: {steps: 100}"))[0] == 2


@pytest.mark.parametrize("setting", ["train.steps", "=3"])
def test_a_setting_without_key_or_value_is_a_usage_error(setting: str) -> None:
    with pytest.raises(UsageError, match="expected key=value"):
        load_run_config("nano", [setting])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [1, 2\n", "line"),
        (b"just words\n", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"train: 3\n", "train"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_run_config(str(path))
    assert "bad.yaml" in raised.value.message
    assert message in raised.value.message


def test_a_file_that_is_not_there_lists_the_presets() -> None:
    with pytest.raises(InputError) as raised:
        load_run_config("nowhere.yaml")
    assert "no such file" in raised.value.message
    assert "nano" in raised.value.hint


def test_a_yaml_tag_is_never_executed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", f"train: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(InputError):
        load_run_config(path)
    assert not (tmp_path / "made").exists()


STARTS = (["--help"], ["count-params", "--help"], ["train", "--help"], ["--version"])
READS = (
    ["count-params", "smollm2-135m"],
    ["inspect-config", "smollm2-135m"],
    ["inspect-config", "smollm2-135m", "--yaml"],
)
HEAVY = ("torch", "transformers", "lightning", "numpy", "huggingface_hub", "matplotlib", "tokenizers")


def test_help_imports_neither_rich_nor_yaml_nor_anything_heavy() -> None:
    assert not imported_by(*STARTS) & {"rich", "yaml", *HEAVY}


def test_a_config_is_read_without_anything_heavy() -> None:
    assert not imported_by(*READS) & set(HEAVY)


@pytest.mark.real_weights
def test_a_gguf_is_read_without_torch(gguf_file: Path) -> None:
    commands = (["count-params", str(gguf_file)], ["inspect-config", str(gguf_file)])
    assert not imported_by(*commands) & {"torch", "transformers", "lightning"}


def imported_by(*commands: list[str]) -> set[str]:
    """Top-level packages that a process has imported when it has run these command lines."""
    script = (
        "import sys\n"
        "from smolctl.cli.main import main\n"
        f"for arguments in {commands!r}:\n"
        "    sys.argv = ['smolctl', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as exit:\n"
        "        assert not exit.code, arguments\n"
        "print('MODULES', *{name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.slow
def test_presets_are_found_in_an_installed_wheel(tmp_path: Path) -> None:
    checkout = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        reason = f"the wheel cannot be built: {built.stderr.strip()[-300:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    installed = tmp_path / "installed"
    (wheel,) = tmp_path.glob("smolctl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    # -P keeps the working folder off sys.path, PYTHONPATH comes before the checkout.
    script = (
        "import smolctl, smolctl.config as c; print(smolctl.__file__, c.presets_folder(), *c.preset_names())"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    package, folder, *names = done.stdout.split()
    assert Path(package).is_relative_to(installed)
    assert Path(folder).is_relative_to(installed)
    assert names == preset_names()
