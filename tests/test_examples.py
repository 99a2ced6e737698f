"""The examples: what they state about their models, and a short run of each from its command line to its picture."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import chronos_co2
import gated_bytes
import length_generalization
import swin_windows
from _byte_model import ByteTransformer
from _length_plot import LABEL_GAP, spread
from _window_model import WindowAttention

from triton_offset_bias import offset_bias_attention

pytestmark = pytest.mark.cpu_only


def _assert_is_a_picture(path: Path) -> None:
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] > pixels.shape[0] > 500
    assert 0.02 < (pixels < 0.9).any(-1).mean() < 0.9


def _windows_by_place(side: int, window: int, shift: int) -> torch.Tensor:
    """True for pixels that share a window, by their places, with windows moved by `shift`: (S**2, S**2) bool."""
    strip = (torch.arange(side) - shift).div(window, rounding_mode="floor")
    row, column = strip.repeat_interleave(side), strip.repeat(side)
    return (row[:, None] == row) & (column[:, None] == column)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("side", "window", "shift"), [(8, 4, 0), (8, 4, 2), (9, 3, 1), (4, 4, 2)])
def test_attention_in_windows_is_dense_attention_masked_by_place(side, window, shift, with_bias):
    """Output and gradients equal those of SDPA over all pixels.

    A window that the image's edge cuts sees nothing across it.
    """
    layer = WindowAttention(6, 2, side, window, shift, with_bias)
    x = torch.randn(2, side, side, 6, requires_grad=True)
    mask = torch.zeros(2, side**2, side**2).masked_fill(~_windows_by_place(side, window, shift), -torch.inf)
    if with_bias:
        table = torch.nn.init.normal_(layer.bias.relative_position_bias_table)
        row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        drow, dcolumn = ((place[:, None] - place).clamp(1 - window, window - 1) for place in (row, column))
        mask = mask + table[(drow + window - 1) * (2 * window - 1) + dcolumn + window - 1].permute(2, 0, 1)
    q, k, v = layer.qkv_proj(x.flatten(1, 2)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = layer.out_proj(dense.transpose(1, 2).flatten(2)).unflatten(1, (side, side))
    sources = [x, *layer.parameters()]
    cotangent = torch.randn_like(expected)
    got = layer(x)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad(out, sources, cotangent, retain_graph=True) for out in (got, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_window_models_start_equal():
    """The bias starts at 0 and draws no random number. Before training the two models are one function."""
    args = swin_windows.parse_args(["--device", "cpu"])
    models = [swin_windows.build_model(args, seed=3, with_bias=with_bias) for with_bias in (True, False)]
    assert len(models[0].biases()) == swin_windows.NUM_LAYERS
    assert models[1].biases() == []
    images = torch.randint(17, (3, 8, 8))
    assert torch.equal(models[0](images), models[1](images))
    assert not torch.equal(models[0](images), models[0](images.flip(1)))


def test_the_window_model_learns_a_few_digits_by_heart():
    """The loss falls far below the loss of guessing, ln 10 = 2.3 nats.

    Every layer's bias moves. Most digits come out right.
    """
    args = swin_windows.parse_args(["--epochs", "50", "--batch", "20", "--width", "16", "--device", "cpu"])
    images, labels = (part[:20] for part in swin_windows.load_data("cpu")[:2])
    model = swin_windows.build_model(args, seed=0, with_bias=True)
    run = swin_windows.train("test", model, swin_windows.Digits(images, labels, images, labels), args, seed=0)
    assert run["loss"].iloc[0] > 2
    assert run["loss"].iloc[-1] < 1
    assert run["accuracy"].iloc[-1] == 100 * (model(images).argmax(1) == labels).float().mean() > 60
    assert all(bias.relative_position_bias_table.abs().max() > 0.1 for bias in model.biases())


def test_the_digits_are_split_evenly_and_none_is_in_both_parts():
    """The parts hold all 1797 digits. Every class has about the same share of both parts."""
    digits = swin_windows.load_data("cpu")
    assert (len(digits.images), len(digits.test_images)) == (1257, 540)
    images = torch.cat([digits.images, digits.test_images])
    assert images.shape[1:] == (8, 8)
    assert images.flatten(1).unique(dim=0).shape[0] == 1797
    assert (images.min(), images.max()) == (0, 16)
    shares = [labels.bincount() / len(labels) for labels in (digits.labels, digits.test_labels)]
    torch.testing.assert_close(*shares, rtol=0, atol=0.002)


def test_the_windows_example_tabulates_and_draws(tmp_path, capsys, monkeypatch):
    """On few digits, every run is in the table, the table is printed, and the picture is there."""
    few = swin_windows.Digits(*(part[:64] for part in swin_windows.load_data("cpu")))
    monkeypatch.setattr(swin_windows, "load_data", lambda device: few)
    output = tmp_path / "new" / "windows.png"
    options = ["--epochs", "3", "--seeds", "2", "--width", "16", "--device", "cpu"]
    table = swin_windows.main([*options, "--output", str(output)])
    assert list(table.index) == [swin_windows.WITH_BIAS, swin_windows.WITHOUT]
    assert list(table.columns) == ["parameters", "of the biases", "seed 0", "seed 1", "mean"]
    assert list(table["of the biases"]) == [4 * 4 * 7**2, 0]
    assert table["parameters"].diff().iloc[1] == -4 * 4 * 7**2
    assert table["mean"].tolist() == pytest.approx(table[["seed 0", "seed 1"]].mean(axis=1).tolist())
    assert table["mean"].between(1, 99).all()
    assert table.to_string(float_format="{:.1f}".format) in capsys.readouterr().out
    _assert_is_a_picture(output)


def test_a_table_that_is_zero_beyond_is_what_the_function_calls_so():
    """Output and gradients are compared, for twice as many bytes as the table has offsets."""
    bias = length_generalization.ZeroBeyond(2, 5, bidirectional=False)
    torch.nn.init.normal_(bias.weight)
    q, k, v = torch.randn(3, 1, 2, 10, 4)
    got = offset_bias_attention(q, k, v, bias(0, 9), is_causal=True, bias_origin=0, beyond="error")
    expected = offset_bias_attention(q, k, v, bias.weight, is_causal=True, bias_origin=0, beyond="zero")
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), bias.weight)[0] for out in (got, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("length", "predicted"), [(4, 4), (9, 4), (9, 1)])
def test_evaluation_predicts_the_last_bytes_from_the_length_before_them(length, predicted):
    """The truth are the model's probabilities byte by byte, each from a context of its own."""
    model = ByteTransformer(8, 2, 1, None)
    windows = torch.randint(256, (3, 13))
    bits = []
    for window in windows:
        for target in range(13 - predicted, 13):
            context = window[13 - 1 - length : target]
            bits.append(-model(context[None])[0, -1].log_softmax(0)[window[target]].item() / torch.tensor(2.0).log())
    got = length_generalization.evaluate(model, windows, length, predicted)
    assert got == pytest.approx(float(sum(bits)) / len(bits), abs=1e-5)


def test_the_byte_models_start_equal():
    """Drawing a bias's initial values changes nothing else."""
    args = length_generalization.parse_args(["--device", "cpu", "--seed", "3"])
    models = [length_generalization.build_model(args, variant) for variant in length_generalization.VARIANTS.values()]
    expected = {name: p for name, p in models[-1].named_parameters() if "bias." not in name}
    assert len(expected) > 4 * 10
    for model in models:
        others = {name: p for name, p in model.named_parameters() if name in expected}
        assert others.keys() == expected.keys()
        assert all(torch.equal(others[name], p) for name, p in expected.items())


def test_the_length_example_learns_and_draws(tmp_path, capsys):
    """After a few steps every bias is in the table, the losses are below 8 bits, and the picture is there."""
    output = tmp_path / "new" / "lengths.png"
    options = ["--length", "16", "--batch", "16", "--width", "16", "--steps", "25", "--windows", "2", "--device", "cpu"]
    table = length_generalization.main([*options, "--output", str(output)])
    parameters = {"T5": 256, "ALiBi": 0, "KERPLE": 16, "FIRE": 2 + 2 * 32 + 33 * 8, "none": 0}
    parameters = {"OffsetBias, clamp": 8 * 16, "OffsetBias, zero": 8 * 16} | parameters
    assert table["bias", "parameters"].to_dict() == parameters
    assert list(table["bits per byte"].columns) == [16, 32, 64, 128]
    assert (table["bits per byte"] < 6).all(axis=None)
    assert table["perplexity per byte"].equals(2 ** table["bits per byte"])
    clamp, zero = (table.loc[f"OffsetBias, {beyond}", "bits per byte"] for beyond in ("clamp", "zero"))
    assert clamp[16] == zero[16]
    assert (clamp[[32, 64, 128]] != zero[[32, 64, 128]]).all()
    assert table.to_string(float_format="{:.2f}".format) in capsys.readouterr().out
    _assert_is_a_picture(output)


def test_chronos_learns_the_same_both_ways_and_draws(tmp_path, capsys):
    """The losses and forecasts of both attentions agree. A repeated year is about 1 ppm off."""
    output = tmp_path / "new" / "co2.png"
    table = chronos_co2.main(["--steps", "6", "--batch", "4", "--output", str(output)])
    assert list(table.index) == [chronos_co2.EAGER, chronos_co2.OURS, chronos_co2.REPEATED]
    columns = ["first loss", "last loss", "error (ppm)", "in 10-90 % (%)"]
    eager, ours = (table.loc[name, columns].tolist() for name in (chronos_co2.EAGER, chronos_co2.OURS))
    assert ours[:3] == pytest.approx(eager[:3], rel=1e-3)
    assert ours[1] < ours[0]
    assert table.loc[chronos_co2.REPEATED, "error (ppm)"] == pytest.approx(1.02, abs=0.01)
    assert table.to_string(na_rep="-", float_format="{:.3f}".format) in capsys.readouterr().out
    _assert_is_a_picture(output)


@pytest.mark.parametrize(
    "heights", [[0.5], [0.2, 0.9, 0.6], [0.5, 0.51, 0.49, 0.5], [1.0, 0.99, 0.0, 0.01], [0.4, 0.43, 0.53, 0.58, 0.3]]
)
def test_labels_move_apart_keep_their_order_and_stay_inside(heights):
    """Labels that have room stay where they are."""
    moved = torch.tensor(spread(heights), dtype=torch.float64)
    order = torch.tensor(heights).argsort(stable=True)
    assert (moved[order].diff() > LABEL_GAP - 1e-9).all()
    assert ((moved > LABEL_GAP / 2 - 1e-9) & (moved < 1 - LABEL_GAP / 2 + 1e-9)).all()
    if heights == [0.2, 0.9, 0.6]:
        assert moved.tolist() == heights


def test_kinds_of_bytes_tell_indentation_from_other_spaces():
    """A space after a space or a line's end is indentation."""
    masks = gated_bytes.kind_masks(torch.tensor([list(b"\n  a b_1.")]))
    found = {name: mask[0].nonzero().flatten().tolist() for name, mask in masks.items()}
    assert found["indentation"] == [1, 2]
    assert found["space in a line"] == [4]
    assert (found["letter"], found["line end"], found["dot"]) == ([3, 5], [0], [8])
    assert sum(mask.sum() for mask in masks.values()) == 9


def test_the_gated_example_tabulates_and_draws(tmp_path, capsys):
    """Both models begin equal, the gated one has the parameters of its gates more, and its gates differ by byte."""
    args = gated_bytes.parse_args(["--width", "16", "--length", "32", "--device", "cpu"])
    gated, plain = (gated_bytes.build_model(args, is_gated) for is_gated in (True, False))
    tokens = torch.randint(256, (2, 32))
    torch.testing.assert_close(gated(tokens), plain(tokens))
    assert gated.all_gates(tokens).unique().tolist() == [1.0]
    more = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == gated_bytes.NUM_LAYERS * gated_bytes.NUM_HEADS * (16 + 1)
    output = tmp_path / "gated.png"
    options = ["--steps", "4", "--width", "16", "--length", "64", "--batch", "2", "--device", "cpu"]
    gates = gated_bytes.main([*options, "--output", str(output)])
    assert gates.shape == (len(gated_bytes.kinds_of_bytes()) + 2, gated_bytes.NUM_LAYERS * gated_bytes.NUM_HEADS)
    assert gates.to_numpy().std() > 0
    assert gates.to_string(float_format="{:.2f}".format) in capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")


BAD_ARGUMENTS = {
    "a width that heads do not divide": (swin_windows, ["--width", "6"], "`--width` must be a multiple of 4, got 6"),
    "no epochs": (swin_windows, ["--epochs", "0"], "`--epochs` must be at least 1, got 0"),
    "no picture": (length_generalization, ["--output", "x.txt"], "`--output` must be a .png file, got x.txt"),
    "a length of one": (length_generalization, ["--length", "1"], "`--length` must be at least 2, got 1"),
    "no steps": (chronos_co2, ["--steps", "0"], "`--steps` must be at least 1, got 0"),
    "no folder": (length_generalization, ["--text-dir", "/nowhere"], "`--text-dir` must be a directory, got /nowhere"),
}


@pytest.mark.parametrize(("example", "options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_ends_the_program_and_is_named(example, options, message, capsys):
    """The program ends before anything is trained, with an exit status that tells of failure."""
    with pytest.raises(SystemExit) as stopped:
        example.main(options)
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
