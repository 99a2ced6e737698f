"""Trains a small Chronos-Bolt on weekly CO2 above Mauna Loa, with `enable_offset_bias`.

    python examples/chronos_co2.py            # some minutes on two CPU cores; nothing is downloaded
    python examples/chronos_co2.py --quick    # about half a minute, too short to learn much

Chronos-Bolt is a T5 that reads patches of a time series and forecasts quantiles. statsmodels ships the series (1958 to
2001). The same model trains twice, on its eager attention and on this package, from the same start and on the same
windows, so the losses are the same. Both forecast each of the last years from the years before, beside a forecast that
repeats the last year and its growth. To fine-tune a released model instead, load one with
``BaseChronosPipeline.from_pretrained`` and pass its `inner_model` to `train`.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _training import Descent
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from matplotlib.figure import Figure
from statsmodels.datasets import co2
from torch import Tensor
from tqdm import trange
from transformers import T5Config

from triton_offset_bias.integrations.transformers import enable_offset_bias

EAGER, OURS, REPEATED = "eager attention", "this package", "last year repeated"
COLOURS = {EAGER: "#cc6677", OURS: "#332288"}
YEAR, CONTEXT, TEST_YEARS = 52, 208, 4  # weeks, weeks, years
QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
RATE = 3e-3


def load_series() -> pd.Series:
    """CO2 in parts per million by volume, a number a week; gaps of some weeks are filled linearly."""
    return co2.load_pandas().data["co2"].interpolate()


def build(name: str, seed: int) -> ChronosBoltModelForForecasting:
    """The model on eager attention or on this package; its parameters are the same."""
    torch.manual_seed(seed)
    chronos = {
        "context_length": CONTEXT,
        "prediction_length": YEAR,
        "input_patch_size": 4,
        "input_patch_stride": 4,
        "quantiles": QUANTILES,
        "use_reg_token": True,
    }
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = T5Config(
        **sizes, dropout_rate=0.0, initializer_factor=0.3, decoder_start_token_id=0, chronos_config=chronos
    )
    config._attn_implementation = "eager"
    model = ChronosBoltModelForForecasting(config)
    if name == OURS:
        enable_offset_bias(model)
    return model


def draw(series: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of a series: (batch, CONTEXT) and the year behind each, (batch, YEAR)."""
    starts = torch.randint(len(series) - CONTEXT - YEAR + 1, (batch, 1), generator=generator)
    windows = series[starts + torch.arange(CONTEXT + YEAR)]
    return windows[:, :CONTEXT], windows[:, CONTEXT:]


def train(
    model: ChronosBoltModelForForecasting, series: Tensor, name: str, batch: int, steps: int, seed: int
) -> tuple[list[float], float]:
    """Trains on random windows; the losses of the steps, and the median of a step's CPU time in milliseconds."""
    biases = [x for key, x in model.named_parameters() if "relative_attention_bias" in key]
    descent = Descent(model, biases, rate=RATE, bias_rate=10 * RATE, steps=steps, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    losses, times = [], []
    for _ in (progress := trange(steps, desc=name, unit="step")):
        context, target = draw(series, batch, generator)
        start = time.process_time()
        losses.append(descent.step(model(context=context, target=target).loss))
        times.append(1e3 * (time.process_time() - start))
        progress.set_postfix_str(f"loss {statistics.fmean(losses[-20:]):.3f}", refresh=False)
    return losses, statistics.median(times)


@torch.no_grad()
def forecast(model: ChronosBoltModelForForecasting, series: Tensor) -> Tensor:
    """Quantiles of each of the last years from the weeks before it: (quantiles, TEST_YEARS * YEAR)."""
    first = len(series) - TEST_YEARS * YEAR
    contexts = torch.stack([series[start - CONTEXT : start] for start in range(first, len(series), YEAR)])
    return model(context=contexts).quantile_preds.transpose(0, 1).flatten(1)


def repeat_last_year(series: Tensor) -> Tensor:
    """The last years, each forecast as the year before it plus that year's growth: (TEST_YEARS * YEAR,)."""
    tested = series[-(TEST_YEARS + 2) * YEAR :].unflatten(0, (-1, YEAR))
    growth = tested[1:-1].mean(1) - tested[:-2].mean(1)
    return (tested[1:-1] + growth[:, None]).flatten()


def plot(path: Path, series: pd.Series, forecasts: Tensor, losses: dict[str, list[float]], bias: Tensor) -> None:
    """Writes a PNG: the forecast of the last years, the losses, and the learned bias by offset."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(6, 4, 4))
    shown, tested = series[-(TEST_YEARS + 2) * YEAR :], series.index[-TEST_YEARS * YEAR :]
    low, median, high = forecasts[[0, len(QUANTILES) // 2, -1]].numpy()
    left.plot(shown.index, shown, color="black", linewidth=1, label="measured")
    left.plot(tested, median, color=COLOURS[OURS], linewidth=1.6, label="forecast, median")
    left.fill_between(tested, low, high, color=COLOURS[OURS], alpha=0.25, label="forecast, 10 % to 90 %")
    left.set(ylabel="CO2 (ppm)", title="Each year forecast from the weeks before it")
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        middle.plot(range(1, len(values) + 1), values, style, color=COLOURS[name], linewidth=1.4, label=name)
    middle.set(xlabel="step", ylabel="loss", yscale="log", title="Same training, same losses")
    reach = bias.shape[1] // 2
    for head, row in enumerate(bias):
        right.plot(np.arange(-reach, reach + 1), row - row.mean(), linewidth=1.4, label=f"head {head}")
    right.set(xlabel="offset (patches of 4 weeks)", ylabel="bias (nats)", title="The bias that the encoder learned")
    right.set_xlim(-CONTEXT // 4, CONTEXT // 4)
    for axes in (left, middle, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line's arguments, checked."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, help="steps of each training (default: 600; with --quick: 20)")
    add("--batch", type=int, default=16, help="windows in a step (default: 16)")
    add("--seed", type=int, default=0, help="seed of the initial values and of the windows (default: 0)")
    out = Path(__file__).parent / "out" / "chronos_co2.png"
    add("--output", type=Path, default=out, help="picture to write (default: examples/out/chronos_co2.png)")
    add("--quick", action="store_true", help="take few steps, to check that everything works")
    args = parser.parse_args(argv)
    args.steps = (20 if args.quick else 600) if args.steps is None else args.steps
    for name, minimum in {"steps": 1, "batch": 1, "seed": 0}.items():
        if getattr(args, name) < minimum:
            parser.error(f"`--{name}` must be at least {minimum}, got {getattr(args, name)}")
    if args.output.suffix != ".png":
        parser.error(f"`--output` must be a .png file, got {args.output}")
    return args


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Trains both ways, prints the table and writes the picture."""
    args = parse_args(argv)
    measured = load_series()
    series = torch.tensor(measured.to_numpy(), dtype=torch.float32)
    truth = series[-TEST_YEARS * YEAR :]
    losses, rows = {}, {}
    for name in (EAGER, OURS):
        model = build(name, args.seed)
        losses[name], milliseconds = train(model, series[: -TEST_YEARS * YEAR], name, args.batch, args.steps, args.seed)
        forecasts = forecast(model, series)
        last = statistics.fmean(losses[name][-max(1, args.steps // 10) :])
        error = float((forecasts[len(QUANTILES) // 2] - truth).abs().mean())
        inside = 100 * float(((forecasts[0] < truth) & (truth < forecasts[-1])).float().mean())
        rows[name] = [losses[name][0], last, error, inside, milliseconds]
    rows[REPEATED] = [np.nan, np.nan, float((repeat_last_year(series) - truth).abs().mean()), np.nan, np.nan]
    columns = ["first loss", "last loss", "error (ppm)", "in 10-90 % (%)", "CPU ms a step"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    print(f"\nForecasts of the last {TEST_YEARS} years, after {args.steps} steps of {args.batch} windows:")
    print(table.to_string(na_rep="-", float_format="{:.3f}".format))
    attention = model.encoder.block[0].layer[0].SelfAttention
    bias = attention.table(torch.device("cpu")).detach()
    plot(args.output, measured, forecasts, losses, bias)
    print(f"\nthe picture: {args.output}")
    return table


if __name__ == "__main__":
    main()
