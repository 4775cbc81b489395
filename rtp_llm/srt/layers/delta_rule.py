"""Linear attention by the gated delta rule: Gated DeltaNet, and with a gate for each channel Kimi Delta Attention."""

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.forward_batch import ForwardBatch, StateWave
from rtp_llm.srt.layers.state import in_waves, state_tensor


class GatedDeltaRule(nn.Module):
    """Linear attention whose state is corrected by each token (Yang et al., 2024).

    Args:
        num_k_heads, num_v_heads: of this rank; value head h reads key head ``h // (num_v_heads // num_k_heads)``.
        layer_id: the layer whose states are read and written.
        normalize: whether queries and keys are divided by their lengths.
        name: of the state; layers with the same ``layer_id`` have other names.
    """

    def __init__(
        self,
        num_k_heads: int,
        num_v_heads: int,
        k_dim: int,
        v_dim: int,
        layer_id: int,
        normalize: bool = True,
        name: str = "recurrent",
    ) -> None:
        super().__init__()
        if num_v_heads % num_k_heads:
            raise ValueError(f"{num_v_heads} value heads cannot share {num_k_heads} key heads evenly")
        self.num_k_heads, self.num_v_heads = num_k_heads, num_v_heads
        self.k_dim, self.v_dim = k_dim, v_dim
        self.layer_id = layer_id
        self.normalize = normalize
        self.state_name = name
        self._rule, self._gates = pick("gated_delta_rule"), pick("delta_gates")

    def state_spec(self) -> StateSpec:
        """Return a matrix [k_dim, v_dim] for each value head."""
        return StateSpec((StateTensor(self.state_name, (self.num_v_heads, self.k_dim, self.v_dim), "float32"),))

    def gates(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        rate: torch.Tensor,
        dt_bias: torch.Tensor,
        most_written: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make ``g``, as ``log_decay`` does, and ``beta`` of projections' outputs.

        Args:
            a: [T, num_v_heads], or [T, num_v_heads, k_dim]; rate: [num_v_heads]; dt_bias: as many as a token's ``a``.
            b: [T, num_v_heads], of which ``beta`` is ``most_written * sigmoid(b)``.
        """
        g, beta = self._gates(a, b, rate, dt_bias, most_written)
        return g, beta

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Compute the step's tokens.

        Args:
            q, k: [T, num_k_heads * k_dim] or [T, num_k_heads, k_dim].
            v: [T, num_v_heads * v_dim] or [T, num_v_heads, v_dim].
            g: [T, num_v_heads], or [T, num_v_heads, k_dim] of each channel: logarithms of decays; see ``log_decay``.
            beta: [T, num_v_heads].

        Returns:
            [T, num_v_heads, v_dim].
        """
        q, k = (x.view(-1, self.num_k_heads, self.k_dim) for x in (q, k))
        v = v.view(-1, self.num_v_heads, self.v_dim)
        states = state_tensor(forward_batch, self.layer_id, self.state_name)

        def compute(wave: StateWave, *tokens: torch.Tensor) -> torch.Tensor:
            return self._rule(*tokens, states, wave, self.normalize)

        return in_waves(forward_batch, compute, q, k, v, g, beta)


def log_decay(a: torch.Tensor, rate: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Return ``rate * softplus(a + dt_bias)`` in float32: the delta rule's ``g`` of a projection's output.

    Args:
        rate: negative; ``-exp(A_log)`` of a checkpoint (``DecayParameter`` of ``mamba.py``).
    """
    return rate * F.softplus(a.float() + dt_bias.float())
