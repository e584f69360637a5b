"""What edits multiply the weights of a row by, from the weight that their sets of columns hold in it: the formulas of `edits.weights`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_factors(held, others, whole, amount, largest, least_held, KIND: tl.constexpr, TINY: tl.constexpr):
    """Of edits of one set: (factor of its columns, factor of all others, whether the row changes, the denominator).

    held, others: weight of the row on the set and beside it; whole: their sum. See `rescaled` and `on_weights` of `Gain`, `Lift` and
    `Transfer`.
    """
    if KIND == "transfer":
        inside = 1.0 - amount
        outside = 1.0 + amount * held / tl.maximum(others, TINY)
        changes = (others > TINY) & (amount != 0.0)
        least = others
    elif KIND == "gain alone":
        inside = amount
        outside = amount * 0.0 + 1.0
        least = others + tl.abs(amount) * held
        changes = (least > TINY) & (amount != 1.0)
    else:
        gain = amount
        if KIND == "lift":
            gain = amount * whole / tl.maximum(held, TINY)
        if KIND == "exact lift":
            gain = others * (amount / (1.0 - amount)) / tl.maximum(held, TINY)
        if KIND != "gain":
            gain = tl.minimum(tl.maximum(gain, 1.0), largest)
            gain = tl.where((held >= least_held * whole) & (held > 0.0), gain, 1.0)
        least = others + gain * held
        changes = (least > TINY) & (gain != 1.0)
        outside = whole / tl.maximum(least, TINY)
        inside = gain * outside
    return inside, outside, changes, least


@triton.jit
def set_factors(held1, held2, held3, amount, second, third, number, KIND: tl.constexpr, TINY: tl.constexpr):
    """Of edits of more sets: (factors of the classes 1, 2 and 3, whether the row changes). Columns of class 0 keep their weight."""
    if KIND == "transfer":  # from 1 to 2
        inside = 1.0 - amount
        grown = 1.0 + amount * held1 / tl.maximum(held2, TINY)
        both = inside
        changes = (held2 > TINY) & (amount != 0.0)
    elif KIND == "gain over a set":  # gained: 1 and 3; renormalised: 2 and 3
        inside = amount
        spread = held2 + amount * held3
        target = spread + (1.0 - amount) * (held1 + held3)
        grown = target / tl.maximum(spread, TINY)
        both = amount * grown
        changes = (spread > TINY) & (target >= 0.0) & (amount != 1.0)
    else:  # "give back": from 1 and 3 to 2, where 2 and 3 are the image
        image = held2 + held3
        changes = (held3 - second * image <= amount) & (image >= third) & (held2 > 0.0)
        inside = held1 * 0.0 + (1.0 - number)
        grown = 1.0 + number * (held1 + held3) / tl.maximum(held2, TINY)
        both = inside
    return inside, grown, both, changes
