"""transformers' Trainer on sequences that are spread over its processes."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spread import run_ranks
from test_served_spread import TOKENS, _enabled
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from triton_offset_bias.distributed import parallelize_context, shard

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
LENGTH, BATCH, STEPS, RATE = 24, 2, 2, 0.5


class Pairs(Dataset):
    """Sequences of tokens to read and to write."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(2, TOKENS, (STEPS * BATCH, 2, LENGTH + 1), generator=generator)
        self.tokens[1, 1, LENGTH - 5 :] = -100  # not counted

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair."""
        read, written = self.tokens[index]
        return {"input_ids": read[:-1], "decoder_input_ids": written[:-1].clamp(min=0), "labels": written[1:]}


class SpreadTrainer(Trainer):
    """All processes read the same batches, and each takes its part of every sequence."""

    def get_train_dataloader(self) -> DataLoader:
        """The batches, which accelerate would deal out to the processes."""
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=collated)


def collated(pairs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """This rank's part of a batch."""
    return {name: shard(torch.stack([pair[name] for pair in pairs]), 1) for name in pairs[0]}


def summed_loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The sum over local labels by the number of all ranks' labels; the trainer multiplies by the number of ranks."""
    return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def _train(rank: int, world: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    whole, model = _enabled("t5"), _enabled("t5")
    for name in ("config", "generation_config"):
        getattr(model, name).use_cache = False
    parallelize_context(model, method="all_to_all")
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, max_steps=STEPS, optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
        average_tokens_across_devices=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = SpreadTrainer(model, arguments, train_dataset=Pairs(), compute_loss_func=summed_loss)
    assert trainer.accelerator.num_processes == world
    trainer.train()
    optimizer = torch.optim.SGD(whole.parameters(), RATE)
    pairs = Pairs()
    for start in range(0, len(pairs), BATCH):
        batch = {name: torch.stack([pairs[i][name] for i in range(start, start + BATCH)]) for name in pairs[0]}
        labels = batch.pop("labels")
        loss = F.cross_entropy(whole(**batch, use_cache=False).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, got), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_trainer_trains_over_ranks_as_in_one_process(tmp_path: Path) -> None:
    """Two steps of T5 with traded heads on two processes, with labels that do not count, give the same parameters."""
    run_ranks(_train, 2, tmp_path, str(tmp_path))
