"""KERPLE's numbers are positive, are drawn as the authors draw them, and can be set and read."""

import pytest
import torch

from triton_offset_bias.modules import ALiBiBias, KerpleBias, alibi_slopes


def test_kerple_stays_positive_whatever_training_does():
    """Gradients may push the raw parameters anywhere; the exponent of "power" stays below its bound as well."""
    for kind, highest in (("log", float("inf")), ("power", 2.0)):
        bias = KerpleBias(4, kind)
        with torch.no_grad():
            for raw in bias.parameters():
                raw.copy_(torch.tensor([-15.0, -1.0, 1.0, 15.0]))
        assert (bias.r1 > 0).all()
        assert (bias.r2 > 0).all()
        assert (bias.r2 <= highest).all()
        table = bias(0, 30)
        table.sum().backward()
        assert (table <= 0).all()
        assert (table.diff() <= 0).all()
        assert all(raw.grad.isfinite().all() for raw in bias.parameters())


@pytest.mark.parametrize(("kind", "highest"), [("log", (2.0, 1.0)), ("power", (1.0, 2.0))])
def test_kerple_starts_where_its_authors_do(kind, highest):
    """Values are uniform between 0 and the authors' ends.

    Their mean is half way, and they fill the range to within 0.01.
    """
    bias = KerpleBias(20000, kind)
    for values, end in zip((bias.r1, bias.r2), highest, strict=True):
        assert 0.0099 < values.min() < 0.012 * end + 0.01
        assert end - 0.02 < values.max() < end
        assert abs(values.mean() - end / 2) < 5 * end / (12 * 20000) ** 0.5


@pytest.mark.parametrize(("kind", "r2"), [("log", [0.02, 1.0, 30.0]), ("power", [0.02, 1.0, 1.99])])
def test_kerple_takes_the_numbers_of_a_trained_model(kind, r2):
    """The values that are read equal the values that were set."""
    bias = KerpleBias(3, kind)
    bias.set_values(torch.tensor([0.01, 1.0, 7.0]), torch.tensor(r2))
    torch.testing.assert_close(bias.r1, torch.tensor([0.01, 1.0, 7.0]))
    torch.testing.assert_close(bias.r2, torch.tensor(r2))


def test_kerple_power_of_one_is_alibi():
    """The factors r1 are ALiBi's slopes."""
    bias = KerpleBias(5, "power")
    bias.set_values(alibi_slopes(5), torch.ones(5))
    torch.testing.assert_close(bias(-9, 50), ALiBiBias(5)(-9, 50))
