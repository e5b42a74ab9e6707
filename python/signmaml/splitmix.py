"""SplitMix64 (Steele, Lea and Flood 2014): a hash of 64-bit integers, used for keys and random numbers.

`mixed` is the generator's next output from a state: every bit of the state changes about half of the output's bits. The
module is not in `signmaml_ext`, because data and episodes must work without native code.
"""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # odd, nearest to 2**64 divided by the golden ratio
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64


def mixed(state: int) -> int:
    """The output for one state, 0..2**64 - 1.

    Example:
        >>> hex(mixed(0))
        '0xe220a8397b1dcdaf'
    """
    word = (state + GOLDEN) % _WORD
    word = (word ^ (word >> 30)) * _FIRST % _WORD
    word = (word ^ (word >> 27)) * _SECOND % _WORD
    return word ^ (word >> 31)


def mixed_(states: Tensor) -> Tensor:
    """`mixed` of every element of an int64 tensor, in place; gives the same bits on any device."""
    word = states.add_(signed(GOLDEN))
    word.bitwise_xor_(shifted(word, 30)).mul_(signed(_FIRST))
    word.bitwise_xor_(shifted(word, 27)).mul_(signed(_SECOND))
    return word.bitwise_xor_(shifted(word, 31))


def signed(word: int) -> int:
    """The int64 with the same 64 bits, as torch's int64 arithmetic accepts as a scalar."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def shifted(words: Tensor, bits: int) -> Tensor:
    """Logical right shift. torch shifts int64 arithmetically, so the copies of the sign bit are masked out."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
