"""Right and wrong answers to the exercises of notebook 05; the message that each mistake must get."""

from statistics import NormalDist

import numpy as np

from pllm_helpers.evaluation import Estimate, check_claim


def interval(statistic=np.mean, level=0.95, paired=True, replace=True, size=None, seeded=True):
    def paired_interval(a, b, seed):
        rng = np.random.default_rng(seed if seeded else None)
        draws = []
        for _ in range(2000):
            rows = rng.choice(len(a), size or len(a), replace=replace)
            other = rows if paired else rng.integers(0, len(b), len(b))
            draws.append(statistic(a[rows]) - statistic(b[other]) if not paired else statistic(a[rows] - b[rows]))
        return tuple(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))

    return paired_interval


def one_error(a, b, seed):
    d = a - b
    return d.mean() - d.std() / len(d) ** 0.5, d.mean() + d.std() / len(d) ** 0.5


def scatter_of_dialogues(a, b, seed):
    draws = np.random.default_rng(seed).choice(a - b, 4000)
    return tuple(np.quantile(draws, [0.025, 0.975]))


def verdict(low, high, bound, side):
    """Through the package's own rule."""
    return check_claim("c", Estimate(low, low, high), **{side: bound}).verdict


def strict(low, high, bound, side):
    if side == "below":
        low, high, bound = -high, -low, -bound
    return "holds" if low > bound else "fails" if high <= bound else "inconclusive"


def late(low, high, bound, side):
    if side == "below":
        low, high, bound = -high, -low, -bound
    return "holds" if low >= bound else "fails" if high <= bound else "inconclusive"


def midpoint(low, high, bound, side):
    return "holds" if (low + high) / 2 >= bound else "fails"


def significant(low, high, bound, side):
    return "holds" if low >= bound else "fails"


def never_fails(low, high, bound, side):
    return "holds" if (low >= bound if side == "above" else high <= bound) else "inconclusive"


def one_sided(low, high, bound, side):
    return "holds" if low >= bound else "fails" if high < bound else "inconclusive"


def hierarchical_mean(rows, rng):
    drawn = [rows[s] for s in rng.integers(0, len(rows), len(rows))]
    return float(np.mean([rng.choice(x, len(x)).mean() for x in drawn]))


def only_dialogues(rows, rng):
    return float(np.mean([rng.choice(x, len(x)).mean() for x in rows]))


def only_seeds(rows, rng):
    return float(np.mean([rows[s].mean() for s in rng.integers(0, len(rows), len(rows))]))


def flat(rows, rng):
    everything = np.concatenate(rows)
    return float(rng.choice(everything, len(everything)).mean())


def one_seed(rows, rng):
    x = rows[rng.integers(len(rows))]
    return float(rng.choice(x, len(x)).mean())


def one_dialogue(rows, rng):
    return float(np.mean([rng.choice(rows[s]) for s in rng.integers(0, len(rows), len(rows))]))


def unequal(rows, rng):
    drawn = [rows[s] for s in rng.integers(0, len(rows), len(rows))]
    return float(np.concatenate([rng.choice(x, len(x)) for x in drawn]).mean())


def mutating(rows, rng):
    result = hierarchical_mean(rows, rng)
    rows[0][:] = rows[0] + 1
    return result


def singles(lead, spreads):
    return np.array([1 - NormalDist().cdf(lead / s) for s in spreads])


def chance_of_up_to(lead, spreads):
    draws = np.random.default_rng(0).normal(size=(40_000, len(spreads))) * spreads
    return float((draws.max(axis=1) >= lead).mean())


REFERENCE = {
    "check_paired_interval": interval(),
    "check_verdict": verdict,
    "check_hierarchical_mean": hierarchical_mean,
    "check_chance_of_up_to": chance_of_up_to,
}
WRONG = [
    ("check_paired_interval", interval(paired=False), "same rows of a and of b"),
    ("check_paired_interval", lambda a, b, s: interval()(b, a, s), "a minus b"),
    ("check_paired_interval", lambda a, b, s: float((a - b).mean()), "both ends"),
    ("check_paired_interval", lambda a, b, s: interval()(a, b, s)[::-1], "wrong order"),
    ("check_paired_interval", lambda a, b, s: (a.mean() / b.mean() - 1,) * 2, "relative difference"),
    ("check_paired_interval", interval(replace=False), "with replacement"),
    ("check_paired_interval", interval(level=0.9), "90 % interval"),
    ("check_paired_interval", interval(level=0.99), "99 % interval"),
    ("check_paired_interval", interval(size=25), "n rows of n"),
    ("check_paired_interval", interval(seeded=False), "same seed"),
    ("check_paired_interval", scatter_of_dialogues, "scatter of single dialogues"),
    ("check_paired_interval", one_error, "one standard error"),
    ("check_verdict", strict, "low equal to bound holds"),
    ("check_verdict", late, "not yet fails"),
    ("check_verdict", midpoint, "middle of the interval"),
    ("check_verdict", significant, "Not shown"),
    ("check_verdict", never_fails, "evidence against"),
    ("check_verdict", one_sided, "side has no effect"),
    ("check_hierarchical_mean", only_dialogues, "seeds never change"),
    ("check_hierarchical_mean", only_seeds, "dialogues never change"),
    ("check_hierarchical_mean", flat, "thrown together"),
    ("check_hierarchical_mean", one_seed, "One seed"),
    ("check_hierarchical_mean", one_dialogue, "One dialogue per seed"),
    ("check_hierarchical_mean", unequal, "seeds count alike"),
    ("check_hierarchical_mean", mutating, "changes its input"),
    ("check_chance_of_up_to", lambda x, s: max(singles(x, s)), "single comparison alone"),
    ("check_chance_of_up_to", lambda x, s: float(np.prod(singles(x, s))), "all.* leads"),
    ("check_chance_of_up_to", lambda x, s: float(np.sum(singles(x, s))), "Bonferroni"),
    ("check_chance_of_up_to", lambda x, s: 1 - chance_of_up_to(x, s), "none is so large"),
    ("check_chance_of_up_to", lambda x, s: float(np.mean(singles(x, s))), "mean chance"),
    (
        "check_chance_of_up_to",
        lambda x, s: (abs(np.random.default_rng(0).normal(size=(40_000, len(s))) * s).max(1) >= x).mean(),
        "absolute value",
    ),
]


def seeded(seed):
    """Right intervals with other random numbers."""
    return [
        ("check_paired_interval", lambda a, b, s: interval()(a, b, 1000 * seed + s)),
        (
            "check_hierarchical_mean",
            lambda rows, rng: hierarchical_mean(rows, np.random.default_rng(seed + rng.integers(2**32))),
        ),
    ]


ALSO_RIGHT = [case for seed in range(5) for case in seeded(seed)]
