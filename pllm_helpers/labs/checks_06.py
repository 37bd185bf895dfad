"""Checks for the exercises of notebook 06."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .checks import passed, probe

__all__ = ["check_best_epsilon", "check_mezo_step", "check_tuning_bytes"]


def check_mezo_step(function: Callable[..., Any]) -> None:
    """``function(theta, z, loss, epsilon, lr)``: the weights after one MeZO step, ``theta`` itself unchanged."""

    def loss(w: np.ndarray) -> float:
        w = np.asarray(w, dtype=float)
        return float(3 * w[0] + (w[0] + 2 * w[1]) ** 2 + w[2] ** 3 + 0.5)

    theta, z, epsilon, lr = np.array([0.4, -0.3, 0.8]), np.array([1.0, -2.0, 0.5]), 0.1, 0.03
    up, down, here = loss(theta + epsilon * z), loss(theta - epsilon * z), loss(theta)
    g = (up - down) / (2 * epsilon)
    right = theta - lr * g * z
    probe(
        function,
        (theta, z, loss, epsilon, lr),
        right,
        {
            "The weights were not restored: the step starts at theta - epsilon z, where the second probe was.": (
                right - epsilon * z
            ),
            "Restored once too often: the step starts at theta + epsilon z. From theta - epsilon z it is one epsilon z "
            "back, not two.": right + epsilon * z,
            "The way from the first probe to the second is 2 epsilon z; then one epsilon z back to theta.": (
                theta + epsilon * z - lr * (up - here) / (2 * epsilon) * z
            ),
            "The step goes uphill: subtract lr g z.": theta + lr * g * z,
            "Divide by 2 epsilon: that is how far apart the probes are.": theta - lr * (up - down) / epsilon * z,
            "The difference of the losses is not divided by 2 epsilon: g is a slope.": theta - lr * (up - down) * z,
            "That is the one-sided estimate (up and here): probe on both sides.": theta
            - lr * (up - here) / epsilon * z,
            "The step is epsilon long: it must be lr g z.": theta - epsilon * g * z,
            "The step does not follow z: move along lr g z, not by the number lr g.": theta - lr * g,
            "The weights are as they were: the step is missing.": theta,
            "That is the slope g itself: give back the weights after the step.": np.array(g),
            "That is the estimate g z itself: give back the weights after the step.": g * z,
        },
        otherwise="theta + epsilon z, theta - epsilon z, back to theta, then theta - lr g z with the slope g.",
    )
    passed("mezo_step")


def check_tuning_bytes(function: Callable[..., Any]) -> None:
    """``function(parameters, method)``: bytes that grow with the model, fp32; ``"adam"``, ``"sgd"``, ``"mezo"``."""
    n = 1_000_003
    wrong = {
        "adam": {
            "Adam keeps two running means beside weights and gradients: 4 numbers per weight, not 3.": 12 * n,
            "These are the two running means alone: weights and gradients count, too.": 8 * n,
            "These are the weights alone: gradients and the two running means count, too.": 4 * n,
            "These are numbers of one weight, not bytes: fp32 takes 4 bytes a number.": float(n),
            "A number of fp32 takes 4 bytes, not 8.": 32 * n,
        },
        "sgd": {
            "Plain SGD has no running means: weight and gradient only.": 16 * n,
            "One running mean too many: plain SGD has none.": 12 * n,
            "The gradient is missing: SGD needs one per weight.": 4 * n,
        },
        "mezo": {
            "MeZO has no gradient, and z is not stored: two losses and a seed replace them.": 8 * n,
            "MeZO has neither gradients nor running means: the weights are all.": 16 * n,
            "The second probe needs no second copy: the same weights walk there.": 12 * n,
        },
    }
    expected = {"adam": 16 * n, "sgd": 8 * n, "mezo": 4 * n}
    for method, right in expected.items():
        probe(
            function,
            (n, method),
            right,
            wrong[method],
            tolerance=1e-9,
            otherwise="Count numbers per weight: the weight, its gradient, what the optimiser keeps; 4 bytes each.",
        )
    passed("tuning_bytes")


def check_best_epsilon(function: Callable[..., Any]) -> None:
    """``function(rounding, bend)``: the epsilon with the smallest ``rounding / epsilon + bend * epsilon ** 2``."""
    rounding, bend = 3e-7, 0.02
    best = (rounding / (2 * bend)) ** (1 / 3)
    probe(
        function,
        (rounding, bend),
        best,
        {
            "There both parts are equal; the sum is smallest where its derivative is zero: a factor of 2 is missing.": (
                rounding / bend
            )
            ** (1 / 3),
            "The cube root is missing: -r / epsilon**2 + 2 b epsilon = 0 gives epsilon**3.": rounding / (2 * bend),
            "A cube root, not a square root: the derivative of 1 / epsilon is -1 / epsilon**2.": np.sqrt(
                rounding / (2 * bend)
            ),
            "Upside down: much rounding wants a larger epsilon, a strong bend a smaller one.": (2 * bend / rounding)
            ** (1 / 3),
            "The factor 2 belongs to the bend: (r / 2b), not (2r / b).": (2 * rounding / bend) ** (1 / 3),
            "That is the smallest error, not the epsilon where it is reached.": rounding / best + bend * best**2,
            "Differentiate again: the derivative of b epsilon**2 is 2 b epsilon, not 3 b epsilon.": (
                rounding / (3 * bend)
            )
            ** (1 / 3),
        },
        otherwise="Set the derivative to zero: -rounding / epsilon**2 + 2 * bend * epsilon = 0.",
    )
    probe(
        function,
        (16 * rounding, 2 * bend),
        2 * best,
        {"A fixed epsilon cannot be right: it depends on rounding and bend.": best},
        otherwise="Check the powers of rounding and bend: eight times the ratio makes epsilon twice as large.",
    )
    passed("best_epsilon")
