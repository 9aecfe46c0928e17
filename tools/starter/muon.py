"""Muon for the matrices, AdamW for the rest: the optimiser of the starter's pre-training.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by its
nearest orthogonal matrix. torch.optim.Muon iterates in bfloat16, which a processor without bfloat16
instructions emulates six times slower than float32; this one stays in float32, handles matrices of one
shape together, and takes packed query, key and value as the three matrices that they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices next to those given (n, rows, columns), by Newton-Schulz of order five."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, decoupled decay and updates scaled to AdamW's size.

    Args:
        parameters: matrices; one three times as high as wide counts as three stacked square ones.
        lr: learning rate; as the updates' root mean square is AdamW's, the same rate serves both.
        weight_decay: decoupled.
        momentum: share kept of the running gradient.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float = 0.05, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                blocks = 3 if p.shape[0] == 3 * p.shape[1] else 1
                shapes.setdefault((p.shape[0] // blocks, p.shape[1]), []).append(p)
            for shape, members in shapes.items():
                self._update(group, shape, members)

    def _update(self, group: dict[str, float], shape: tuple[int, int], members: list[nn.Parameter]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        looked_ahead = []
        for p in members:
            running = self.state[p].setdefault("momentum", torch.zeros_like(p))
            running.lerp_(p.grad, 1 - momentum)
            looked_ahead.append(p.grad.lerp(running, momentum).view(-1, *shape))
        updates = 0.2 * max(shape) ** 0.5 * orthogonalise(torch.cat(looked_ahead))
        parts = updates.split([len(x) for x in looked_ahead])
        for p, update in zip(members, parts, strict=True):
            p.mul_(1 - rate * group["weight_decay"]).add_(update.reshape(p.shape), alpha=-rate)


def optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformers' blocks, AdamW for embeddings, projections and vectors."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, rate), torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
