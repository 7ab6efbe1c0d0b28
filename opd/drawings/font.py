"""Characters of five by seven pixels. Look-alikes (0 and O, 1 and I, 5 and S, ...) are left out, so a text has one
reading."""

from __future__ import annotations

import functools

import numpy as np

HEIGHT, WIDTH = 7, 5

# Seven rows of five, `#` for ink.
_ROWS = {
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "D": "###.. #..#. #...# #...# #...# #..#. ###..",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# .#.#. .#.#. .#.#. ..#..",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
}
CHARACTERS = tuple(_ROWS)


@functools.cache
def character(name: str, scale: int = 1) -> np.ndarray:
    """bool `[7 * scale, 5 * scale]`, ink."""
    small = np.array([[mark == "#" for mark in row] for row in _ROWS[name].split()])
    made = small.repeat(scale, 0).repeat(scale, 1)
    made.setflags(write=False)
    return made


@functools.cache
def templates(scale: int) -> np.ndarray:
    """float32 `[len(CHARACTERS), 35 * scale ** 2]`: every character with mean 0 and length 1."""
    flat = np.stack([character(name, scale).ravel() for name in CHARACTERS]).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.sqrt((flat**2).sum(1, keepdims=True))
