"""Which positions of an image the visual loss is estimated from, when it is not all of them.

Of the M positions of an image n are drawn, all subsets of that size alike; n is the whole number
below ``share * M`` or the one above it, with the chance that makes its mean ``share * M``. So every
position is drawn with probability ``share``, and the sum over the drawn ones divided by it has the
sum over all as its mean. docs/performance.md has the variance.

The draw is a pure function of (seed, place of the sample in the concatenation of all steps, number
of the image in the sample): the same on any number of ranks and after a resume.
"""

import numpy as np

STREAM = 2**62 + 1  # of the counter-based generator: apart from the order's and augmentation's


def drawn(positions: int, share: float, *, seed: int, spot: int, image: int) -> np.ndarray:
    """Which positions of an image are drawn, bool [positions].

    Args:
        positions: how many the image has.
        share: probability of each.
        seed: of the run.
        spot: place of the sample, counted through all steps.
        image: its number in the sample.
    """
    key = np.array([seed % 2**64, STREAM], dtype=np.uint64)
    counter = np.array([0, spot, image, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    number = int(share * positions + generator.random())
    found = np.zeros(positions, dtype=bool)
    found[generator.permutation(positions)[:number]] = True
    return found
