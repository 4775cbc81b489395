"""Comparison of a kernel's result with the reference's."""

import torch


def check_close(result: torch.Tensor, expected: torch.Tensor, float32: float = 1e-5, float16: float = 2e-3) -> None:
    """Assert equal dtypes and shapes, and values within a share of the expected ones and of their largest."""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert torch.equal(result.isnan(), expected.isnan())
    share = float32 if expected.dtype in (torch.float32, torch.float64) else float16
    wanted = expected.float().nan_to_num(0.0)
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(result.float().nan_to_num(0.0), wanted, rtol=share, atol=share * max(largest, 1e-6))
