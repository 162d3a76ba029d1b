"""The network as a ComposerModel: forward, loss, metrics, and FSDP's wrapping and initialization.

A batch is a dict of `input_ids` (batch, seq) and `labels` (batch, seq), and optionally `attention_mask`,
`sequence_id` and `prefix_mask`, each (batch, seq), and the number `max_documents`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from mptfoundry.models.lora import FirstValue, is_adapter, keep_adapters_alone, with_adapters
from mptfoundry.mpt.flops import flops_per_token
from mptfoundry.mpt.init import draw
from mptfoundry.mpt.network import MPT, MPTOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ComposerMPT(ComposerModel):
    """A language model with the interface of Composer's Trainer.

    The network is the only child, `model`: FSDP wraps it and its blocks, and a checkpoint's weights are named
    `model.transformer...`.

    Attributes:
        inputs: The keys of a batch that forward takes, besides `input_ids`.

    Args:
        network: The network; its parameters may still be on the meta device.
        eval_metrics: Evaluation metrics by name; each is updated with (batch, the network's output).
        tokenizer: For callbacks that read it from the model, such as Composer's text callbacks.
        seed: For weights on the meta device, which are drawn after FSDP allocates them.
        extra_flops_per_token: Added to those of training the whole network; negative if weights are frozen.
    """

    inputs: tuple[str, ...] = ("attention_mask", "sequence_id", "prefix_mask", "max_documents", "labels")

    def __init__(
        self,
        network: MPT,
        *,
        eval_metrics: Mapping[str, Metric] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        extra_flops_per_token: int = 0,
    ) -> None:
        super().__init__()
        self.model = network
        self._has_adapters = any(is_adapter(name) for name, _ in network.named_parameters())
        if self._has_adapters:
            keep_adapters_alone(self)
        self.config = network.config
        self.tokenizer = tokenizer
        # A plain dict, because FSDP would wrap a metric that is a submodule, and checkpoints would save it.
        self._eval_metrics = dict(eval_metrics or {})
        self._extra_flops_per_token = extra_flops_per_token
        self._seed = seed
        blocks = frozenset(network.transformer.blocks)
        network.fsdp_wrap_fn = blocks.__contains__  # type: ignore[assignment]
        self.start_from(lambda name, shape, rows=None: draw(name, shape, network.config, seed, rows))

    def start_from(self, first_value: FirstValue) -> None:
        """Fill weights on the meta device from `first_value` after FSDP allocates them."""
        names = {module: name for name, module in self.model.named_modules()}
        if self._has_adapters:
            first_value = with_adapters(first_value, self._seed)

        def set_weights(module: nn.Module) -> None:
            _initialize(module, names[module], first_value)

        self.model.param_init_fn = set_weights  # type: ignore[assignment]

    def forward(self, batch: Mapping[str, Any]) -> MPTOutput:
        """The network's output for a batch: the mean loss, and in evaluation each token's loss."""
        given = {name: batch[name] for name in self.inputs if name in batch}
        return self.model(batch["input_ids"], **given)

    def loss(self, outputs: MPTOutput, batch: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The mean loss over the batch's loss-generating tokens, a 0-d float32 tensor."""
        assert outputs.loss is not None
        return outputs.loss

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """The evaluation metrics; none in training, where the loss is enough."""
        return {} if is_train else self._eval_metrics

    def update_metric(self, batch: Mapping[str, Tensor], outputs: MPTOutput, metric: Metric) -> None:
        """Add a batch to a metric."""
        metric.update(batch, outputs)

    def flops_per_batch(self, batch: Mapping[str, Tensor]) -> int:
        """FLOPs of training on a batch, for Composer's speed monitor; padding and full attention count."""
        rows, seq_len = batch["input_ids"].shape
        flops = flops_per_token(self.config, seq_len, causal=False) + self._extra_flops_per_token
        return rows * seq_len * flops


@torch.no_grad()
def _initialize(module: nn.Module, name: str, first_value: FirstValue) -> None:
    """Set the module's own weights, whole or sharded, to the same values either way.

    Args:
        module: A part of the network, with allocated storage.
        name: Its path in the network, such as `transformer.blocks.0.attn.Wqkv`.
        first_value: Returns a parameter, or some of its rows, given its name and full shape.
    """
    for own_name, parameter in module.named_parameters(recurse=False):
        full_name, shape = f"{name}.{own_name}", tuple(parameter.shape)
        if not isinstance(parameter, DTensor):
            parameter.copy_(first_value(full_name, shape))
            continue
        if (local := parameter.to_local()).numel():
            local.copy_(first_value(full_name, shape, _own_rows(parameter)))


def _own_rows(parameter: DTensor) -> tuple[int, int]:
    """This rank's rows, as (start, stop)."""
    (dim,) = (i for i, placement in enumerate(parameter.placements) if placement.is_shard(0))
    mesh = parameter.device_mesh
    # FSDP shards like torch.chunk: equal chunks, the last ones shorter or empty.
    length = -(-len(parameter) // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * length, len(parameter))
    return first, min(first + length, len(parameter))
