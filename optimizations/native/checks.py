"""Refuses tensors that a kernel cannot take, in words, before any address reaches C++."""

from __future__ import annotations

import torch

# The codes of kernels/check.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def dtype_code(kernel: str, name: str, tensor: torch.Tensor) -> int:
    """Code of the element type of an activation: float32 or bfloat16.

    Raises:
        TypeError: any other dtype.
    """
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"{kernel}: {name} must be float32 or bfloat16, got {tensor.dtype}")
    return code


def require_cpu(kernel: str, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless the tensor lies in host memory."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{kernel}: {name} must be on the CPU, it is on {tensor.device}")


def require_contiguous(kernel: str, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless the tensor is dense and row-major."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{kernel}: {name} must be contiguous, it has shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}; call .contiguous() first"
        )


def require_dtype(kernel: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless the tensor has exactly this dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{kernel}: {name} must be {dtype}, got {tensor.dtype}")


def require_shape(kernel: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has this shape; -1 stands for any size."""
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(w not in (-1, g) for w, g in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{kernel}: {name} must have shape ({wanted}), got {got}")


def require_aligned(kernel: str, name: str, tensor: torch.Tensor, alignment: int) -> None:
    """Raises ValueError unless the memory starts at a multiple of `alignment` bytes."""
    beyond = tensor.data_ptr() % alignment
    if beyond:
        raise ValueError(
            f"{kernel}: {name} must start at a multiple of {alignment} bytes, it starts {beyond} bytes past one; "
            "call .clone() to get memory of its own"
        )


def require_tensor(
    kernel: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    alignment: int = 1,
) -> None:
    """All of the above for a tensor of known dtype and shape (-1: any)."""
    require_cpu(kernel, name, tensor)
    require_dtype(kernel, name, tensor, dtype)
    require_shape(kernel, name, tensor, shape)
    require_contiguous(kernel, name, tensor)
    if alignment > 1:
        require_aligned(kernel, name, tensor, alignment)
