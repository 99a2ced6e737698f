"""Tests of the benchmark: its measurements are right and complete, and are drawn."""

import re
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import floors as floors_module
from bench import readme
from bench.__main__ import main, make_parser, plans_of
from bench.cases import BACKWARD, BOTH, CASES, FORWARD, GPU_CASES, MODES, SUITES, Case, make_inputs
from bench.floors import Floors
from bench.plots import draw_throughput
from bench.provider import AbsentError
from bench.providers import PROVIDERS
from bench.report import amx_requirements, print_requirements, read_results, requirements
from bench.rows import RowMaker, write_rows
from bench.steps import Checker, Step, make_step
from bench.suites import Plan, measure
from bench.timing import Effort, Task, interleave, sampler_for
from triton_offset_bias.backends import cpp

SMALL = Case("small_c128", 2, 3, 40, 16, clamp=9)
WITH_TABLE = ("ours", "sdpa_index", "sdpa_strided", "sdpa_strided_copy", "t5_eager")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("clamp", [None, 9, 100])
@pytest.mark.parametrize("name", WITH_TABLE)
def test_providers_agree_with_the_reference(name, clamp, is_causal):
    """Tables have all offsets, some of them, or more. The check itself sees a wrong sign."""
    inputs = make_inputs(replace(SMALL, clamp=clamp, is_causal=is_causal), "cpu")
    provider = PROVIDERS[name]
    run = provider.prepare(inputs)
    Checker(inputs).check(provider, run, needs_gradients=True)
    with pytest.raises(ArithmeticError, match="out differs from the reference"):
        Checker(inputs).check(provider, lambda q, k, v, table: run(q, k, v, table.flip(-1)), needs_gradients=False)


def test_large_cases_are_checked_by_their_first_head(monkeypatch):
    """The dense reference of all heads would not fit into memory. A mistake in another head is therefore not seen."""
    monkeypatch.setattr("bench.steps.MOST_PAIRS", 1)
    inputs = make_inputs(SMALL, "cpu")
    run = PROVIDERS["ours"].prepare(inputs)

    def wrong_in(head):
        return lambda *arguments: run(*arguments) + torch.eye(3)[head].reshape(1, 3, 1, 1)

    Checker(inputs).check(PROVIDERS["ours"], wrong_in(1), needs_gradients=True)
    with pytest.raises(ArithmeticError, match="out differs"):
        Checker(inputs).check(PROVIDERS["ours"], wrong_in(0), needs_gradients=True)


def test_the_gpu_suite_gives_times_and_rates_and_says_what_is_absent(capsys):
    """The test runs on a CPU, where two of the suite's providers cannot run."""
    providers = ("ours", "ours_no_bias", "ours_atomics", "flash_attn", "sdpa_index")
    plan = Plan("gpu", SMALL, (FORWARD, BACKWARD), providers, "cpu", 1, Effort(3, 1.0))
    rows = list(measure(plan, RowMaker("cpu")))
    found = {(row.provider, row.mode, row.metric): row.p50 for row in rows}
    for name in ("ours", "ours_no_bias", "sdpa_index"):
        for mode in (FORWARD, BACKWARD):
            time, rate = found.pop((name, mode, "time")), found.pop((name, mode, "throughput"))
            assert rate * 1e12 == pytest.approx(SMALL.flops(mode) / (time / 1e3), rel=1e-3)
    assert not found
    said = capsys.readouterr()
    assert "flash_attn is absent from every mode: flash-attn is for GPUs" in said.out + said.err


def test_gpus_are_timed_by_tritons_benchmark(monkeypatch):
    """Triton's benchmark may repeat backward any number of times after one forward. It reports milliseconds."""
    calls = []
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())

    def do_bench(function, **_):
        calls.extend(function() for _ in range(3))
        return 2.0

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    inputs = make_inputs(SMALL, "cpu")
    provider = PROVIDERS["ours"]
    run = provider.prepare(inputs)
    steps = {mode: Task(make_step(provider, run, inputs, mode, mode == BACKWARD), 1) for mode in MODES}
    seconds = interleave(steps, sampler_for("cuda", 1), Effort(4, 10.0), "test")
    assert {mode: list(values) for mode, values in seconds.items()} == {mode: [0.002] * 4 for mode in MODES}
    assert len(calls) == 3 * 3 * 5


def test_a_peer_that_fails_is_left_out_and_ours_must_not(capsys):
    """A peer fails, for example, if its matrices do not fit into memory."""

    def fail(_):
        raise torch.OutOfMemoryError("no room\nfor it")

    tasks = {"sdpa_index": Task(Step(fail), 1), "ours": Task(Step(lambda _: None), 1)}
    assert list(interleave(tasks, sampler_for("cpu", 1), Effort(3, 1.0), "a case")) == ["ours"]
    assert "a case: sdpa_index is absent: no room\n" in "".join(capsys.readouterr())
    with pytest.raises(torch.OutOfMemoryError):
        interleave({"ours": Task(Step(fail), 1)}, sampler_for("cpu", 1), Effort(3, 1.0), "a case")


def test_a_second_thread_is_measured_for_ours_and_a_matmul_beside_it(tmp_path):
    """Each is compared with its own time on one thread. Only ours has a requirement."""
    plan = Plan("threads", SMALL, (FORWARD,), ("ours",), "cpu", 1, Effort(3, 1.0))
    rows = list(measure(plan, RowMaker("cpu")))
    assert [(row.provider, row.metric, row.device.rpartition(", ")[2]) for row in rows] == [
        (name, "thread_speedup", "2 threads") for name in ("ours", "sgemm")
    ]
    write_rows(tmp_path / "out.csv", rows, keep_others=False)
    results = read_results(tmp_path / "out.csv")
    least = {one.what: (one.value(results), one.bound) for one in requirements() if "second thread" in one.what}
    assert least == {
        "speed-up by the second thread, least": (rows[0].p50, 1.7),
        "speed-up by the second thread, least, of sgemm beside it": (rows[1].p50, None),
    }


def _interleaved(seconds):
    """A replacement of `interleave` for tasks whose times are known."""
    return lambda tasks, *_: {name: np.array([seconds[name]] * 3) for name in tasks}


@pytest.mark.cpu_only
@pytest.mark.needs_engine
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiles the loops")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shares_of_the_floors_are_those_of_products_and_powers(monkeypatch, dtype):
    """The floor is the time of the products at the peak, and then of the powers. The loops do what they say."""
    floors = Floors(dtype)
    for step in (floors.products, floors.powers):
        step.timed(step.before())
    assert floors.operations % floors_module.STEPS[dtype] == 0
    assert floors.operations >= 2 * 12 * 4 * floors_module.STEPS[dtype]  # 12 vectors of 4 numbers or more
    assert floors.count >= 64 * 4 * floors_module.STEPS["powers"]
    monkeypatch.setattr("bench.suites.interleave", _interleaved({"ours": 8.0, "peak": 0.5, "powers": 0.25}))
    case = replace(SMALL, dtype=dtype)
    plan = Plan("floors", case, (FORWARD, BOTH), ("ours",), "cpu", 1, Effort(3, 1.0))
    found = {(row.provider, row.mode, row.metric): row.p50 for row in measure(plan, RowMaker("cpu"))}
    for mode, passes in ((FORWARD, 1), (BOTH, 2)):
        products = case.flops(mode) / (floors.operations / 0.5)
        powers = passes * 2 * 3 * 40 * 40 / (floors.count / 0.25)
        assert found["peak", mode, "rate"] == pytest.approx(floors.operations / 0.5 / 1e9, rel=1e-4)
        assert found["ours", mode, "peak_fraction"] == pytest.approx(products / 8, rel=1e-4)
        assert found["ours", mode, "floor_fraction"] == pytest.approx((products + powers) / 8, rel=1e-4)


def _results(tmp_path, monkeypatch, processor, rows):
    """Results of a processor, from (case, provider, mode, metric, value)."""
    monkeypatch.setattr("bench.rows._processor", lambda: processor)
    maker = RowMaker("cpu")
    made = [maker.make(CASES[case], *names, "x", np.array([value]), 1) for case, *names, value in rows]
    write_rows(tmp_path / "out.csv", made, keep_others=False)
    return read_results(tmp_path / "out.csv")


def test_processors_with_amx_have_requirements_of_their_own(tmp_path, monkeypatch, capsys):
    """A figure is the median of the rounds' ratios. Other processors do not see these requirements."""
    case = "h8_l1024_bf16"
    ratios = {"ours": 1.0, "ours_vectors": 4.5, "sdpa_no_bias": 2.7}
    rows = [(case, name, mode, "ratio", value) for name, value in ratios.items() for mode in (FORWARD, BOTH)]
    results = _results(tmp_path, monkeypatch, "Intel Xeon AMX", rows)
    ratios = {one.what: one.value(results) for one in amx_requirements() if one.case == case}
    assert list(ratios.values()) == pytest.approx([4.5, 4.5, 2.7, 2.7])
    print_requirements(results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if f" {case} " in line]
    assert [line[-1] for line in lines] == ["NO", "NO", "yes", "yes"]
    assert [line[-3] for line in lines] == ["5.2", "5.2", "1.4", "2.5"]
    print_requirements(_results(tmp_path, monkeypatch, "AMD EPYC AVX512_BF16", rows))
    assert f" {case} " not in capsys.readouterr().out


def test_dtypes_that_were_not_measured_have_no_column(tmp_path, monkeypatch):
    """In a column, a peer that was not measured has a dash, and no row where it was never measured."""
    rows = [("h8_l1024", "sdpa_no_bias", mode, "ratio", value) for mode, value in ((FORWARD, 1.25), (BOTH, 1.5))]
    table = readme._peers_table(_results(tmp_path, monkeypatch, "AMD EPYC AVX2", rows), "")
    header, _, *lines = table.splitlines()
    assert header == "| | forward, float32 | forward + backward, float32 |"
    assert lines == ["| SDPA without any bias | 1.25 | 1.50 |"]
    rows.append(("h8_l1024_bf16", "sdpa_no_bias", BOTH, "ratio", 2.0))
    table = readme._peers_table(_results(tmp_path, monkeypatch, "AMD EPYC AVX512_BF16", rows), "")
    assert table.splitlines()[-1] == "| SDPA without any bias | 1.25 | - | 1.50 | 2.00 |"


def test_another_build_is_measured_only_where_there_are_two(monkeypatch):
    """The provider calls the build avx512_bf16, and gives the loaded build back. Elsewhere it is absent."""
    inputs = make_inputs(SMALL, "cpu")
    monkeypatch.setattr(cpp, "BUILD", "avx512_bf16")
    with pytest.raises(AbsentError, match="loaded: avx512_bf16"):
        PROVIDERS["ours_vectors"].prepare(inputs)
    loaded, other = object(), object()
    monkeypatch.setattr(cpp, "_ENGINE", loaded)
    monkeypatch.setattr("bench.own._loaded", lambda build: other)
    with PROVIDERS["ours_vectors"].context():
        assert cpp._ENGINE is other
    assert cpp._ENGINE is loaded


def test_each_case_is_written_before_the_next_one_is_measured(monkeypatch, tmp_path):
    """A run that is killed loses the case at work alone. Rows of a case before an error are kept too."""
    path = tmp_path / "out.csv"
    unmeasured = RowMaker("cpu").make(CASES["h8_l2048"], "ours", FORWARD, "time", "ms", np.array([3.0]), 1)
    write_rows(path, [unmeasured], keep_others=False)

    def measure_first(plan, maker):
        if plan.case is not CASES["h8_l1024"]:
            assert list(read_results(path).case) == ["h8_l2048", "h8_l1024"]
        yield maker.make(plan.case, "ours", FORWARD, "time", "ms", np.array([1.0]), 1)
        if plan.case is not CASES["h8_l1024"]:
            raise ZeroDivisionError

    monkeypatch.setattr("bench.__main__.measure", measure_first)
    with pytest.raises(ZeroDivisionError):
        main(["--suite", "plain", "--case", "h8_l1024", "h8_l1024_causal", "--append", "--output", str(path)])
    assert list(read_results(path).case) == ["h8_l2048", "h8_l1024", "h8_l1024_causal"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("queries", "causal", "window"), [(None, False, -1), (None, True, -1), (3, True, 5), (7, False, 2)]
)
def test_operations_are_counted_by_attended_pairs(queries, causal, window):
    """In decoding only the last queries count."""
    case = Case("counted", 2, 3, 40, 16, is_causal=causal, decoded=queries, window=window)
    pairs = 0
    for i in range(40 - case.queries, 40):
        pairs += sum((not causal or j <= i) and (window < 0 or abs(i - j) <= window) for j in range(40))
    assert case.flops(FORWARD) == 4 * 2 * 3 * pairs * 16
    assert case.flops(BOTH) == 14 * 2 * 3 * pairs * 16


def test_atomics_of_scores_are_chosen_for_their_provider_alone():
    """The switch has its old value again after each step."""
    configs = pytest.importorskip("triton_offset_bias.backends.triton.configs", reason="Triton is not installed")
    with PROVIDERS["ours_atomics"].context():
        assert configs.gathering() == "elements"
    assert configs.gathering() == "diagonals"


def test_the_device_decides_what_is_measured():
    """A GPU gets every length, head dim, clamp and mask.

    A CPU gets none of these cases unless the command line asks.
    """
    on_gpu = plans_of(make_parser().parse_args(["--device", "cuda"]))
    assert {plan.suite for plan in on_gpu} == {"gpu"}
    assert [plan.case for plan in on_gpu] == GPU_CASES
    combinations = {(case.length, case.head_dim, case.clamp, case.is_causal) for case in GPU_CASES}
    assert len(combinations) == len(GPU_CASES) == 7 * 2 * 2 * 2
    on_cpu = plans_of(make_parser().parse_args([]))
    assert {plan.suite for plan in on_cpu} == set(SUITES) - {"gpu", "models"}
    asked = plans_of(make_parser().parse_args(["--suite", "gpu", "--case", "h8_l1024"]))
    assert [(plan.suite, plan.case) for plan in asked] == [("gpu", CASES["h8_l1024"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], r"argument --device: torch .* finds \d+ GPUs, none is cuda:99"),
        (["--device", "cpu:0"], "argument --device: must be cpu, cuda or cuda:N, got cpu:0"),
        (
            ["--case", "l512_d64"],
            "no suite measures these cases, modes and providers by default: name one with --suite",
        ),
        (["--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N, got tpu"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message, capsys, tmp_path):
    """The message is one line. It comes before anything is measured."""
    with pytest.raises(SystemExit):
        main([*arguments, "--output", str(tmp_path / "out.csv")])
    assert re.search(f"error: {message}$", capsys.readouterr().err.strip())


def test_throughput_is_drawn_over_the_length(tmp_path):
    """There is a panel for each mode and each kind of case, and a line for each provider."""
    maker = RowMaker("cpu")
    cases = [case for case in GPU_CASES if case.length <= 1024]
    rows = [
        maker.make(case, name, mode, "throughput", "TFLOP/s", np.array([case.length / 10.0]), 1)
        for case in cases
        for name in ("ours", "flash_attn")
        for mode in (FORWARD, BOTH)
    ]
    write_rows(tmp_path / "gpu.csv", rows, keep_others=False)
    figure = draw_throughput(read_results(tmp_path / "gpu.csv"))
    assert len(figure.axes) == 2 * 8
    titles = {ax.get_title() for ax in figure.axes}
    assert {"", "D=64", "D=64, causal", "D=128, table of +-128, causal"} < titles
    assert len(titles) == 1 + 8
    assert [ax.get_xlabel() for ax in figure.axes] == [""] * 8 + ["sequence length L"] * 8
    for ax in figure.axes:
        assert [line.get_xydata().tolist() for line in ax.lines] == [[[512, 51.2], [1024, 102.4]]] * 2
