"""verl's call for log-probabilities and entropies of a policy's tokens, answered by this library's head.

verl's workers make a `verl.utils.experimental.torch_functional.FusedLinearForPPO` and call it with hidden states and
the head's weight; which implementations there are is a closed list of theirs. `FusedLinearForPPO` here has that
signature. It needs nothing of verl's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clha_fast.functional import token_logps
from clha_fast.ops.dispatch import Backend, check_name
from clha_fast.options import HeadOptions


class FusedLinearForPPO(nn.Module):
    """Log-probability and entropy of every token, both differentiable, from one pass without [T, V] logits.

    verl's own takes no account of what a model does to its head's result (scale, softcap, bias); `head` and `bias` do.
    ``clha_fast.hf.inspect_head(model).options()`` measures the first.

    Args:
        chunk_size, impl_backend: verl's own arguments. No chunk is made here (`HeadOptions.workspace_bytes` bounds the
            logits), so that any `chunk_size` gives the same; `impl_backend` is ours: "auto", "triton", "workspace",
            "torch" or "reference".
        head: scale and softcap of the head; its temperature stays 1, for the call has one.

    Raises:
        ValueError: an unknown backend, a head with a temperature.
    """

    def __init__(
        self, chunk_size: int = 512, impl_backend: Backend = "auto", *, head: HeadOptions | None = None
    ) -> None:
        super().__init__()
        check_name(impl_backend)
        self.chunk_size, self.backend, self.head = chunk_size, impl_backend, head or HeadOptions()
        if self.head.temperature != 1.0:
            raise ValueError(f"head: expected a temperature of 1 (the call has one), got {self.head.temperature}")

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of `input_ids` [T] or [B, T], in nats.

        Args:
            hidden_states: [T, H] or [B, T, H], the ones that predict `input_ids`. vocab_weights: [V, H]. bias: [V].
            temperature: divisor of the logits, a number or one for each token (a shape that expands to `input_ids`').

        Returns:
            As verl's: log_probs in float32, entropy in the dtype of the hidden states.

        Raises:
            ValueError: shapes do not fit; as `clha_fast.token_logps`.
        """
        shape = input_ids.shape
        if hidden_states.shape[:-1] != shape:
            raise ValueError(
                f"input_ids: expected {list(hidden_states.shape[:-1])}, as hidden_states {list(hidden_states.shape)} "
                f"have it, got {list(shape)}"
            )
        each, head = None, self.head
        if isinstance(temperature, Tensor):
            # [T, 1] and [B, T, 1] are columns of verl's logits.
            column = temperature.dim() == len(shape) + 1 and temperature.shape[-1] == 1
            each = (temperature[..., 0] if column else temperature).to(hidden_states.device, torch.float32)
            each = each.expand(shape).flatten()
        else:
            head = head.replace(temperature=temperature)
        logps, values = token_logps(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.flatten().to(torch.int64),
            bias=bias,
            temperature=each,
            head=head,
            backend=self.backend,
            statistics=("entropy",),
        )
        return logps.reshape(shape), values["entropy"].reshape(shape).to(hidden_states.dtype)
