"""The optimiser of `swin_windows.py`, `length_generalization.py` and `gated_bytes.py`."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Descent:
    """AdamW with a short linear warm-up and a linear decay to 0. Biases have their own rate and no weight decay.

    Args:
        model: all its parameters are trained.
        biases: the parameters that give position biases. They have to travel several nats from their initial values.
        rate, bias_rate: the highest learning rates of the other parameters and of the biases.
        steps: the number of steps in all.
        weight_decay: weight decay of the other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        biases: Iterable[nn.Parameter],
        *,
        rate: float,
        bias_rate: float,
        steps: int,
        weight_decay: float,
    ) -> None:
        self.parameters = list(model.parameters())
        biases = list(biases)
        others = [p for p in self.parameters if all(p is not bias for bias in biases)]
        groups = [{"params": others, "lr": rate, "weight_decay": weight_decay}]
        if biases:
            groups.append({"params": biases, "lr": bias_rate, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in groups],
            total_steps=steps + 1,
            pct_start=0.07,
            anneal_strategy="linear",
            cycle_momentum=False,
        )

    def step(self, loss: Tensor) -> float:
        """Takes one step down the gradient of `loss`, and returns the loss as a number."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()
