"""How far a share of few questions may be off."""

from math import sqrt

Z = 1.959964  # 95% of a normal distribution lie within so many standard deviations


def wilson(hits: float, count: int) -> tuple[float, float]:
    """The 95% interval of the share that `hits` of `count` is a sample of (Wilson 1927).

    It stays within 0 and 1, and 0 of 5 is not taken for certain: (0.0, 0.43).
    """
    share, spread = hits / count, Z**2 / count
    middle, half = share + spread / 2, Z * sqrt(share * (1 - share) / count + spread / count / 4)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return low if hits else 0.0, high if hits < count else 1.0  # as they are but for rounding
