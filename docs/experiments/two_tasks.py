"""Forgetting in its smallest form: a linear model learns a task, then a second one that agrees with the first.

One vector of eight weights solves both tasks. The first has examples enough for its four inputs; the second has four
examples only, so many weights solve it, and gradient descent takes the nearest. Printed are the mean squared errors
after the second task: if it has inputs of its own, if it uses all eight, and if the first is replayed beside it.
"""

import numpy as np

random = np.random.default_rng(0)
truth = random.standard_normal(8)


def task(examples, inputs):
    """Examples whose other inputs are 0, and their answers."""
    x = np.zeros((examples, 8))
    x[:, inputs] = random.standard_normal((examples, len(inputs)))
    return x, x @ truth


def learnt(weights, *tasks):
    for _ in range(3000):
        weights = weights - 0.05 * sum(x.T @ (x @ weights - y) / len(x) for x, y in tasks)
    return weights


def error(weights, x, y):
    return np.mean((x @ weights - y) ** 2)


first, apart, across = task(50, [0, 1, 2, 3]), task(4, [4, 5, 6, 7]), task(4, list(range(8)))
before = learnt(np.zeros(8), first)
for name, tasks in {"other inputs": [apart], "all inputs": [across], "all, first replayed": [across, first]}.items():
    after = learnt(before, *tasks)
    print(f"{name:<20} second {error(after, *tasks[0]):.2f}  first {error(after, *first):.2f}")
