"""How the demo models' matrices are trained."""

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al., 2024), for matrices. torch's own always computes in
    bfloat16, which costs most of the training time on a CPU that does not multiply it."""

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(groups, dict(momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonal(matrix.grad.lerp(average, group["momentum"]).to(self.dtype))
                rows, columns = matrix.shape
                matrix.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """A matrix with the same singular vectors and singular values near one, by Newton-Schulz rounds of fifth order."""
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if rows <= columns else x.T


def rate_at(progress: float, warmup: float = 0.01, decay: float = 0.4) -> float:
    """The learning rate, of its peak, when ``progress`` of the training is done: up, flat, and down at the end."""
    return max(0.0, min((progress + 1e-3) / warmup, 1.0, (1 - progress) / decay))


@torch.no_grad()
def bound(matrix: Tensor, most: float = 1.5) -> None:
    """Shrinks a matrix whose outputs would be larger than ``most`` for inputs of size one. Muon makes the products of
    queries and keys grow until attention is all or nothing and learns no more; Qwen2-VL does not normalize them. To
    bound them at each step goes back to the QK-clip of Kimi K2 (Moonshot AI, 2025)."""
    size = matrix.square().sum(1).mean().sqrt()
    if size > most:
        matrix.mul_(most / size)
