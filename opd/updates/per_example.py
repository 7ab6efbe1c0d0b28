"""The gradient of each trajectory by itself: its norm, and sums in which each has a factor of its own.

The graph is cut at the student's final hidden states. Above lies the loss, whose part for one trajectory reaches that
trajectory's positions and the output head alone; below lies the model. Two ways lead through the model. One by one,
each trajectory has a backward pass of its own: right for every model, and as slow as it sounds. Batched, one backward
pass over padded rows says what reaches the outputs of every layer, from which follows the norm of each row's gradient
without that gradient being made (Goodfellow 2015; Li et al. 2022, "ghost clipping"), and a second makes the sum with
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.func import functional_call, vjp, vmap

from opd.distributions import Categorical, Distribution
from opd.errors import IncompatibleError

LEFT = 1e-3
"""Share by which norms of the two ways may differ, from rounding."""

Factors = Callable[[torch.Tensor], torch.Tensor]
"""Norms of B gradients, float32 `[B]`, to what each of them is multiplied with in the sum."""


class NotApartError(Exception):
    """Gradients by row cannot be told from what goes into a layer and what reaches its outputs; says why."""


@dataclass(frozen=True)
class Cut:
    """A micro-batch's graph, in two.

    Attributes:
        hidden: `[N, D]` with the model's graph.
        leaf: the same numbers without it, from which the losses go on.
        head: weight, and bias where there is one, as the model has them.
        leaves: the same, as the losses see them; those that are not trained need no gradient.
        owners: int64 `[N]`, the trajectory of each position.
    """

    hidden: torch.Tensor
    leaf: torch.Tensor
    head: tuple[torch.Tensor, ...]
    leaves: tuple[torch.Tensor, ...]
    owners: torch.Tensor

    def check_apart(self, losses: torch.Tensor) -> bool:
        """Whether B losses, `[B]` with a graph, were enough to see that each reaches its own positions alone.

        Raises:
            IncompatibleError: one reaches another's.
        """
        if len(losses) < 2:
            return False
        (reached,) = torch.autograd.grad(losses[0], [self.leaf], retain_graph=True, allow_unused=True)
        if reached is not None and bool((reached[self.owners != 0] != 0).any()):
            raise IncompatibleError(
                "the update bounds what one trajectory adds, and the loss of one depends on another; take another "
                "objective"
            )
        return True


def cut(student: Distribution, lengths: torch.Tensor) -> tuple[Distribution, Cut]:
    """The student's distributions over leaves, and where they were cut off.

    Raises:
        IncompatibleError: they are not of hidden states and a head.
    """
    if not isinstance(student, Categorical):
        raise IncompatibleError(
            f"gradients by trajectory are made of distributions over ids, and the student answers {student.kind!r}; "
            "take a language model"
        )
    leaf = student.hidden.detach().requires_grad_()
    head = student.head
    own = (head.weight,) if head.bias is None else (head.weight, head.bias)
    leaves = tuple(each.detach().requires_grad_(each.requires_grad) for each in own)
    opened = replace(head, weight=leaves[0], bias=leaves[1] if len(leaves) > 1 else None)
    owners = torch.arange(len(lengths)).repeat_interleave(lengths.cpu()).to(leaf.device)
    return Categorical(leaf, opened), Cut(student.hidden, leaf, own, leaves, owners)


class OneByOne:
    """Each trajectory has a backward pass of its own."""

    def __init__(self, weights: Sequence[torch.nn.Parameter]):
        self.weights = list(weights)

    def add(self, losses: torch.Tensor, where: Cut, factors: Factors, totals: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add to `totals`, one for each weight, the gradients of B losses with their factors.

        Args:
            losses: `[B]` with a graph down to the leaves of `where`.
            factors: of norms.

        Returns:
            float32 `[B]`, the norms of the gradients before factors.
        """
        norms = []
        for i in range(len(losses)):
            gradient = self.of(losses[i], where)
            norm = _norm(gradient)
            factor = factors(norm[None])[0]
            for total, mine in zip(totals, gradient, strict=True):
                if mine is not None:
                    total.add_(mine.float() * factor)
            norms.append(norm)
        return torch.stack(norms)

    def of(self, loss: torch.Tensor, where: Cut) -> list[torch.Tensor | None]:
        """One trajectory's gradient in each weight, of all its uses together; None where it has none."""
        outer = [leaf for leaf in where.leaves if leaf.requires_grad]
        reached, *of_head = torch.autograd.grad(loss, [where.leaf, *outer], retain_graph=True, allow_unused=True)
        roots, grads = [where.hidden], [torch.zeros_like(where.leaf) if reached is None else reached]
        trained = [own for own, leaf in zip(where.head, where.leaves, strict=True) if leaf.requires_grad]
        for own, gradient in zip(trained, of_head, strict=True):
            if gradient is not None:
                roots, grads = [*roots, own], [*grads, gradient]
        return list(torch.autograd.grad(roots, self.weights, grads, retain_graph=True, allow_unused=True))


@dataclass
class Use:
    """One call of a layer on B rows: what went in `[B, T, ...]`, what came out, and later what reached that."""

    layer: torch.nn.Module
    given: torch.Tensor
    made: torch.Tensor
    reached: torch.Tensor | None = None


class Batched:
    """All rows of a micro-batch together, where every trained weight belongs to a layer that sees them apart.

    The first micro-batch is done both ways and compared.
    """

    def __init__(self, module: torch.nn.Module, weights: Sequence[torch.nn.Parameter]):
        self.weights = list(weights)
        self.alone = OneByOne(weights)
        self.uses: list[Use] = []
        self.compared = False
        self.handles = []
        wanted = {id(weight) for weight in weights}
        for layer in module.modules():
            if any(id(weight) in wanted for weight in layer.parameters(recurse=False)):
                self.handles.append(layer.register_forward_hook(self._note))

    def _note(self, layer: torch.nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if torch.is_grad_enabled() and isinstance(made, torch.Tensor) and made.requires_grad:
            self.uses.append(Use(layer, given[0].detach() if given else made.detach(), made))

    def forget(self) -> None:
        """Drop what was noted of passes whose losses nobody asked for."""
        self.uses = []

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.uses = []

    def add(self, losses: torch.Tensor, where: Cut, factors: Factors, totals: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `OneByOne.add`.

        Raises:
            NotApartError: a layer did not see the rows apart, or the two ways differ on the first micro-batch; nothing
                was added.
        """
        uses, self.uses = self.uses, []
        count = len(losses)
        for use in uses:
            if use.given.ndim < 2 or len(use.given) != count or len(use.made) != count:
                raise NotApartError(f"layer {type(use.layer).__name__} does not keep rows apart")
        (reached,) = torch.autograd.grad(losses.sum(), [where.leaf], retain_graph=True)
        found = torch.autograd.grad(where.hidden, [u.made for u in uses], reached, retain_graph=True, allow_unused=True)
        by_weight: dict[int, list[tuple[str, Use]]] = {id(weight): [] for weight in self.weights}
        for use, gradient in zip(uses, found, strict=True):
            use.reached = torch.zeros_like(use.made) if gradient is None else gradient
            for name, weight in use.layer.named_parameters(recurse=False):
                if id(weight) in by_weight:
                    by_weight[id(weight)].append((name, use))
        squares = torch.zeros(count, device=reached.device)
        in_head = self._head_weights(where)
        for weight in self.weights:
            if id(weight) not in in_head:
                squares += _squares(weight, by_weight[id(weight)], count)
        for i in range(count) if in_head else ():
            for weight, gradient in self._of_head(losses[i], where, in_head):
                whole = gradient.float()
                for name, use in by_weight[id(weight)]:
                    whole = whole + _of_row(name, use, i)
                squares[i] += whole.square().sum()
        norms = squares.sqrt()
        if not self.compared:
            self._compare(losses, where, norms)
        scale = factors(norms)
        below = torch.autograd.grad(
            where.hidden,
            self.weights,
            reached * scale[where.owners][:, None].to(reached.dtype),
            retain_graph=True,
            allow_unused=True,
        )
        for total, gradient in zip(totals, below, strict=True):
            if gradient is not None:
                total.add_(gradient.float())
        if in_head:
            places = {id(weight): total for weight, total in zip(self.weights, totals, strict=True)}
            for weight, gradient in self._of_head((losses * scale).sum(), where, in_head):
                places[id(weight)].add_(gradient.float())
        return norms

    def _head_weights(self, where: Cut) -> dict[int, torch.nn.Parameter]:
        """The trained weights that the output head is made of."""
        trained = [own for own, leaf in zip(where.head, where.leaves, strict=True) if leaf.requires_grad]
        found: dict[int, torch.nn.Parameter] = {}
        for own in trained:
            ones = torch.autograd.grad(own, self.weights, torch.zeros_like(own), retain_graph=True, allow_unused=True)
            found |= {id(w): w for w, gradient in zip(self.weights, ones, strict=True) if gradient is not None}
        return found

    def _of_head(
        self, loss: torch.Tensor, where: Cut, in_head: dict[int, torch.nn.Parameter]
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """What a loss's gradient is in the weights of the head, for their use as that alone."""
        pairs = [(own, leaf) for own, leaf in zip(where.head, where.leaves, strict=True) if leaf.requires_grad]
        grads = torch.autograd.grad(loss, [leaf for _, leaf in pairs], retain_graph=True, allow_unused=True)
        there = [(own, gradient) for (own, _), gradient in zip(pairs, grads, strict=True) if gradient is not None]
        weights = list(in_head.values())
        made = torch.autograd.grad(
            [own for own, _ in there],
            weights,
            [gradient for _, gradient in there],
            retain_graph=True,
            allow_unused=True,
        )
        yield from ((w, g) for w, g in zip(weights, made, strict=True) if g is not None)

    def _compare(self, losses: torch.Tensor, where: Cut, norms: torch.Tensor) -> None:
        for i in {0, len(losses) - 1}:
            alone, here = float(_norm(self.alone.of(losses[i], where))), float(norms[i])
            if abs(alone - here) > LEFT * max(alone, here) + 1e-12:
                raise NotApartError(f"a gradient measures {alone:g} by itself and {here:g} in a batch")
        self.compared = True


def _norm(gradient: Sequence[torch.Tensor | None]) -> torch.Tensor:
    squares = [g.float().square().sum() for g in gradient if g is not None]
    return torch.stack(squares).sum().sqrt()


def _squares(weight: torch.nn.Parameter, uses: Sequence[tuple[str, Use]], count: int) -> torch.Tensor:
    """float32 `[B]`, squared norms of each row's gradient in one weight, over all of its uses."""
    if len(uses) == 1 and (found := _square_of(*uses[0])) is not None:
        return found
    if not uses:
        return torch.zeros(count, device=weight.device)
    rows = [torch.stack([_of_row(name, use, i) for name, use in uses]).sum(0) for i in range(count)]
    return torch.stack([row.square().sum() for row in rows])


def _square_of(name: str, use: Use) -> torch.Tensor | None:
    """The same of one use, where it follows without the gradient itself."""
    assert use.reached is not None
    out = use.reached.float()
    if name == "weight" and type(use.layer) is torch.nn.Linear and use.given.ndim == 3:
        given, length = use.given.float(), use.given.shape[1]
        if length * length <= use.layer.weight.numel():
            return ((given @ given.mT) * (out @ out.mT)).sum((1, 2))
        return (out.mT @ given).square().sum((1, 2))
    if name == "bias" and type(use.layer) is torch.nn.Linear and use.given.ndim == 3:
        return out.sum(1).square().sum(1)
    if name == "weight" and _is_embedding(use.layer) and use.given.ndim == 2:
        seen = out.where((use.given != _skipped(use.layer))[..., None], 0.0)
        same = use.given[:, :, None] == use.given[:, None, :]
        return ((seen @ seen.mT) * same).sum((1, 2))
    return _by_rows(name, use).flatten(1).square().sum(1)


def _is_embedding(layer: torch.nn.Module) -> bool:
    return type(layer) is torch.nn.Embedding and layer.max_norm is None and not layer.scale_grad_by_freq


def _skipped(layer: torch.nn.Module) -> int:
    padding = getattr(layer, "padding_idx", None)
    return -1 if padding is None else int(padding)


def _of_row(name: str, use: Use, i: int) -> torch.Tensor:
    """float32, one row's gradient in a weight of a layer."""
    assert use.reached is not None
    out = use.reached[i].float()
    if name == "weight" and type(use.layer) is torch.nn.Linear and use.given.ndim == 3:
        return out.T @ use.given[i].float()
    if name == "weight" and _is_embedding(use.layer) and use.given.ndim == 2:
        ids, weight = use.given[i], use.layer.get_parameter("weight")
        seen = out.where((ids != _skipped(use.layer))[:, None], 0.0)
        return torch.zeros(weight.shape, device=weight.device).index_add_(0, ids, seen)
    return _by_rows(name, replace(use, given=use.given[i : i + 1], reached=use.reached[i : i + 1]))[0]


def _by_rows(name: str, use: Use) -> torch.Tensor:
    """float32 `[B, ...]`, each row's gradient in a weight of any layer that takes one tensor."""
    weight = use.layer.get_parameter(name)

    def of_one(given: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
        def output(value: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = functional_call(use.layer, {name: value}, (given[None],))
            return made[0]

        made, back = vjp(output, weight.detach())  # type: ignore[misc]  # without an auxiliary there are two
        found: torch.Tensor = back(reached.to(made.dtype))[0]
        return found

    assert use.reached is not None
    handles = use.layer._forward_hooks
    hooks = dict(handles)
    handles.clear()
    try:
        return vmap(of_one)(use.given, use.reached).float()
    except (RuntimeError, TypeError, ValueError) as error:
        raise NotApartError(f"layer {type(use.layer).__name__} does not keep rows apart") from error
    finally:
        handles.update(hooks)
