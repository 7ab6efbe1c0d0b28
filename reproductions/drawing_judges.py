"""Judges of generated drawings that are never a reward: variety, sharpness, novelty, and closeness in distribution.

All are pure functions of pictures, float32 `[B, H, W, 3]` in 0..1. They answer what a reward cannot: whether a policy
pays for it with sameness, blur, or copies of its training pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from opd.drawings.cartoon import cartoon
from opd.drawings.palette import palette
from opd.drawings.vocabulary import drawing_tokenizer
from opd.errors import DataError


def background_entropy(pictures: np.ndarray) -> float:
    """Entropy, in nats, of the backgrounds of a batch: each picture has the grey or gradient that most of its pixels
    are nearest to. 0 when all are the same; at most log 10."""
    behind = np.flatnonzero(palette()[2] == 0)
    counts = np.zeros(len(palette()[2]))
    for picture in pictures:
        votes = np.bincount(cartoon(picture).places.ravel(), minlength=len(counts))[behind]
        if votes.any():
            counts[behind[votes.argmax()]] += 1
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum()) + 0.0


def edge_sharpness(pictures: np.ndarray) -> np.ndarray:
    """float64 `[B]`: how much of a drawn edge's step happens between its two pixels; NaN without edges.

    Edges are neighbours (right or below) whose colours in the cartoon are 0.2 or more apart in RGB; the step is the
    distance of the two pixels over that of the two colours, at most 1. A clean drawing has 1.
    """
    sharpness = np.full(len(pictures), np.nan)
    for i, picture in enumerate(pictures):
        colours, shares = cartoon(picture).colours, []
        for axis in (0, 1):
            drawn, seen = (np.sqrt((np.diff(each, axis=axis) ** 2).sum(-1)) for each in (colours, picture))
            edge = drawn >= 0.2
            shares.append((seen[edge] / drawn[edge]).clip(max=1))
        found = np.concatenate(shares)
        if len(found):
            sharpness[i] = found.mean()
    return sharpness


def nearest_distance(pictures: np.ndarray, renders: np.ndarray) -> np.ndarray:
    """float64 `[B]`: distance to the nearest of the training renders `[M, H, W, 3]`, as the root of the mean square
    over pixels and channels. 0 is a copy."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (pictures, renders))
    nearest = np.full(len(a), np.inf)
    for start in range(0, len(b), 1024):
        part = b[start : start + 1024]
        square = (a**2).sum(1)[:, None] - 2 * a @ part.T + (part**2).sum(1)
        nearest = np.minimum(nearest, square.min(1))
    return np.sqrt(nearest.clip(0) / a.shape[1])


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Squared Frechet distance of two sets of features, `[B, F]` and `[M, F]`, taken as Gaussians:
    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. Few samples make it larger; compare equal numbers of them.

    Raises:
        DataError: fewer than two samples of a set.
    """
    if min(len(features), len(reference)) < 2:
        raise DataError(f"a Frechet distance needs 2 pictures of each set, not {len(features)} and {len(reference)}")
    sets = [each.astype(np.float64) for each in (features, reference)]
    (m1, m2), (s1, s2) = zip(*((each.mean(0), np.cov(each, rowvar=False)) for each in sets), strict=True)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * shared)


class Classifier(nn.Module):
    """Which words and characters a picture's prompt has: three convolutions, the mean over places, one linear layer.

    `symbols` names the logits; `features` are what the Frechet distance compares.
    """

    def __init__(self, symbols: Sequence[str], width: int = 32):
        super().__init__()
        self.symbols = tuple(symbols)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, len(self.symbols))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Logits `[B, symbols]` of `[B, H, W, 3]`."""
        return self.head(self.pooled(pictures))

    def pooled(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.body(pictures.permute(0, 3, 1, 2) - 0.5).mean((2, 3))

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> np.ndarray:
        """float32 `[B, 2 * width]`."""
        parts = torch.from_numpy(np.ascontiguousarray(pictures, dtype=np.float32)).split(256)
        return torch.cat([self.pooled(part) for part in parts]).numpy()


def train_classifier(
    rows: Sequence[Mapping[str, Any]], *, steps: int = 300, batch: int = 64, width: int = 32, seed: int = 0
) -> Classifier:
    """A classifier trained on rows of `Drawing.rows` (`prompt` and `image`), all of one size.

    The caller keeps it (`state_dict`): distances are comparable under the same weights only. The global generator is
    left as it was.

    Raises:
        DataError: a prompt of another vocabulary.
    """
    tokenizer = drawing_tokenizer()
    symbols = [symbol for symbol in sorted(tokenizer.get_vocab()) if symbol not in tokenizer.all_special_tokens]
    labels = torch.zeros(len(rows), len(symbols))
    for label, row in zip(labels, rows, strict=True):
        for symbol in tokenizer.tokenize(row["prompt"]):
            if symbol not in symbols:
                raise DataError(f"prompt {row['prompt']!r} is of no drawing task; give rows of Drawing.rows")
            label[symbols.index(symbol)] = 1
    pictures = torch.from_numpy(np.stack([row["image"] for row in rows])).float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(symbols, width)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            here = torch.randint(len(rows), (batch,))
            loss = nn.functional.binary_cross_entropy_with_logits(model(pictures[here]), labels[here])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval().requires_grad_(False)
