"""Slices for splits, where the batch is open: ExecuTorch fixes it in a split, and Core ML wants constant sizes."""

from __future__ import annotations

from itertools import accumulate

import torch

_SPLITS = tuple(
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("split_with_sizes", "split", "chunk", "tensor_split")
    for overload in getattr(torch.ops.aten, name).overloads()
)


def slice_for_split(graph: torch.fx.Graph) -> None:
    """Slices in place of splits of any kind, where the sizes of the pieces are known."""
    for node in list(graph.nodes):
        if node.target not in _SPLITS:
            continue
        tensor, axis = node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        ends = list(accumulate(part.shape[axis] for part in node.meta["val"]))
        if not all(isinstance(end, int) for end in ends):
            continue
        for user in list(node.users):
            place = range(len(ends))[user.args[1]]
            bounds = ends[place - 1] if place else 0, ends[place]
            with graph.inserting_before(user):
                piece = graph.call_function(torch.ops.aten.slice.Tensor, (tensor, axis, *bounds))
            piece.meta.update(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
        graph.erase_node(node)
