"""The embedding of a cube: what the last dense layer of a classifier is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

__all__ = ["embed", "tapped_embedding"]


def embed(
    network: nn.Module, cubes: Float[Tensor, "n 1 z y x"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n features"]]:
    """Logits of a classifier, and the features of which its last dense layer made them.

    Parameters
    ----------
    network
        Of the catalogue, wrapped or not, or the program of a model folder.
    cubes
        As the network takes them.

    Raises
    ------
    ValueError
        If the network has no dense layer: segmenters have none.
    """
    if isinstance(network, fx.GraphModule):
        tap = _Tap(network)
        logits = tap.run(cubes)
        if tap.embedding is None:
            raise ValueError(_no_dense_layer(network))
        return logits, tap.embedding
    with tapped_embedding(network) as seen:
        logits = network(cubes)
    return logits, seen[-1]


@contextmanager
def tapped_embedding(network: nn.Module) -> Iterator[list[Tensor]]:
    """The embeddings of all cubes that a network is shown within the context, call by call.

    Raises
    ------
    ValueError
        If the network has no dense layer.
    """
    dense = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if not dense:
        raise ValueError(_no_dense_layer(network))
    seen: list[Tensor] = []
    handle = dense[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


class _Tap(fx.Interpreter):
    """Runs an exported program, in which layers are calls, and keeps the last dense one's input."""

    embedding: Tensor | None = None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.linear.default:
            self.embedding = args[0]
        return super().call_function(target, args, kwargs)


def _no_dense_layer(network: nn.Module) -> str:
    return (
        f"{type(network).__name__} has no dense layer, so cubes have no embedding in it: expected "
        "a classifier"
    )
