"""How the processes of a run share its work: each a whole replica, or the weights or the optimizer in shards.

`Replicas` is what one process is, too. `ShardedWeights` is PyTorch's FSDP2 (`fully_shard`), for models that
do not fit on one GPU; `ShardedOptimizer` is DeepSpeed's ZeRO, stages 1 and 2 (Rajbhandari et al. 2020,
arXiv 1910.02054). All three train the same thing and write the same checkpoints: the adapter whole, the
optimizer's state whole, by rank 0 (docs/adr/0013).
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from deadpan.config import schema
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.models.answer_loss import plain_model
from deadpan.train.processes import Processes


class Replicas:
    """Every process holds the whole model and the whole optimizer; gradients are summed once a step.

    Attributes:
        in_step: Whether all processes must do every pass of a step together, through the same weights.
        shares_weights: Whether the model works in all processes at once only.
    """

    in_step = False
    shares_weights = False

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._accelerator: Accelerator = processes.accelerator

    @property
    def loads_on(self) -> torch.device:
        """Where the model is built."""
        return self._processes.device

    def share_model(self, model: PeftModel) -> None:
        """Spread a model's weights; all processes come with the same ones."""

    def share_optimizer(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        """Take over an optimizer, which has no state yet, and what it trains."""
        self._optimizer, self._parameters = optimizer, list(parameters)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a pass's gradients.

        Args:
            loss: float32 scalar; the step's loss is the sum over all passes of all processes.
            last: Whether it is the step's last pass here.
        """
        self._accelerator.backward(loss)

    def sum(self, loss: torch.Tensor, failed: bool) -> tuple[torch.Tensor, bool]:
        """End a step's passes: see `Processes.sum_gradients`."""
        return self._processes.sum_gradients(self._parameters, loss, failed)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a norm; the one that they had."""
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm).item()

    def step(self) -> None:
        """Change the weights by their gradients, which are then gone."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self, loss: torch.Tensor) -> float:
        """The norm of a loss's gradient by itself; no gradient is left afterwards."""
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()

    def gathered(self, model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What is spread over the processes, put together on the CPU: the adapter and the optimizer's state.

        All processes take part; None where each has the whole.
        """
        return None

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Fill the optimizer with a whole state."""
        self._optimizer.load_state_dict(state)


class ShardedWeights(Replicas):
    """FSDP2: of every layer each process holds a part, and has the whole only while it computes with it.

    Frozen weights are gathered in the type that they are held in; trainable ones, their gradients and the
    optimizer's state stay float32.
    """

    in_step = True
    shares_weights = True

    @property
    def loads_on(self) -> torch.device:
        # Whole it may not fit on the GPU; `fully_shard` moves it there layer by layer.
        return torch.device("cpu")

    def share_model(self, model: PeftModel) -> None:
        # Nothing is done in place to what the inner model returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        plain, device = plain_model(model), self._processes.device
        mesh = init_device_mesh(device.type, (self._processes.world,))
        head, tied = plain.lm_head, plain.config.tie_word_embeddings
        ignored: set[nn.Parameter] = set()
        if tied:
            # One tensor in two modules cannot be gathered for each; it is frozen, and kept whole.
            head.to(device)
            ignored.add(head.weight)
        else:
            fully_shard(head, mesh=mesh)
        # Not attributes of PEFT's wrapper: the loss calls the inner model and the head by themselves.
        for layer in [*plain.model.vision_tower.encoder.layer, *plain.model.language_model.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(plain.model, mesh=mesh, ignored_params=ignored)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # FSDP means gradients over the processes, and the step's are sums.
        super().backward(loss * self._processes.world, last)

    def sum(self, loss: torch.Tensor, failed: bool) -> tuple[torch.Tensor, bool]:
        return self._processes.sum_tensor(loss), failed

    def clip(self, max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return _whole(norm).item()

    def gradient_norm(self, loss: torch.Tensor) -> float:
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients)).item()
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def gathered(self, model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        state = self._optimizer.state_dict()
        return lora.adapter_state(model, _whole), _each_tensor(state, lambda t: _whole(t).cpu())

    def load_optimizer(self, state: dict[str, Any]) -> None:
        super().load_optimizer(state)
        for parameter, values in self._optimizer.state.items():
            assert isinstance(parameter, DTensor)
            for name, value in values.items():
                # Adam's count of steps is a number, and not spread.
                if value.shape == parameter.shape:
                    values[name] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )


class ShardedOptimizer(Replicas):
    """DeepSpeed's ZeRO: of the optimizer's state each process holds a part; in stage 2 of the gradients too.

    Args:
        processes: The processes.
        stage: 1 or 2.
        max_grad_norm: DeepSpeed clips as it steps.
    """

    in_step = True

    def __init__(self, processes: Processes, stage: int, max_grad_norm: float) -> None:
        super().__init__(processes)
        self._stage, self._max_grad_norm = stage, max_grad_norm

    def share_optimizer(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        super().share_optimizer(optimizer, parameters)
        os.environ.setdefault("DS_ACCELERATOR", self._processes.device.type)
        import deepspeed

        # DeepSpeed's own calls, of which its next version will know.
        warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On a CPU it would compile an exchange through shared memory as it starts, and gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, *_ = deepspeed.initialize(
            # Of the model it sees what is trained alone: it would have frozen weights in one type with these.
            model=_Trained(self._parameters),
            optimizer=optimizer,
            dist_init_required=False,
            config={
                # Passes are counted here: a short step has fewer.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": self._max_grad_norm,
                "zero_optimization": {"stage": self._stage},
                "zero_allow_untested_optimizer": True,
            },
        )

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed means gradients over the processes, and the step's are sums.
        scaled = self._engine(loss * self._processes.world)
        self._engine.backward(scaled, scale_wrt_gas=False)

    def sum(self, loss: torch.Tensor, failed: bool) -> tuple[torch.Tensor, bool]:
        return self._processes.sum_tensor(loss), failed

    def clip(self, max_norm: float) -> float:
        # It says -1 of a norm that is not finite.
        norm = float(self._engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else float("nan")

    def step(self) -> None:
        self._engine.step()

    def gathered(self, model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        whole = _each_tensor(self._optimizer.state_dict(), self._put_together)
        return lora.adapter_state(model), whole

    def load_optimizer(self, state: dict[str, Any]) -> None:
        rank, world = self._processes.rank, self._processes.world
        super().load_optimizer(
            _each_tensor(state, lambda t: t.chunk(world)[rank].clone() if t.dim() else t)
        )

    def _put_together(self, part: torch.Tensor) -> torch.Tensor:
        if not part.dim():
            return part.cpu()
        # Partitions are flat and equally long; the last is filled up.
        parts = [torch.empty_like(part) for _ in range(self._processes.world)]
        distributed.all_gather(parts, part)
        return torch.cat([p.cpu() for p in parts])


class _Trained(nn.Module):
    """The weights that are trained, as a module whose output is the loss that they led to."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def choose(recipe: schema.Recipe, processes: Processes) -> Replicas:
    """The way a recipe names; one process alone has nothing to share.

    Raises:
        DeadpanError: If DeepSpeed is asked for and not installed.
    """
    engine = recipe.distributed.engine
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise DeadpanError(
            "DeepSpeed is not installed.",
            where="distributed.engine: deepspeed",
            fix="pip install 'deadpan[deepspeed]', or set distributed.engine=auto",
        )
    if processes.world == 1 or engine in ("auto", "ddp"):
        return Replicas(processes)
    if engine == "fsdp2":
        return ShardedWeights(processes)
    stage = recipe.distributed.zero_stage or 1
    return ShardedOptimizer(processes, stage, recipe.optimizer.max_grad_norm)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A nested state with its tensors changed."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_tensor(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each_tensor(inner, change) for inner in value]
    return value
