"""Sums of products in half precision, in float32 and in one pass: see sums.c."""

import ctypes
from ctypes import c_float, c_int64

import torch
from torch import Tensor

from limbeck.losses import native, pages
from limbeck.losses.native import address


def add(total: Tensor, part: Tensor) -> Tensor:
    """total += part, both of one shape and whole in memory, in the total's type."""
    library = _library(total, part.dtype) if part.is_contiguous() else None
    if library is None:
        return total.add_(part)

    def share(first: int, last: int) -> None:
        library.add(address(total), address(part), c_int64(first), c_int64(last))

    native.in_threads(share, total.numel(), total.numel())
    return total


def times(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in `dtype`, where the factor is one number; overwrites the total."""
    if total.is_cuda and total.dtype != dtype:
        return torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
    if total.device.type == "cpu" and total.dtype == dtype and float(factor) == 1.0:
        return total  # as in most steps: a head's gradient need not be read and written again
    library = _library(total, dtype)
    if library is None:
        return total.mul_(factor).to(dtype)
    product = pages.empty(total.shape, dtype, total.device)
    number = c_float(float(factor))

    def share(first: int, last: int) -> None:
        library.times(address(product), address(total), number, c_int64(first), c_int64(last))

    native.in_threads(share, total.numel(), total.numel())
    return product


def _library(total: Tensor, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Where torch would take a pass more to change a type."""
    if total.device.type != "cpu" or total.dtype != torch.float32 or dtype == total.dtype:
        return None
    if dtype not in native.TYPES or not total.is_contiguous():
        return None
    return native.library("sums.c", **native.type_of("TYPE", dtype))
