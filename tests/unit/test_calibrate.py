"""Calibration against scikit-learn and scipy, and that it keeps the order of scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from sklearn.isotonic import IsotonicRegression

from rechub_dist.metrics.binary import binary_metrics
from rechub_dist.metrics.calibrate import Curve, Method, Temperature, fit
from rechub_dist.metrics.metric import Scored
from rechub_dist.metrics.multiclass import ClassLogLoss
from rechub_dist.objectives.calibrated import Calibrator


def overconfident(rows: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities whose log odds are 2.5 times too large, labels and weights."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(-1, 1.2, rows)
    labels = (draw.random(rows) < 1 / (1 + np.exp(-logits))).astype(float)
    return (1 / (1 + np.exp(-2.5 * logits))).astype(np.float32), labels, draw.integers(0, 3, rows).astype(float)


def test_the_temperature_is_that_of_an_optimizer() -> None:
    p, y, w = overconfident()
    logits = np.log(np.clip(p.astype(float), 1e-7, 1 - 1e-7)) - np.log1p(-np.clip(p.astype(float), 1e-7, 1 - 1e-7))
    wanted = minimize_scalar(
        lambda t: w @ (np.logaddexp(0, logits / t) - y * logits / t), bounds=(0.1, 20), options={"xatol": 1e-9}
    ).x
    found = fit("temperature", p, y, w)
    assert isinstance(found, Temperature)
    assert found.temperature == pytest.approx(wanted, rel=1e-5)
    assert wanted == pytest.approx(2.5, rel=0.05)


def test_the_temperature_of_several_classes_is_that_of_an_optimizer() -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(0, 1.5, (20_000, 4))
    y = (softmax(logits, axis=1).cumsum(axis=1) < draw.random(20_000)[:, None]).sum(axis=1).clip(max=3).astype(float)
    p, w = softmax(2.5 * logits, axis=1).astype(np.float32), draw.integers(0, 3, 20_000).astype(float)
    logs = np.log(p.astype(float))

    def loss(t: float, rows: slice) -> float:
        own = (logs / t)[np.arange(len(y)), y.astype(int)]
        return float(w[rows] @ (logsumexp(logs / t, axis=1) - own)[rows])

    fitted, held = slice(0, 10_000), slice(10_000, None)
    wanted = minimize_scalar(lambda t: loss(t, fitted), bounds=(0.1, 20), options={"xatol": 1e-9}).x
    found = fit("temperature", p[fitted], y[fitted], w[fitted])
    assert isinstance(found, Temperature)
    assert found.temperature == pytest.approx(wanted, rel=1e-5)
    assert wanted == pytest.approx(2.5, rel=0.05)
    calibrated = Calibrator(found)(torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(calibrated, softmax(logs / wanted, axis=1), atol=1e-6)
    np.testing.assert_array_equal(calibrated.argmax(axis=1), p.argmax(axis=1))
    before, after = ClassLogLoss(4), ClassLogLoss(4)
    before.update(Scored(p[held], y[held], w[held], {}))
    after.update(Scored(calibrated[held], y[held], w[held], {}))
    assert after.compute() < before.compute() - 0.05
    # Two classes are the one probability.
    p, y, w = overconfident(800)
    one, two = fit("temperature", p, y, w), fit("temperature", np.stack([1 - p, p], axis=1), y, w)
    assert two.temperature == pytest.approx(one.temperature, rel=1e-5)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="look at its AUC first"):
        fit("temperature", np.full((3, 4), 0.25), np.array([0, 1, 3]), np.ones(3))


def test_the_steps_are_those_of_scikit_learn() -> None:
    p, y, w = overconfident(800)  # as many groups as there are scores
    p[:100] = p[100:200]  # ties
    p = p.astype(float)
    found = fit("isotonic", p, y, w)
    assert isinstance(found, Curve)
    there = w > 0
    fitted = IsotonicRegression(out_of_bounds="clip").fit(p[there], y[there], sample_weight=w[there])
    fitted = fitted.predict(p[there]).round(9)
    middles = {value: np.average(p[there][fitted == value], weights=w[there][fitted == value]) for value in set(fitted)}
    wanted = sorted(middles)
    np.testing.assert_allclose(found.probabilities, np.clip(wanted, 1e-7, 1 - 1e-7), atol=1e-7)
    np.testing.assert_allclose(found.scores, [middles[value] for value in wanted], atol=1e-7)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_it_mends_what_it_is_for(method: Method) -> None:
    p, y, w = overconfident()
    calibrator = Calibrator(fit(method, p[:10_000], y[:10_000], w[:10_000]))
    held = slice(10_000, None)
    calibrated = calibrator(torch.from_numpy(p)).numpy()
    before, after = (binary_metrics(values[held], y[held], w[held]) for values in (p, calibrated))
    assert after["log_loss"] < before["log_loss"] - 0.05
    assert after["auc"] == pytest.approx(before["auc"], abs=2e-4)
    curve = calibrator(torch.linspace(0, 1, 1001))
    assert (curve.diff() >= 0).all()
    assert ((curve > 0) & (curve < 1)).all()
    assert calibrator(torch.tensor([torch.nan])).isnan().all()
    assert calibrator(torch.zeros(0)).shape == (0,)


def test_the_module_is_the_curve() -> None:
    curve = Curve(np.array([0.2, 0.5, 0.9]), np.array([0.1, 0.6, 0.7]))
    p = np.linspace(0, 1, 101, dtype=np.float32)
    found = Calibrator(curve)(torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(found, np.interp(p, curve.scores, curve.probabilities), atol=1e-6)
    assert Calibrator(Curve(np.array([0.2]), np.array([0.4])))(torch.tensor([0.1, 0.9])).tolist() == pytest.approx(
        [0.4] * 2
    )


def test_no_temperature_turns_the_order_round() -> None:
    """Here the search for one had no end."""
    p, y, w = overconfident(800)
    with pytest.raises(ValueError, match="look at its AUC first"):
        fit("temperature", 1 - p, y, w)
    with pytest.raises(ValueError, match="look at its AUC first"):
        fit("temperature", np.full_like(p, 0.5), y, w)


def test_one_class_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="one class only"):
        fit("temperature", np.full(3, 0.5), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="one class only"):
        fit("isotonic", np.full(3, 0.5), np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="NaN"):
        fit("isotonic", np.array([0.1, np.nan]), np.array([0.0, 1.0]), np.ones(2))
