"""Where the channels of a tensor are, from the operation that made it: a rule for each kind of operation.

Axes are counted from the end. A tensor whose channels have been split, into heads for instance, has several;
None means that the operation does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Axes = frozenset[int] | None
LAST = frozenset({-1})


@dataclass(frozen=True)
class Origin:
    """What is known of a tensor from how it came about.

    `image`: it depends on the network's input. `pooled`: it has been averaged over all positions, since when
    it went through the activation calls numbered in `pending`.
    """

    axes: Axes = None
    image: bool = False
    pooled: bool = False
    pending: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Source:
    """One tensor that went into an operation."""

    tensor: Tensor
    origin: Origin


@dataclass(frozen=True)
class Operation:
    """One call of a torch function on tensors."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: tuple[Source, ...]

    @property
    def first(self) -> Source:
        return self.sources[0]

    def on(self, probe: Tensor) -> Any:
        """Do the same to another tensor instead of the first."""
        if self.args:
            return self.function(probe, *self.args[1:], **self.kwargs)
        name = next(name for name, value in self.kwargs.items() if value is self.first.tensor)
        return self.function(**{**self.kwargs, name: probe})


def output_axes(operation: Operation, output: Tensor) -> Axes:
    """Tell which axes of `output` hold channels."""
    rule = RULES.get(operation.name, _broadcast)
    try:
        return rule(operation, output) or None
    except (IndexError, TypeError, ValueError, RuntimeError, StopIteration):
        return None


def pools(operation: Operation, output: Tensor) -> bool:
    """Tell whether an operation averages over all positions, and leaves one for each channel."""
    origin = operation.first.origin
    if operation.name not in POOLING or origin.axes is None:
        return False
    rest = operation.first.tensor.ndim - len(origin.axes) - 1
    axes = output_axes(operation, output)
    positions = [size for axis, size in _sizes(output) if axis > -output.ndim and axis not in (axes or ())]
    return rest > 0 and axes is not None and all(size == 1 for size in positions)


def reshaped(axes: frozenset[int], before: Sequence[int], after: Sequence[int]) -> Axes:
    """Follow channels through a reshape.

    Unknown where they are merged with something else.

    >>> reshaped(frozenset({-1}), (2, 49, 96), (2, 49, 3, 32)) == {-2, -1}
    True
    >>> reshaped(frozenset({-3}), (2, 64, 7, 7), (2, 3136)) is None
    True
    """
    found: set[int] = set()
    for old, new in _factors(before, after):
        held = [i - len(before) in axes for i in old if before[i] > 1]
        if any(held) and not all(held):
            return None
        if any(held):
            found |= {j - len(after) for j in new if after[j] > 1}
    return frozenset(found)


def _factors(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Cut two shapes of the same size into runs of dimensions with the same product, as short as possible."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = i, j
        p, i = (before[i], i + 1) if i < len(before) else (1, i)
        q, j = (after[j], j + 1) if j < len(after) else (1, j)
        while p != q:
            if p < q:
                p, i = p * before[i], i + 1
            else:
                q, j = q * after[j], j + 1
        yield range(old, i), range(new, j)


def _broadcast(operation: Operation, output: Tensor) -> Axes:
    """Elementwise: as in the operands that are as wide as the result."""
    return _agreed(
        source.origin.axes
        for source in operation.sources
        if source.origin.axes and all(_same_size(source.tensor, output, axis) for axis in source.origin.axes)
    )


def _kept(operation: Operation, output: Tensor) -> Axes:
    """Lengths may change along any axis, but each axis keeps its meaning."""
    held = [source for source in operation.sources if source.tensor.ndim == output.ndim]
    return _agreed(source.origin.axes for source in held if source.origin.axes)


def _last(operation: Operation, output: Tensor) -> Axes:
    return LAST


def _convolution(operation: Operation, output: Tensor) -> Axes:
    return frozenset({-1 - int(operation.name[-2])})


def _normalised(operation: Operation, output: Tensor) -> Axes:
    """Batch, group and instance norms are of the second axis, by definition."""
    return frozenset({1 - output.ndim})


def _last_unless_known(operation: Operation, output: Tensor) -> Axes:
    """Layer norms have a weight for each feature of the last axis, if for no other."""
    known = _broadcast(operation, output)
    shape = operation.args[1] if len(operation.args) > 1 else operation.kwargs["normalized_shape"]
    return known or (LAST if len(shape) == 1 else None)


def _reshape(operation: Operation, output: Tensor) -> Axes:
    axes = operation.first.origin.axes
    return None if axes is None else reshaped(axes, operation.first.tensor.shape, output.shape)


def _view(operation: Operation, output: Tensor) -> Axes:
    """Follow strides: those of the result of a view say which axis each of its axes was."""
    source = operation.first
    if source.origin.axes is None:
        return None
    probe = torch.empty_strided(source.tensor.shape, STRIDES[: source.tensor.ndim], device="meta")
    result = operation.on(probe)
    views = [result] if isinstance(result, Tensor) else list(result)
    view = next(view for view in views if view.shape == output.shape)
    held = [STRIDES[axis + source.tensor.ndim] for axis in source.origin.axes]
    return frozenset(
        axis
        for axis, size in _sizes(output)
        if size > 1 and view.stride(axis) and any(view.stride(axis) % stride == 0 for stride in held)
    )


def _index(operation: Operation, output: Tensor) -> Axes:
    """Indexing by numbers and slices is a view; by one vector it changes a length."""
    index = operation.args[1] if isinstance(operation.args[1], tuple) else (operation.args[1],)
    advanced = [part for part in index if isinstance(part, Tensor | list)]
    if not advanced:
        return _view(operation, output)
    if len(advanced) == 1 and output.ndim == operation.first.tensor.ndim:
        return _kept(operation, output)
    return None


def _reduction(operation: Operation, output: Tensor) -> Axes:
    """Follow sizes: those of the result on a tensor with a different size for each axis."""
    source = operation.first
    if source.origin.axes is None:
        return None
    result = operation.on(torch.empty(SIZES[: source.tensor.ndim], device="meta"))
    sizes = (result if isinstance(result, Tensor) else result[0]).shape
    held = [SIZES[axis + source.tensor.ndim] for axis in source.origin.axes]
    return frozenset(axis - len(sizes) for axis, size in enumerate(sizes) if size in held)


def _stack(operation: Operation, output: Tensor) -> Axes:
    axes = _agreed(source.origin.axes for source in operation.sources if source.origin.axes)
    dim = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else 0) % output.ndim
    if axes is None:
        return None
    return frozenset(axis - 1 if axis + output.ndim - 1 < dim else axis for axis in axes)


def _matmul(operation: Operation, output: Tensor) -> Axes:
    """Rows stay rows and columns stay columns; a product with constants along the channels makes new ones."""
    left, right = operation.sources[-2:]
    if not right.origin.image and left.origin.axes == LAST:
        return LAST
    if not left.origin.image and right.origin.axes == frozenset({-2}):
        return frozenset({-2})
    rows, columns = left.origin.axes or frozenset(), right.origin.axes or frozenset()
    found = frozenset({-2} & rows) | frozenset(columns - {-2})
    return found if len(found) == 1 or found == columns else None


def _attention(operation: Operation, output: Tensor) -> Axes:
    return operation.sources[2].origin.axes


def _unknown(operation: Operation, output: Tensor) -> Axes:
    return None


def _agreed(candidates: Iterator[Axes]) -> Axes:
    distinct = set(candidates)
    return distinct.pop() if len(distinct) == 1 else None


def _same_size(source: Tensor, output: Tensor, axis: int) -> bool:
    return -axis <= output.ndim and source.shape[axis] == output.shape[axis]


def _sizes(tensor: Tensor) -> list[tuple[int, int]]:
    return [(axis - tensor.ndim, size) for axis, size in enumerate(tensor.shape)]


STRIDES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121)
SIZES = (2, 3, 5, 7, 11, 13, 17, 19)


def _names(text: str) -> list[str]:
    return text.split()


RULES: dict[str, Callable[[Operation, Tensor], Axes]] = {
    **dict.fromkeys(_names("conv1d conv2d conv3d"), _convolution),
    **dict.fromkeys(_names("conv_transpose1d conv_transpose2d conv_transpose3d"), _convolution),
    **dict.fromkeys(_names("linear addmm bilinear embedding"), _last),
    **dict.fromkeys(_names("batch_norm group_norm instance_norm"), _normalised),
    **dict.fromkeys(_names("layer_norm rms_norm"), _last_unless_known),
    **dict.fromkeys(_names("matmul mm bmm baddbmm __matmul__"), _matmul),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(_names("view reshape flatten unflatten squeeze unsqueeze"), _reshape),
    **dict.fromkeys(_names("view_as reshape_as ravel"), _reshape),
    **dict.fromkeys(_names("permute transpose swapaxes swapdims movedim moveaxis t T mT H mH"), _view),
    **dict.fromkeys(_names("select unbind narrow chunk split split_with_sizes tensor_split"), _view),
    **dict.fromkeys(_names("unsafe_chunk unsafe_split expand expand_as broadcast_to"), _view),
    "__getitem__": _index,
    **dict.fromkeys(_names("mean sum amax amin max min std var norm logsumexp prod nanmean"), _reduction),
    "stack": _stack,
    **dict.fromkeys(_names("cat concat concatenate pad interpolate upsample roll flip repeat tile"), _kept),
    **dict.fromkeys(_names("index_select gather pixel_shuffle pixel_unshuffle grid_sample"), _kept),
    **dict.fromkeys(_names("max_pool1d max_pool2d max_pool3d max_pool2d_with_indices"), _kept),
    **dict.fromkeys(_names("avg_pool1d avg_pool2d avg_pool3d lp_pool2d repeat_interleave"), _kept),
    **dict.fromkeys(_names("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"), _kept),
    **dict.fromkeys(_names("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"), _kept),
    **dict.fromkeys(_names("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2"), _kept),
    **dict.fromkeys(_names("einsum tensordot sort argsort topk unfold fold cdist"), _unknown),
}
POOLING = {
    *_names("mean sum amax max logsumexp norm avg_pool2d"),
    *_names("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d"),
}
