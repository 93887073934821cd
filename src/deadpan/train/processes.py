"""The processes that train together, and what they tell one another.

Every process holds the whole model and takes every n-th micro-batch of a step. Rank 0 leads: it alone
writes, evaluates and speaks. What the ranks exchange is little: a few numbers and, once a step, the
gradients of the trainable weights in one piece (docs/adr/0012).

Ranks call these methods in the same order, or they wait for one another in vain. So a mistake that
one of them meets is kept until all have come to the same place, and then raised in all of them.
"""

import atexit
import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import distributed, nn

from deadpan.checkpoints.load import choose_device
from deadpan.config.schema import Recipe
from deadpan.errors import DeadpanError
from deadpan.train.launcher import one_of_a_host_tells
from deadpan.train.memory import ran_out

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for one another: rank 0 evaluates and saves while the others do."""
_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_STARTED_AS_ONE_OF_SEVERAL = {
    "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
}  # fmt: skip
"""What torchrun and the kinds of MPI tell a process."""

T = TypeVar("T")


class Processes:
    """This process among those that were launched with it. Of one alone, nothing is exchanged.

    Args:
        device: The recipe's `device`.

    Attributes:
        accelerator: Whose process group it is.
        rank: Which one this is; 0 leads.
        world: How many there are.
        local: How many there are on this host.
        device: Where this one computes.

    Raises:
        DeadpanError: If there is no device for every process, or the launcher wants another kind
            of parallelism.
    """

    def __init__(self, device: str) -> None:
        _check_launcher()
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with one_of_a_host_tells():
            chosen = choose_device(device)
            if chosen.type == "cuda" and self.local > 1:
                _check_devices(device, chosen, self.local)
        self.accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            # Autocast is the training loop's; the launcher's configuration must not add a second one.
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        if self.accelerator.distributed_type not in _DATA_PARALLEL:
            raise DeadpanError(
                "The recipe says how processes share the work, not the launcher.",
                expected="MULTI_GPU or MULTI_CPU",
                found=str(self.accelerator.distributed_type.value),
                fix="start it with torchrun or accelerate launch --multi_gpu; distributed.engine in "
                "the recipe chooses DeepSpeed or FSDP2",
            )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if self.world > 1 else chosen
        if self.world > 1:
            atexit.register(_leave)

    def sum(self, *counts: int) -> list[int]:
        """Each number summed over the ranks."""
        if self.world == 1:
            return list(counts)
        tensor = torch.tensor(counts, dtype=torch.int64, device=self.device)
        self._talk(lambda: distributed.all_reduce(tensor))
        return tensor.tolist()

    def any(self, holds: bool) -> bool:
        """Whether it holds on some rank."""
        return self.sum(int(holds))[0] > 0

    def largest(self, value: float) -> float:
        """The largest over the ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        self._talk(lambda: distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX))
        return tensor.item()

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor summed over the ranks; the one given is left alone."""
        if self.world == 1:
            return value
        total = value.clone()
        self._talk(lambda: distributed.all_reduce(total))
        return total

    def gather(self, value: T) -> list[T]:
        """What each rank has, in the order of ranks; anything that can be pickled."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        self._talk(lambda: distributed.all_gather_object(values, value))
        return values

    def sum_gradients(
        self, parameters: Sequence[nn.Parameter], loss: torch.Tensor, failed: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """Sum gradients over the ranks, in place and in one exchange.

        A rank without a gradient counts as zeros. A parameter that no rank has a gradient of keeps
        none, so that the optimizer passes over it as it would in one process.

        Args:
            parameters: What is trained, on every rank in the same order.
            loss: float32 scalar, summed along.
            failed: Whether this rank has no gradients to give, because it met an error.

        Returns:
            The loss of all ranks, and whether any has failed; then the gradients are of no use.
        """
        if self.world == 1:
            return loss, failed
        present = [float(p.grad is not None) for p in parameters]
        pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        flags = loss.new_tensor([*present, float(failed)])
        flat = torch.cat([*pieces, flags, loss.flatten()])
        del pieces
        self._talk(lambda: distributed.all_reduce(flat))
        *gradients, flags, total = flat.split([p.numel() for p in parameters] + [len(flags), 1])
        *counts, failures = flags.tolist()
        for parameter, gradient, count in zip(parameters, gradients, counts, strict=True):
            if count == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient.view_as(parameter))
        return total.squeeze(0), failures > 0

    def lead(self, action: Callable[[], T]) -> T:
        """What an action returns that rank 0 alone takes; the others wait for it.

        Raises:
            DeadpanError: In every rank, if rank 0 met one.
        """
        if self.world == 1:
            return action()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = action()
            except DeadpanError as error:
                answer[1] = error
        self._talk(lambda: distributed.broadcast_object_list(answer))
        if answer[1] is not None:
            raise self.shared(answer[1])
        return answer[0]

    def together(self, action: Callable[[], T]) -> T:
        """What an action returns that every rank takes by itself, without exchanging anything in it.

        Raises:
            DeadpanError: In every rank, if any met one.
        """
        if self.world == 1:
            return action()
        try:
            result, failure = action(), None
        except DeadpanError as error:
            failure = error
        self.share(failure)
        return result

    def share(self, failure: DeadpanError | None) -> None:
        """Raise what any rank has met in all of them: that of the lowest rank.

        Raises:
            DeadpanError: If there is one.
        """
        for error in self.gather(failure):
            if error is not None:
                raise self.shared(error)

    def check_equal(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make sure that all ranks train the same weights.

        Raises:
            DeadpanError: If they differ.
        """
        if self.world == 1:
            return
        told = hashlib.sha256()
        for parameter in parameters:
            told.update(parameter.detach().cpu().numpy().tobytes())
        digests = self.gather(told.hexdigest())
        if len(set(digests)) > 1:
            raise self.shared(
                DeadpanError(
                    "The processes do not start from the same weights.",
                    expected=f"SHA-256 {digests[0][:16]}... as in rank 0",
                    found=", ".join(
                        f"rank {i}: {digest[:16]}..." for i, digest in enumerate(digests)
                    ),
                    fix="give all hosts the same versions of the packages and the same run folder",
                )
            )

    def shared(self, error: DeadpanError) -> DeadpanError:
        """An error that all ranks raise, marked so that rank 0 alone tells it."""
        error.told_elsewhere = self.rank != 0
        return error

    def _talk(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            if ran_out(error):
                raise
            raise self._lost(error) from None

    @contextmanager
    def losses_explained(self) -> Iterator[None]:
        """Tell of a lost process in one message, where others than these methods exchange something."""
        try:
            yield
        except RuntimeError as error:
            # NCCL's errors have a class of their own, gloo's its name in the text.
            if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                raise
            raise self._lost(error) from None

    def _lost(self, error: RuntimeError) -> DeadpanError:
        told = DeadpanError(
            "Another process of the run has ended, or cannot be reached.",
            found=(str(error).splitlines() or ["no message"])[0],
            fix="its own message says why; go on from the newest checkpoint with --resume",
        )
        # Two tell it, since one of them may be the one that is lost.
        told.told_elsewhere = self.rank > 1
        return told


def check_recipe(recipe: Recipe, world: int, dry_run: bool) -> None:
    """Refuse what several processes cannot do.

    Raises:
        DeadpanError: If the micro-batch size is to be measured, or a step's samples are fixed.
    """
    if dry_run or recipe.micro_batch_size == "auto":
        raise DeadpanError(
            "Several processes cannot measure what fits in memory.",
            where="--dry-run" if dry_run else "micro_batch_size: auto",
            expected="one process",
            found=f"{world} processes",
            fix="settle it with one process first: deadpan train RECIPE --dry-run; then set "
            "micro_batch_size=N",
        )
    if recipe.samples_per_step is not None:
        size = recipe.micro_batch_size
        raise DeadpanError(
            "With several processes, a step's samples follow from their number.",
            where="samples_per_step",
            expected=f"null: {size} x {recipe.gradient_accumulation_steps} x {world} processes = "
            f"{recipe.effective_batch_size * world}",
            found=str(recipe.samples_per_step),
            fix="set samples_per_step=null; gradient_accumulation_steps=N decides the samples",
        )


def _check_launcher() -> None:
    """Refuse to be the one process that accelerate starts where several were asked for.

    Without --multi_gpu, `accelerate launch --num_processes 2` leaves it to MPI to start them.
    """
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if asked and not _STARTED_AS_ONE_OF_SEVERAL & os.environ.keys():
        raise DeadpanError(
            "accelerate has started one process, and was asked for several.",
            where="accelerate launch",
            fix="torchrun --nproc-per-node N --no-python deadpan train RECIPE, or accelerate launch "
            "--multi_gpu --num_processes N --no_python deadpan train RECIPE, both on a CPU too",
        )


def _check_devices(device: str, chosen: torch.device, local: int) -> None:
    if chosen.index is not None:
        raise DeadpanError(
            "Every process takes a GPU of its own.",
            where="device",
            expected="auto, cuda or cpu",
            found=device,
            fix="set device=cuda; CUDA_VISIBLE_DEVICES chooses among the GPUs",
        )
    if local > torch.cuda.device_count():
        raise DeadpanError(
            "There are more processes than GPUs on this host.",
            expected=f"at most {torch.cuda.device_count()}, one a GPU",
            found=f"{local} processes",
            fix=f"torchrun --nproc-per-node {torch.cuda.device_count()}",
        )


def _leave() -> None:
    if distributed.is_initialized():
        # A peer that is gone already is no concern of a process that ends.
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def without_traceback(error: DeadpanError) -> DeadpanError:
    """The same error, without the frames that would keep a step's tensors alive."""
    return copy.copy(error)
