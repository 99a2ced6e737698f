"""Models of transformers that `enable_offset_bias` serves, on sequences that are spread over ranks."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from spread import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from triton_offset_bias.distributed import parallelize_context, positions, shard
from triton_offset_bias.distributed.world import METHODS, Group
from triton_offset_bias.integrations.transformers import disable_offset_bias, enable_offset_bias

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
BATCH, LENGTH, HEADS, TOKENS = 4, 24, 4, 50
ATTENTIONS = {"t5": 6, "umt5": 6, "mpnet": 2, "mpt": 2}
Inputs = dict[str, Tensor]


def _t5(cls: type, config: type) -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": HEADS, "vocab_size": TOKENS}
    return cls(config(**sizes, relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: _t5(transformers.T5ForConditionalGeneration, transformers.T5Config),
    "umt5": lambda: _t5(transformers.UMT5ForConditionalGeneration, transformers.UMT5Config),
    "mpnet": lambda: transformers.MPNetForMaskedLM(
        transformers.MPNetConfig(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
            relative_attention_num_buckets=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(d_model=32, n_heads=HEADS, n_layers=2, max_seq_len=2 * LENGTH, vocab_size=TOKENS)
    ),
}  # fmt: skip


def _enabled(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    enable_offset_bias(model)
    for key, parameter in model.named_parameters():
        if "relative_attention_bias" in key:
            nn.init.normal_(parameter)
    return model.train()


def _inputs(name: str, batch: int = BATCH) -> Inputs:
    """Whole sequences. The last one has padding, but for MPT, which the causal order keeps from it."""
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(2, TOKENS, (batch, LENGTH))}
    if name != "mpt":
        inputs["attention_mask"] = torch.ones(batch, LENGTH, dtype=torch.int64)
        inputs["attention_mask"][-1, LENGTH - 7 :] = 0
    if name == "mpnet":
        inputs["position_ids"] = torch.arange(LENGTH).expand(batch, -1) + 2
    if "t5" in name:
        inputs["decoder_input_ids"] = torch.randint(2, TOKENS, (batch, LENGTH))
    return inputs


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits of all tokens, with 0 for padding, whose logits have no meaning."""
    if "position_ids" in inputs:
        return model(**inputs).logits * inputs["attention_mask"].unsqueeze(-1)
    return model(**inputs, use_cache=False).logits


def _part(inputs: Inputs, group: Group, layout: str) -> Inputs:
    return {key: shard(x, 1, group, layout) for key, x in inputs.items()}


def _check_gradients(name: str, got: nn.Module, expected: nn.Module) -> None:
    found = {key.removeprefix("module."): x.grad for key, x in got.named_parameters()}
    for key, parameter in expected.named_parameters():
        gradient = found[key].full_tensor() if isinstance(found[key], DTensor) else found[key]
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{name}, {key}: {text}"
        )


def _context(_rank: int, _world: int) -> None:
    for name, (method, layout) in itertools.product(
        MODELS, zip(METHODS, ("zigzag", "zigzag", "contiguous"), strict=True)
    ):
        whole, inputs = _enabled(name), _inputs(name)
        logits = _logits(whole, inputs)
        logits.square().mean().backward()
        model = _enabled(name)
        assert parallelize_context(model, layout=layout, method=method) == ATTENTIONS[name]
        model = DistributedDataParallel(model)
        part = _logits(model, _part(inputs, None, layout))
        torch.testing.assert_close(part, logits.detach()[:, positions(LENGTH, layout=layout)], rtol=1e-4, atol=1e-5)
        part.square().mean().backward()
        _check_gradients(f"{name}, {method}", model, whole)


def test_served_models_attend_over_ranks(tmp_path: Path) -> None:
    """Logits and gradients on two ranks are those of one process: self- and cross-attention, padding, ALiBi."""
    run_ranks(_context, 2, tmp_path)


def _meshes(_rank: int, _world: int) -> None:
    mesh = ParallelismConfig(dp_shard_size=2, cp_size=2).build_device_mesh("cpu")
    data, context = mesh["dp_shard"], mesh["cp"]
    everyone = init_device_mesh("cpu", (4,))
    inputs = _inputs("t5", 2 * BATCH)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    whole = _enabled("t5")
    _logits(whole, inputs).square().mean().backward()
    for wrapper in ("DDP", "FSDP2"):
        model = _enabled("t5")
        parallelize_context(model, context, layout="zigzag", method="ring")
        if wrapper == "DDP":
            wrapped = DistributedDataParallel(model)
        else:
            for block in (*model.encoder.block, *model.decoder.block):
                fully_shard(block, mesh=everyone)
            wrapped = fully_shard(model, mesh=everyone)
        mine = {key: x.chunk(2)[data.get_local_rank()] for key, x in inputs.items()}
        _logits(wrapped, _part(mine, context, "zigzag")).square().mean().backward()
        _check_gradients(wrapper, wrapped, whole)


def test_served_models_train_on_meshes_of_data_and_context(tmp_path: Path) -> None:
    """DDP x CP and FSDP2 x CP on four ranks, on a mesh of accelerate's."""
    run_ranks(_meshes, 4, tmp_path)


def _refusals(_rank: int, _world: int) -> None:
    config = transformers.BloomConfig(vocab_size=TOKENS, hidden_size=32, n_head=HEADS, n_layer=1)
    bloom = transformers.BloomForCausalLM(config)
    enable_offset_bias(bloom)
    with pytest.raises(NotImplementedError, match="can be spread, got BloomAttention"):
        parallelize_context(bloom)
    model = _enabled("mpt")
    alone = copy.deepcopy(model)
    parallelize_context(model, layout="zigzag")
    inputs = _inputs("mpt")
    part = _part(inputs, None, "zigzag")
    cache = transformers.DynamicCache()
    model(**part, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"`use_cache` must be False .* got 12 queries and 24 keys"):
        model(**part, past_key_values=cache, use_cache=True)
    disable_offset_bias(model)
    enable_offset_bias(model)
    torch.testing.assert_close(_logits(model, inputs), _logits(alone, inputs))


def test_what_cannot_be_spread_is_refused(tmp_path: Path) -> None:
    """Models that count attended tokens, and caches. A model that is enabled anew attends by itself again."""
    run_ranks(_refusals, 2, tmp_path)
