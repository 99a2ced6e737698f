"""A decoder of transformers on a sequence that is spread over ranks, with a mesh of accelerate's."""

from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from spread import run_ranks
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from triton_offset_bias import distributed, offset_bias_attention
from triton_offset_bias.modules import OffsetBias

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
LENGTH, HEADS = 24, 4


def _model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    bias = OffsetBias(HEADS, LENGTH, bidirectional=False)
    nn.init.normal_(bias.weight)
    for layer in model.model.layers:  # one bias for all layers
        layer.self_attn.offset_bias = bias
    return model


def _work(rank: int, world: int) -> None:
    mesh = ParallelismConfig(cp_size=world).build_device_mesh("cpu")["cp"]

    def alone(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, scaling: float, **__):
        table = module.offset_bias(0, LENGTH - 1)
        options = {"is_causal": True, "enable_gqa": True, "scale": scaling, "bias_origin": 0}
        return offset_bias_attention(query, key, value, table, **options).transpose(1, 2), None

    def spread(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, scaling: float, **__):
        table = module.offset_bias(0, LENGTH - 1)
        options = {"is_causal": True, "enable_gqa": True, "scale": scaling, "bias_origin": 0, "group": mesh}
        out = distributed.offset_bias_attention(query, key, value, table, method="all_to_all", **options)
        return out.transpose(1, 2), None

    AttentionInterface.register("alone", alone)
    AttentionInterface.register("spread", spread)
    whole = _model("alone")
    tokens = torch.randint(50, (2, LENGTH + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = whole(inputs, use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model = nn.parallel.DistributedDataParallel(_model("spread"))
    places = distributed.positions(LENGTH, mesh)
    part = model(distributed.shard(inputs, 1, mesh), position_ids=places[None], use_cache=False).logits
    torch.testing.assert_close(part, logits[:, places])
    nn.functional.cross_entropy(part.flatten(0, 1), distributed.shard(targets, 1, mesh).flatten()).backward()
    for (name, got), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_decoder_attends_over_ranks_through_the_attention_interface(tmp_path: Path) -> None:
    """Logits and gradients on two ranks are those of one process; the heads are traded."""
    run_ranks(_work, 2, tmp_path)
