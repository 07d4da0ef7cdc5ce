import json
import math

import pytest

from stylewright.training.cli.app import run


def figures(capsys, *arguments: str) -> dict:
    assert run(["density", "--json", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)  # fails if anything else is printed


def normal_share(x: float, mu: float, sigma: float) -> float:
    return (1 + math.erf((x - mu) / sigma / math.sqrt(2))) / 2


@pytest.mark.parametrize(("mu", "sigma"), [(-6.0, 2.0), (-6.0, 3.0), (0.0, 2.0)])
def test_shares_and_quantiles_of_a_normal_law(capsys, mu, sigma):
    result = figures(capsys, "--mu", str(mu), "--sigma", str(sigma), "--below", "-6.52", "--below", "-8.89")
    assert result["below"] == pytest.approx(
        {x: normal_share(float(x), mu, sigma) for x in ("-6.52", "-8.89")}, rel=1e-6
    )
    assert result["style_window"] == {"below": -6.52, "share": result["below"]["-6.52"]}
    for quantile in result["quantiles"]:
        assert normal_share(quantile["log_snr"], mu, sigma) == pytest.approx(quantile["share"], rel=1e-4)
        assert quantile["t"] == pytest.approx(1 / (1 + math.exp(quantile["log_snr"] / 2)), rel=1e-5)


def test_mean_time_has_the_right_direction(capsys):
    """The reference's table: 0.931 for N(-6, 2^2); a reversed mapping would give 0.069."""
    assert figures(capsys, "--mu", "-6", "--sigma", "2")["mean_t"] == pytest.approx(0.9307, abs=1e-4)
    assert figures(capsys, "--mu", "0", "--sigma", "2")["mean_t"] == pytest.approx(0.5, abs=1e-6)


def test_a_family_truncates_the_law(capsys):
    """On SD1.5 62 % of N(-6, 2^2) lies below the range; the rest is conditioned on it."""
    result = figures(capsys, "--mu", "-6", "--sigma", "2", "--family", "sd15", "--below", "-6.52", "--below", "-4")
    low, high = result["density"]["low"], result["density"]["high"]
    assert (low, high) == pytest.approx((-5.364, 7.069), abs=1e-3)
    below, up_to, four = (normal_share(x, -6, 2) for x in (low, high, -4))
    assert result["below"]["-6.52"] == 0
    assert result["below"]["-4"] == pytest.approx((four - below) / (up_to - below), rel=1e-6)


def test_reference_tokens_carry_the_law(capsys):
    """From 4096 tokens to 64 the mean moves by 2 log 8."""
    result = figures(capsys, "--mu", "-6", "--sigma", "2", "--reference-tokens", "4096", "--tokens", "64")
    median = next(q["log_snr"] for q in result["quantiles"] if q["share"] == 0.5)
    assert median == pytest.approx(-6 + 2 * math.log(8), abs=1e-5)


def test_text_says_the_same(capsys):
    assert run(["density", "--mu", "-6", "--sigma", "2", "--below", "-8.89"]) == 0
    printed = capsys.readouterr().out
    assert "mean t 0.9307" in printed
    assert "P(log_snr < -8.89) = 0.0742" in printed
    assert "39.7 % of the draws" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "nix"], ["nix", "style-friendly"]),
        (["--family", "nix"], ["nix", "sdxl"]),
        (["--sigma", "-1"], ["sigma", "-1"]),
        (["--preset", "uniform", "--mu", "1"], ["uniform", "mu"]),
        (["--reference-tokens", "0"], ["0"]),
        (["--mu", "900", "--family", "sd15"], ["range"]),
    ],
)
def test_errors_name_the_value(capsys, arguments, words):
    assert run(["density", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("stylewright: ")
    assert all(word in printed.err for word in words)
