"""This process and its peers, through Hugging Face Accelerate: one device, many, or many machines.

PyTorch is imported inside: the command line asks for the number of its process before it knows what it will do.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ComcatError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_PEER = re.compile(r"peer|Connection (closed|reset)|NCCL|ProcessGroup|socket|Broken pipe", re.IGNORECASE)


def process_index() -> int:
    """The number of this process among its peers, from 0, before or after they have met."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """This process and its peers, before or after they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Return when every process of this run has called it."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def accelerated(precision: str, seed: int, cpu: bool = False) -> Iterator[Accelerator]:
    """An Accelerator of our own for one run; generators are seeded inside and come back as they were.

    Accelerate keeps its state per process, precision included: it is set aside and put back, so that runs with
    different settings can follow each other. What the caller has set up himself stays his.

    Raises:
        TrainingError: the precision is not to be had on this device, or neither DDP nor FSDP 2 distributes.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin

    from .randomness import PROCESS, isolated

    states = (AcceleratorState, GradientState, PartialState)
    saved = [dict(state._shared_state) for state in states]
    AcceleratorState._shared_state.clear()
    GradientState._shared_state.clear()
    if cpu and not PartialState._shared_state:
        PartialState(cpu=True)
    try:
        try:
            accelerator = Accelerator(
                mixed_precision=precision,
                cpu=cpu,
                # Windows are counted here; Accelerate would take its own number from the environment.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
            )
        except ValueError as error:
            raise TrainingError(f"precision {precision} cannot be used here: {error}") from error
        if precision == "fp16" and accelerator.device.type == "cpu":
            raise TrainingError("precision fp16 needs a GPU; use bf16 or no")
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise TrainingError(f"{accelerator.distributed_type.value} is not supported; use DDP or FSDP 2")
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise TrainingError("FSDP 1 does not come back exactly from a checkpoint; set fsdp_version to 2")
        with isolated(PROCESS, seed, accelerator.process_index):
            if accelerator.device.type == "cuda":
                torch.cuda.manual_seed(seed + 1000003 * accelerator.process_index)
            yield accelerator
    finally:
        for state, before in zip(states, saved, strict=True):
            # A process group outlives the run; what describes it is kept with it.
            if before or state is not PartialState or not torch.distributed.is_initialized():
                state._shared_state.clear()
                state._shared_state.update(before)


@contextmanager
def explained(resume: str) -> Iterator[None]:
    """Failures of other processes become one line; ``resume`` says how to go on.

    Raises:
        TrainingError: a loader worker or another process of this run has died.
    """
    try:
        yield
    except ComcatError:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        import torch

        text = str(error)
        if not isinstance(error, RuntimeError):
            # A worker died while it handed over a batch; the notice of its death, on its way, names it.
            try:
                time.sleep(0.5)
            except RuntimeError as notice:
                text = str(notice)
        if "DataLoader worker" in text or not isinstance(error, RuntimeError):
            which = re.search(r"pid\(?s?\)? ?\(?([0-9, ]+)", text)
            name = f" (pid {which[1].strip()})" if which else ""
            raise TrainingError(
                f"a process that reads images{name} was killed, perhaps for want of memory; use fewer "
                f"--workers. {resume}"
            ) from error
        if torch.distributed.is_initialized() and (_is_distributed(error) or _PEER.search(text)):
            raise TrainingError(f"another process of this run has ended. {resume}") from error
        raise


def _is_distributed(error: Exception) -> bool:
    import torch

    return isinstance(error, getattr(torch.distributed, "DistError", ()))


def agree(accelerator: Accelerator, value: Any) -> Any:
    """The main process's ``value``, on every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def collect(accelerator: Accelerator, value: Any) -> list[Any]:
    """Every process's ``value``, in order, on every process."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call ``function`` on the main process; its result, or its error, comes to all of them."""
    value: Any = None
    failed: ComcatError | None = None
    if accelerator.is_main_process:
        try:
            value = function()
        except ComcatError as error:
            failed = error
    value, failed = agree(accelerator, (value, failed))
    if failed is not None:
        raise failed
    return value
