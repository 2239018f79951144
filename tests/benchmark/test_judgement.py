"""The judgements of `smolctl bench`, on numbers made up for them: limits, answers, load, baselines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smolctl.benchmark.baseline import compare_with, save_record
from smolctl.benchmark.correctness import allowed_error, bits_of, error_of
from smolctl.benchmark.limits import Cost, HardwareLimits, limits_of, roofline
from smolctl.benchmark.machine import (
    CpuTimes,
    Machine,
    SystemLoad,
    cpu_times,
    describe_machine,
    disturbance,
    load_between,
    named_cpu,
)
from smolctl.benchmark.report import BenchReport, ModelFacts, Result, compare
from smolctl.config import ModelConfig
from smolctl.errors import InputError, SmolError
from smolctl.timing import Spread
from smolctl.views.bench import bench_document, show_bench
from smolctl.views.output import Output

LIMITS = HardwareLimits(
    10e9, {"float32": 100e9, "bfloat16": 400e9}, 9e9, {"float32": 90e9, "bfloat16": 300e9}
)


def result(
    suite: str = "decode",
    engine: str = "smolctl",
    values: tuple[float, ...] = (100.0,) * 7,
    precision: str = "float32",
    unit: str = "tokens/s",
    error: float = 0.0,
    rival_of: str = "",
) -> Result:
    spread = Spread.of(values)
    return Result(
        *(suite, f"{engine}-model", engine, precision, "build", "64 tokens", unit, values),
        *(spread.median, spread.low, spread.high),
        peak_rss_bytes=10**9,
        roofline_share=0.5,
        limit="memory",
        answer_error=error,
        allowed_error=0.005,
        rival_of=rival_of,
    )


def report(*results: Result, config: ModelConfig | None = None, threads: int = 2) -> BenchReport:
    machine = Machine("A CPU", None, 2, threads, 8 * 10**9, "AVX2", "Linux", {"torch": "2.13.0"})
    facts = ModelFacts.of("runs/nano", config or ModelConfig())
    rows = tuple(results)
    return BenchReport(machine, SystemLoad(0.1, 0.0, 0.0), "", LIMITS, facts, 7, rows, compare(rows), ())


def saved(path: Path, one: BenchReport) -> Path:
    save_record(bench_document(one), path)
    return path


# --- the machine's limits -------------------------------------------------------------------------


def test_the_longer_of_reading_and_computing_binds() -> None:
    reading = Cost(bytes=5e9, flops=10e9)  # 0.5 s to read, 0.1 s to compute
    assert roofline(reading, 2.0, LIMITS) == (0.25, "memory")
    computing = Cost(bytes=5e9, flops=80e9)  # 0.8 s to compute
    assert roofline(computing, 1.0, LIMITS) == (0.8, "products in float32")


def test_narrow_numbers_are_held_against_the_fastest_products_they_could_use() -> None:
    narrow = Cost(flops=400e9, dtype="int8")  # no int8 was measured: bfloat16 is next
    assert roofline(narrow, 2.0, LIMITS) == (0.5, "products in bfloat16")
    assert roofline(Cost(), 1.0, LIMITS) == (None, None)


def test_limits_are_the_best_round_and_keep_the_worst() -> None:
    limits = limits_of([(8.0, {"float32": 5.0}), (10.0, {"float32": 4.0}), (9.0, {"float32": 6.0})])
    assert (limits.bandwidth, limits.slowest_bandwidth) == (10.0, 8.0)
    assert (limits.products, limits.slowest_products) == ({"float32": 6.0}, {"float32": 4.0})


# --- which machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "family", "model", "named"),
    [
        ("AuthenticAMD", 23, 49, "A CPU (Zen 2)"),
        ("AuthenticAMD", 25, 1, "A CPU (Zen 3)"),
        ("AuthenticAMD", 25, 17, "A CPU (Zen 4)"),
        ("AuthenticAMD", 25, 97, "A CPU (Zen 4)"),
        ("AuthenticAMD", 26, 2, "A CPU (Zen 5)"),
        ("AuthenticAMD", 26, 80, "A CPU (Zen 6)"),
        ("AuthenticAMD", 26, 255, "A CPU"),  # not known yet
        ("AuthenticAMD", 21, 2, "A CPU"),
        ("GenuineIntel", 6, 143, "A CPU"),
    ],
)
def test_processors_of_one_name_are_told_apart(vendor: str, family: int, model: int, named: str) -> None:
    first = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
    assert named_cpu(f"{first}model name\t: A CPU\nflags\t\t: fpu vme\n\nprocessor\t: 1\n") == named


def test_a_processor_without_a_name_has_none() -> None:
    assert named_cpu("processor\t: 0\nBogoMIPS\t: 50.00\nCPU architecture: 8\n\n") == ""
    assert describe_machine(1).cpu


# --- a busy machine -------------------------------------------------------------------------------


def test_other_processes_are_what_was_busy_and_not_ours() -> None:
    before = CpuTimes(total=1000, idle=600, steal=0, own=100)
    after = CpuTimes(total=1100, idle=640, steal=2, own=130)  # 60 s busy: 2 stolen, 30 ours
    load = load_between(before, after, 0.4)
    assert load.load_average == 0.4
    assert load.others == pytest.approx(0.28)
    assert load.steal == pytest.approx(0.02)
    assert "28%" in disturbance(load, 2)
    assert load_between(None, after, 0.4) == SystemLoad(0.4, None, None)
    assert load_between(after, after, 0.4).others is None


def test_a_quiet_machine_is_not_called_busy_and_a_busy_one_is() -> None:
    assert disturbance(SystemLoad(7.0, 0.01, 0.0), 2) == ""  # the load average is of the minute before
    assert "12% of the processors' time" in disturbance(SystemLoad(0.0, 0.12, 0.0), 2)
    assert "host took 5%" in disturbance(SystemLoad(0.0, 0.0, 0.05), 2)
    assert disturbance(SystemLoad(0.5, None, None), 2) == ""
    assert "load average was 1.5" in disturbance(SystemLoad(1.5, None, None), 2)
    assert disturbance(SystemLoad(None, None, None), 2) == ""


def test_own_work_counts_as_own() -> None:
    before = cpu_times()
    if before is None:
        pytest.skip("no /proc/stat here")
    total = sum(value * value for value in range(3_000_000))
    after = cpu_times()
    assert total
    assert after is not None
    assert after.own > before.own
    assert after.total >= before.total


# --- answers --------------------------------------------------------------------------------------


def test_an_answer_is_off_by_its_share_of_the_spread() -> None:
    expected = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    assert error_of("decode", expected.clone(), expected) == 0.0
    assert error_of("decode", expected + 7.0, expected) < 1e-5  # a constant changes no probability
    assert error_of("decode", 1.1 * expected, expected) == pytest.approx(0.1, rel=1e-3)
    assert error_of("decode", expected.roll(1, dims=0), expected) > 1  # the sequences of a batch mixed up
    one_row = expected.clone()
    one_row[2] = -one_row[2]
    assert error_of("decode", one_row, expected) == pytest.approx(2.0, rel=1e-3)  # the worst row counts


@pytest.mark.parametrize(
    "answer", [torch.full((2, 5), float("nan")), torch.zeros(1, 5), torch.full((2, 5), float("inf"))]
)
def test_no_answer_is_wrong(answer: torch.Tensor) -> None:
    expected = torch.arange(10.0).view(2, 5)
    assert error_of("prefill", answer, expected) == float("inf")


def test_tokens_must_be_equal_and_losses_nearly() -> None:
    ids = torch.tensor([3.0, 17.0])
    assert error_of("tokenize", ids, ids) == 0.0
    assert error_of("tokenize", ids + torch.tensor([0.0, 1.0]), ids) > allowed_error("tokenize", "float32")
    loss = torch.tensor([5.0])
    assert error_of("train", loss + 1e-6, loss) < allowed_error("train", "float32")
    assert error_of("train", loss + 0.1, loss) > allowed_error("train", "float32")


def test_precisions_are_told_by_their_narrowest_numbers() -> None:
    names = (
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "int4 + int8",
        "q4_1",
        "Q8_0",
        "int8-dynamic",
        "f32",
        "bf16",
    )
    assert [bits_of(name) for name in names] == [32, 16, 16, 8, 4, 4, 8, 8, 32, 16]


# --- comparisons ----------------------------------------------------------------------------------


def test_faster_is_above_one_in_every_unit() -> None:
    rates = compare([result(values=(200.0,) * 7), result(engine="litgpt")])
    times = compare(
        [result(values=(1.0,) * 7, unit="s"), result(engine="litgpt", values=(2.0,) * 7, unit="s")]
    )
    for found in (rates, times):
        assert [(one.against, one.ratio.spread.median, one.ratio.beyond_noise) for one in found] == [
            ("litgpt", 2.0, True)
        ]


def test_a_fast_wrong_answer_has_no_speed() -> None:
    wrong = result(engine="litgpt", values=(900.0,) * 7, error=1.2)
    assert compare([result(), wrong]) == ()
    assert compare([result(error=1.2), result(engine="litgpt")]) == ()
    assert report(result(), wrong).wrong == (wrong,)


def test_only_equal_work_is_compared() -> None:
    other = replace(result(engine="transformers"), work="64 tokens, adamw")
    assert compare([result(), other]) == ()


def test_a_rival_stands_beside_the_precision_that_it_is_a_rival_of() -> None:
    int8 = replace(result(precision="int8"), model="int8-model")
    found = compare(
        [
            result(),
            int8,
            result(engine="transformers"),
            result(engine="llama.cpp", precision="q8_0", rival_of="int8-model"),
        ]
    )
    pairs = [(one.precision, one.against, one.against_precision) for one in found]
    assert pairs == [
        ("float32", "transformers", "float32"),
        ("int8", "smolctl", "float32"),
        ("int8", "transformers", "float32"),
        ("int8", "llama.cpp", "q8_0"),
    ]


# --- baselines ------------------------------------------------------------------------------------


def test_half_the_speed_is_below_the_limit_and_the_same_speed_is_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", report(result(), result("load-warm", values=(2.0,) * 7, unit="s")))
    slower = report(result(values=(50.0,) * 7), result("load-warm", values=(4.0,) * 7, unit="s"))
    changes = compare_with(slower, path, 0.95)
    assert [(one.result.suite, one.ratio, one.beyond_noise) for one in changes.failed] == [
        ("decode", 0.5, True),
        ("load-warm", 0.5, True),
    ]
    assert compare_with(report(result(values=(96.0,) * 7)), path, 0.95).failed == ()
    assert compare_with(slower, path, None).failed == ()


def test_a_change_within_the_noise_is_called_so_and_fails_all_the_same(tmp_path: Path) -> None:
    noisy = (60.0, 80.0, 90.0, 100.0, 110.0, 120.0, 140.0)
    path = saved(tmp_path / "base.json", report(result(values=noisy)))
    changes = compare_with(report(result(values=tuple(0.9 * value for value in noisy))), path, 0.95)
    (change,) = changes.failed
    assert change.ratio == pytest.approx(0.9)
    assert change.beyond_noise is False


def test_a_baseline_of_another_machine_or_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", report(result()))
    with pytest.raises(InputError, match="another machine: A CPU, 2 processors, 2 threads") as refused:
        compare_with(report(result(), threads=1), path, 0.95)
    assert "--save" in refused.value.hint
    other = ModelConfig(num_hidden_layers=3)
    with pytest.raises(InputError, match="another model: runs/nano"):
        compare_with(report(result(), config=other), path, 0.95)
    same_shape = ModelConfig(initializer_range=0.5, eos_token_id=7)  # takes the same time
    assert compare_with(report(result(), config=same_shape), path, 0.95).failed == ()


def test_other_versions_are_said_and_not_refused(tmp_path: Path) -> None:
    before = report(result())
    older = replace(before, machine=replace(before.machine, versions={"torch": "2.12.0"}), disturbed="noise")
    notes = compare_with(before, saved(tmp_path / "base.json", older), 0.95).notes
    assert "torch was 2.12.0, is 2.13.0" in notes
    assert any("baseline was disturbed" in note for note in notes)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"format": "other"}', '{"format": "smolctl-bench", "version": 99}'),
        *("[" * 100_000, '{"format": "smolctl-bench", "version": 1' + "0" * 5_000 + "}"),
    ],
    ids=lambda content: content[:50],
)
def test_a_file_that_is_no_baseline_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"base\.json"):
        compare_with(report(result()), path, 0.95)


@pytest.mark.parametrize("missing", ["machine", "model", "results"])
def test_a_damaged_baseline_is_named(tmp_path: Path, missing: str) -> None:
    path = saved(tmp_path / "base.json", report(result()))
    content = json.loads(path.read_text())
    del content[missing]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"base\.json: damaged"):
        compare_with(report(result()), path, 0.95)


def test_nothing_in_common_is_an_error_and_not_a_pass(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", report(result("prefill")))
    with pytest.raises(InputError, match="no result in common"):
        compare_with(report(result("decode")), path, 0.95)


def test_a_record_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(SmolError, match="cannot be written"):
        save_record({}, tmp_path / "no" / "such" / "base.json")


def test_results_of_one_side_alone_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", report(result(), result(precision="int4")))
    changes = compare_with(report(result(), result("prefill")), path, 0.95)
    assert changes.failed == ()
    assert changes.missing == (
        "decode smolctl int4 (64 tokens) is in the baseline only",
        "prefill smolctl float32 (64 tokens) is not in the baseline",
    )
    assert bench_document(report(result()), changes)["baseline"]["missing"] == list(changes.missing)
    assert compare_with(report(result(), result(precision="int4")), path, 0.95).missing == ()


def test_a_baseline_that_is_not_a_number_keeps_no_limit(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", report(result()))
    path.write_text(path.read_text().replace('"median": 100.0', '"median": NaN'))
    assert len(compare_with(report(result()), path, 0.95).failed) == 1


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("markdown", [True, False])
def test_a_busy_machine_gets_an_interval_and_no_verdict(
    markdown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = report(result(values=(200.0,) * 7), result(engine="litgpt"))
    busy = replace(quiet, disturbed="other processes took 30% of the processors' time")
    for one in (quiet, busy):
        changes = compare_with(
            one, saved(tmp_path / "base.json", report(result(), result(engine="litgpt"))), None
        )
        show_bench(Output(), one, changes, markdown)
        said, document = capsys.readouterr().out, bench_document(one, changes)
        verdicts = [
            row["beyond_noise"] for row in (*document["comparisons"], *document["baseline"]["changes"])
        ]
        if one is quiet:
            assert "faster" in said
            assert "disturbed" not in said
            assert True in verdicts
        else:
            assert "faster" not in said
            assert said.count("disturbed") == 3  # the comparison, and two changes since the baseline
            assert "2.00 to 2.00" in said
            assert "run the same command again" in said
            assert set(verdicts) == {None}


def test_a_disturbed_baseline_gives_no_verdict_either(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", replace(report(result()), disturbed="noise"))
    changes = compare_with(report(result(values=(200.0,) * 7)), path, None)
    (change,) = bench_document(report(result()), changes)["baseline"]["changes"]
    assert change["beyond_noise"] is None


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.json", report(result()))
    content = json.loads(path.read_text())
    for part in (content, content["machine"], content["results"][0]):
        part["colour"] = {"of": "a later version"}
    path.write_text(json.dumps(content))
    assert compare_with(report(result()), path, 0.95).failed == ()


@pytest.mark.parametrize(
    ("place", "value", "key"),
    [
        ("results", 5, "results"),
        ("results", [5], r"results\.0"),
        ("results", [{"suite": []}], r"results\.0\.suite"),
        ("machine", {"cpu": 5}, r"machine\.cpu"),
        ("model", {"id": "a", "parameters": "many", "shape": "x"}, r"model\.parameters"),
        ("disturbed", 5, "disturbed"),
    ],
)
def test_a_value_that_no_baseline_has_names_its_key(
    tmp_path: Path, place: str, value: object, key: str
) -> None:
    path = saved(tmp_path / "base.json", report(result()))
    path.write_text(json.dumps({**json.loads(path.read_text()), place: value}))
    with pytest.raises(InputError, match=rf"base\.json: damaged: {key}"):
        compare_with(report(result()), path, 0.95)
