"""The benchmark measures whole models beside the same models with their own attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import readme
from bench.__main__ import make_parser, plans_of
from bench.case import BOTH, FORWARD, ModelCase
from bench.cases import CASES
from bench.models import ATTENTIONS, MODELS, model_steps
from bench.providers import PROVIDERS
from bench.report import model_requirements, print_requirements, read_results
from bench.rows import RowMaker, write_rows
from bench.suites import Plan, measure
from bench.timing import Effort

TINY_MODEL = ModelCase("tiny", 2, 12, 16, 64, model="mpnet", is_padded=True)


def test_a_model_is_measured_beside_itself_with_its_own_attention(capsys):
    """MPNet has no SDPA, and the suite says so."""
    plan = Plan("models", TINY_MODEL, (FORWARD, BOTH), ("ours", "own_eager", "own_sdpa"), "cpu", 1, Effort(3, 0.0))
    rows = list(measure(plan, RowMaker("cpu")))
    found = {(row.provider, row.mode, row.metric) for row in rows}
    assert found == {(p, m, x) for p in ("ours", "own_eager") for m in (FORWARD, BOTH) for x in ("time", "ratio")}
    assert "own_sdpa is absent: MPNet has eager attention only" in capsys.readouterr().out


def test_a_model_that_computes_something_else_is_not_measured(monkeypatch):
    """Outputs and gradients are compared before anything is timed."""
    subject = MODELS["mpnet"]

    def build(attention):
        model = subject.build(attention)
        with torch.no_grad():
            if attention == "ours":
                model.encoder.relative_attention_bias.weight += torch.linspace(0, 9, 32)[:, None]
        return model

    monkeypatch.setitem(MODELS, "mpnet", replace(subject, build=build))
    with pytest.raises(ArithmeticError, match="a result differs from the model's own by"):
        model_steps(TINY_MODEL, ("ours", "own_eager"), (FORWARD,))


def test_models_and_attentions_have_cases_and_providers_of_their_own():
    """The suite of models is measured where it is named."""
    plans = plans_of(make_parser().parse_args(["--suite", "models", "speed"]))
    for plan in plans:
        assert isinstance(plan.case, ModelCase) == (plan.suite == "models")
        assert set(plan.providers) <= set(ATTENTIONS if plan.suite == "models" else PROVIDERS)
    assert {plan.suite for plan in plans} == {"models", "speed"}


def test_models_have_requirements_of_their_own(tmp_path, capsys):
    """A model is compared with the faster of its own attentions."""
    maker = RowMaker("cpu")
    case = CASES["t5_encoder_b8_l384"]
    ratios = {"ours": 1.0, "own_eager": 2.0, "own_sdpa": 1.1}
    rows = [maker.make(case, name, FORWARD, "ratio", "x", np.array([x]), 1) for name, x in ratios.items()]
    write_rows(tmp_path / "models.csv", rows, keep_others=False)
    results = read_results(tmp_path / "models.csv")
    found = {(x.case, x.what.partition(" ")[0]): x.value(results) for x in model_requirements()}
    assert found[case.name, FORWARD] == pytest.approx(1.1)
    assert all(np.isnan(value) for key, value in found.items() if key != (case.name, FORWARD))
    assert {name for name, _ in found} <= set(CASES)
    print_requirements(results)
    line = next(line for line in capsys.readouterr().out.splitlines() if f" {case.name} " in line)
    assert line.split()[-4:] == [">=", "1.2", "1.10", "NO"]


def test_pages_compare_models_with_the_faster_of_their_own_attentions(tmp_path):
    """A row has a dash where a model was not measured. Threads have rows of their own."""
    maker = RowMaker("cpu")
    ratios = {"own_eager": 2.0, "own_sdpa": 1.1}
    shown = (("swin_t", FORWARD, 1, 1.0), ("swin_t_bf16", BOTH, 1, 2.0), ("sentences", FORWARD, 2, 3.0))
    rows = [
        maker.make(CASES[case], name, mode, "ratio", "x", np.array([x * factor]), threads)
        for case, mode, threads, factor in shown
        for name, x in ratios.items()
    ]
    write_rows(tmp_path / "models.csv", rows, keep_others=False)
    table = readme._models_table(read_results(tmp_path / "models.csv")).splitlines()
    assert table[0] == "| | inference, float32 | training, float32 | inference, bfloat16 | training, bfloat16 |"
    assert table[2:] == [
        "| the same with two threads | 3.30 | - | - | - |",
        "| timm's Swin-T, 4 images | 1.10 | - | - | 2.20 |",
    ]
    assert {f"{case}{end}" for case, _ in readme.MODELS.values() for end in ("", "_bf16")} <= set(CASES)


def test_sentences_have_lengths_like_those_of_texts():
    """The tokenizer adds two tokens to each text. Half of the sentences are shorter than 24 tokens."""
    lengths = sorted(len(text.split()) + 2 for text in MODELS["sentences"].inputs(CASES["sentences"]))
    assert (len(lengths), lengths[0], lengths[127], lengths[128], lengths[-1]) == (256, 4, 24, 24, 128)
