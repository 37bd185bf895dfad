"""Right and wrong answers to the exercises of notebook 06; the message that each mistake must get."""

import numpy as np


def step(theta, z, loss, epsilon, lr, *, back=1.0, first=1.0, second=2.0, divide=2.0, sign=-1.0):
    """The walk as MeZO does it, with a mistake where an argument differs from its default."""
    w = theta + first * epsilon * z
    up = loss(w)
    w = w - second * epsilon * z
    down = loss(w)
    w = w + back * epsilon * z
    return w + sign * lr * (up - down) / (divide * epsilon) * z


def memory(parameters, method):
    return 4 * parameters * {"adam": 4, "sgd": 2, "mezo": 1}[method]


def best(rounding, bend):
    return (rounding / (2 * bend)) ** (1 / 3)


def in_place(theta, z, loss, epsilon, lr):
    theta += epsilon * z
    return theta


REFERENCE = {"check_mezo_step": step, "check_tuning_bytes": memory, "check_best_epsilon": best}
ALSO_RIGHT = [("check_mezo_step", lambda *a: list(step(*a)))]

WRONG = [
    ("check_mezo_step", lambda *a: step(*a, back=0.0), "not restored"),
    ("check_mezo_step", lambda *a: step(*a, back=2.0), "once too often"),
    ("check_mezo_step", lambda *a: step(*a, second=1.0), "is 2 epsilon z"),
    ("check_mezo_step", lambda *a: step(*a, sign=1.0), "uphill"),
    ("check_mezo_step", lambda *a: step(*a, divide=1.0), "Divide by 2 epsilon"),
    ("check_mezo_step", lambda t, z, f, e, lr: step(t, z, f, e, lr * 2 * e), "not divided"),
    ("check_mezo_step", lambda t, z, f, e, lr: t - lr * (f(t + e * z) - f(t)) / e * z, "one-sided"),
    ("check_mezo_step", lambda t, z, f, e, lr: step(t, z, f, e, e), "epsilon long"),
    ("check_mezo_step", lambda t, z, f, e, lr: t - lr * (f(t + e * z) - f(t - e * z)) / (2 * e), "does not follow z"),
    ("check_mezo_step", lambda t, z, f, e, lr: t.copy(), "step is missing"),
    ("check_mezo_step", lambda t, z, f, e, lr: (f(t + e * z) - f(t - e * z)) / (2 * e), "slope g itself"),
    ("check_mezo_step", lambda t, z, f, e, lr: (f(t + e * z) - f(t - e * z)) / (2 * e) * z, "estimate g z"),
    ("check_mezo_step", in_place, "changes its input"),
    ("check_tuning_bytes", lambda n, m: 12 * n if m == "adam" else memory(n, m), "4 numbers per weight"),
    ("check_tuning_bytes", lambda n, m: 8 * n if m == "adam" else memory(n, m), "running means alone"),
    ("check_tuning_bytes", lambda n, m: 4 * n, "weights alone"),
    ("check_tuning_bytes", lambda n, m: memory(n, m) / 4 / 4, "not bytes"),
    ("check_tuning_bytes", lambda n, m: 2 * memory(n, m), "not 8"),
    ("check_tuning_bytes", lambda n, m: 16 * n, "no running means"),
    ("check_tuning_bytes", lambda n, m: 12 * n if m == "sgd" else memory(n, m), "running mean too many"),
    ("check_tuning_bytes", lambda n, m: 4 * n if m == "sgd" else memory(n, m), "gradient is missing"),
    ("check_tuning_bytes", lambda n, m: 8 * n if m == "mezo" else memory(n, m), "has no gradient"),
    ("check_tuning_bytes", lambda n, m: 12 * n if m == "mezo" else memory(n, m), "no second copy"),
    ("check_best_epsilon", lambda r, b: (r / b) ** (1 / 3), "factor of 2"),
    ("check_best_epsilon", lambda r, b: r / (2 * b), "cube root is missing"),
    ("check_best_epsilon", lambda r, b: np.sqrt(r / (2 * b)), "not a square root"),
    ("check_best_epsilon", lambda r, b: (2 * b / r) ** (1 / 3), "Upside down"),
    ("check_best_epsilon", lambda r, b: (2 * r / b) ** (1 / 3), "belongs to the bend"),
    ("check_best_epsilon", lambda r, b: r / best(r, b) + b * best(r, b) ** 2, "smallest error"),
    ("check_best_epsilon", lambda r, b: best(3e-7, 0.02), "fixed epsilon"),
]
