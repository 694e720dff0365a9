"""Modules that hold packed weights where transformers had dense ones: linear, embedding, fused experts.

Each takes its weights through `load_weight(name, tensor)` under the names of the module it replaces, so a model can
be converted in place or while it is read. Until then a parameter of that name waits on the meta device, listed in
`pending`: loaders find the name where the checkpoint has it. The parts are persistent buffers (`weight_data`,
`gate_up_proj_scales`, …), so `state_dict`, streaming and `to` see them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from optimizations.errors import Refusal
from optimizations.weights.formats import DoesNotFit, Parts, WeightFormat, allocate


class PackedModule(nn.Module):
    """What the packed modules share: waiting for weights, registering parts, giving them back."""

    pending: set[str]
    keeps_input = False  # matrices given to load_weight are copied, their memory may be used again

    def __init__(self, fmt: WeightFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.format = fmt
        self.dtype = dtype  # what dequantized weights come as
        self.pending = set()
        self._part_names: dict[str, dict[str, str]] = {}  # parameter -> part -> buffer
        self._is_hf_initialized = True  # transformers would fill the buffers at random

    def expect(self, name: str, parameter: nn.Parameter) -> None:
        """Let `name` wait for `load_weight`: a meta parameter of the original shape stands there."""
        self.register_parameter(name, parameter)
        self.pending.add(name)

    def load_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Take the original parameter `name`; it is packed and not kept.

        Raises:
            KeyError: the replaced module had no parameter of this name.
        """
        raise NotImplementedError

    def piece_length(self, name: str) -> int | None:
        """Along the first dimension of parameter `name`, at which multiples `load_piece` may start; None: load it whole."""
        return None

    def load_piece(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """`load_weight` for the part of `name` from index `start` on; memory for all of it exists from the first piece on.

        Raises:
            NotImplementedError: `piece_length` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} takes {name!r} as a whole")

    def dequantize(self) -> dict[str, torch.Tensor]:
        """Original parameter name -> dense tensor in `dtype`, freshly made."""
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed parts (and of a bias)."""
        tensors = [*self._buffers.values(), *self._parameters.values()]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None and not t.is_meta)

    def _declare(self, name: str, rows: int, cols: int, stacked: int = 1, lead: tuple[int, ...] = ()) -> None:
        parts = allocate(self.format, rows, cols, torch.device("meta"), stacked, lead)
        self._part_names[name] = {part: f"{name}_{part}" for part in parts}
        for part, tensor in parts.items():
            self.register_buffer(f"{name}_{part}", tensor)

    def _materialize(self, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        """Memory for the parts of `name`; the waiting parameter goes."""
        self._no_longer_waits(name)
        parts = self.parts(name)
        for part, tensor in parts.items():
            if tensor.is_meta:
                parts[part] = self._buffers[f"{name}_{part}"] = torch.empty_like(tensor, device=device)
        return parts

    def _no_longer_waits(self, name: str) -> None:
        if name in self.pending:
            self.pending.discard(name)
            del self._parameters[name]

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The parts of one original parameter."""
        buffers: Any = (
            self._buffers
        )  # not through nn.Module's attribute lookup, which costs as much as a small kernel
        return {part: buffers[buffer] for part, buffer in self._part_names[name].items()}


class PackedLinear(PackedModule):
    """`nn.Linear` over a packed weight; the bias stays as it was.

    A weight whose values its format cannot hold stays dense, as parameter `weight`; `kept_because` is the reason.
    """

    kept_because: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        fmt: WeightFormat,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(fmt, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._declare("weight", out_features, in_features)

    @classmethod
    def like(cls, linear: nn.Linear, fmt: WeightFormat) -> PackedLinear:
        """Without weights, for the place of `linear`, whose bias it shares."""
        return cls(linear.in_features, linear.out_features, linear.bias, fmt, linear.weight.dtype)

    def load_weight(self, name: str, tensor: torch.Tensor) -> None:
        if name == "weight":
            try:
                self.format.encode(tensor.contiguous(), self._materialize("weight", tensor.device))
            except DoesNotFit as reason:
                self._keep(tensor, str(reason))
        elif name == "bias" and self.bias is not None:
            self.bias = nn.Parameter(tensor)
        else:
            raise KeyError(f"a packed linear layer takes weight (and bias if it has one), not {name!r}")

    def piece_length(self, name: str) -> int | None:
        return self.format.piece_rows(self.out_features, self.in_features) if name == "weight" else None

    def load_piece(self, name: str, start: int, tensor: torch.Tensor) -> None:
        parts = self._materialize("weight", tensor.device)
        self.format.encode_piece(tensor, parts, start, self.out_features)

    def _keep(self, weight: torch.Tensor, reason: str) -> None:
        for buffer in self._part_names.pop("weight").values():
            del self._buffers[buffer]
        self.register_parameter("weight", nn.Parameter(weight.clone(), requires_grad=False))
        self.kept_because = reason

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept_because is not None:
            return functional.linear(x, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]
        return self.format.linear(x, self.parts("weight"), self.out_features, self._parameters["bias"])

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Dequantized rows of the weight: int64 or int32 [...] -> [..., in_features]."""
        if self.kept_because is not None:
            return self.get_parameter("weight").detach()[indices]
        wanted = indices.reshape(-1).to(torch.int64)
        rows = self.format.decode(
            self.parts("weight"), self.out_features, self.in_features, self.dtype, indices=wanted
        )
        return rows.view(*indices.shape, self.in_features)

    def dequantize(self) -> dict[str, torch.Tensor]:
        if self.kept_because is not None:
            return {"weight": self.get_parameter("weight").detach().clone()}
        parts = self.parts("weight")
        return {"weight": self.format.decode(parts, self.out_features, self.in_features, self.dtype)}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


class PackedEmbedding(PackedModule):
    """`nn.Embedding` that dequantizes the rows it looks up; a tied output head shares `table`."""

    def __init__(self, table: PackedLinear, padding_idx: int | None) -> None:
        super().__init__(table.format, table.dtype)
        self.table = table
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.padding_idx = padding_idx

    def load_weight(self, name: str, tensor: torch.Tensor) -> None:
        if name != "weight":
            raise KeyError(f"a packed embedding takes weight, not {name!r}")
        self._no_longer_waits(name)
        self.table.load_weight("weight", tensor)

    def piece_length(self, name: str) -> int | None:
        return self.table.piece_length(name)

    def load_piece(self, name: str, start: int, tensor: torch.Tensor) -> None:
        self._no_longer_waits(name)
        self.table.load_piece(name, start, tensor)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.table.rows(input)

    def dequantize(self) -> dict[str, torch.Tensor]:
        return self.table.dequantize()


class PackedExperts(PackedModule):
    """Fused experts of a mixture (SwiGLU, no bias), all of them packed; routing stays outside."""

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        inner: int,
        fmt: WeightFormat,
        dtype: torch.dtype,
        config: Any = None,
    ) -> None:
        super().__init__(fmt, dtype)
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden, inner
        self.config = config
        self._declare("gate_up_proj", 2 * inner, hidden, stacked=2, lead=(num_experts,))
        self._declare("down_proj", hidden, inner, lead=(num_experts,))

    @classmethod
    def like(cls, experts: Any, fmt: WeightFormat) -> PackedExperts:
        """Without weights, for the place of transformers' fused `experts`."""
        count, hidden, inner = experts.down_proj.shape
        return cls(count, hidden, inner, fmt, experts.down_proj.dtype, getattr(experts, "config", None))

    def load_weight(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._part_names:
            raise KeyError(f"packed experts take gate_up_proj and down_proj, not {name!r}")
        self.load_piece(name, 0, tensor)

    def piece_length(self, name: str) -> int | None:
        return 1  # experts are packed one by one

    def load_piece(self, name: str, start: int, tensor: torch.Tensor) -> None:
        parts = self._materialize(name, tensor.device)
        for expert, weight in enumerate(tensor, start):
            try:
                self.format.encode(weight.contiguous(), expert_parts(parts, expert), self._stacked(name))
            except DoesNotFit as reason:
                raise Refusal(f"expert {expert} of {name}: {reason}") from reason

    @staticmethod
    def _stacked(name: str) -> int:
        return 2 if name == "gate_up_proj" else 1

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gate_up, down = self.parts("gate_up_proj"), self.parts("down_proj")
        return self.format.experts(
            hidden_states, top_k_index, top_k_weights, gate_up, down, self.intermediate_dim
        )

    def dequantize(self) -> dict[str, torch.Tensor]:
        return {name: self._dense(name) for name in self._part_names}

    def _dense(self, name: str) -> torch.Tensor:
        rows, cols = (2 * self.intermediate_dim, self.hidden_dim)
        if name == "down_proj":
            rows, cols = self.hidden_dim, self.intermediate_dim
        parts = self.parts(name)
        dense = torch.empty(
            self.num_experts, rows, cols, dtype=self.dtype, device=next(iter(parts.values())).device
        )
        for expert in range(self.num_experts):
            one = expert_parts(parts, expert)
            dense[expert] = self.format.decode(one, rows, cols, self.dtype, self._stacked(name))
        return dense

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden_dim}, inner={self.intermediate_dim}, "
            f"format={self.format}"
        )


def expert_parts(parts: Parts, expert: int) -> dict[str, torch.Tensor]:
    """The parts of one expert out of those of all."""
    return {name: whole[expert] for name, whole in parts.items()}
