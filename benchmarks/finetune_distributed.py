"""Fine-tuning in two processes against one, and after losing a process: how exact is it?

    python benchmarks/finetune_distributed.py [--steps 40] [--batch 8] [--json FILE]

On the CPU with gloo, as torchrun and ``accelerate launch --cpu`` set it up:
* two processes against one with the doubled batch: the largest difference of the loss curve;
* one of the two is killed (SIGKILL) in the middle, both are resumed from the last checkpoint: whether the final weights
  equal, bit by bit, those of the run that was left alone, and what the survivor said.

The processes are forked, so that all of them share one import.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import comcat
from common import parser, write

# The imports of a run, before the processes part.
import accelerate  # noqa: F401  isort: skip
import torch.utils.tensorboard  # isort: skip


@dataclass(frozen=True)
class Setting:
    """One run; ``kill_at`` is how many samples the last process reads before it dies."""

    out: Path
    processes: int
    batch: int
    steps: int
    resume: bool = False
    kill_at: int | None = None


class Images(Dataset[Any]):
    """Random images; one process may be told to die at its n-th."""

    def __init__(self, count: int, kill_at: int | None) -> None:
        self.images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        self.left = kill_at

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index] + 0.1 * torch.randn(()), index % 7


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=7
    )


def work(rank: int, setting: Setting, port: int) -> None:
    """One process of a run; what it raises goes to a file."""
    if setting.processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(setting.processes),
            LOCAL_WORLD_SIZE=str(setting.processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    last = rank == setting.processes - 1
    data = Images(16 * setting.batch * setting.processes, setting.kill_at if last else None)
    loader = DataLoader(data, batch_size=setting.batch, shuffle=True, drop_last=True)
    config = comcat.FinetuneConfig(
        epochs=1000, max_steps=setting.steps, lr=1e-3, warmup_epochs=0.2, log_every=1, checkpoint_every=7, ema=0.9
    )
    student = model(0)
    try:
        comcat.finetune(student, model(1), loader, None, config, out=setting.out, resume=setting.resume, cpu=True)
    except comcat.ComcatError as error:
        (setting.out / f"error-{rank}.txt").write_text(str(error))
        os._exit(1)  # the peer is gone: do not wait for it
    if rank == 0:
        save_file(student.state_dict(), setting.out / "final.safetensors")


def run(setting: Setting) -> list[int | None]:
    """Exit codes of the processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, setting, port)) for rank in range(setting.processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--batch", type=int, default=8, help="images of one of two processes")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        two = Setting(place / "two", 2, args.batch, args.steps)
        codes = {"one": run(Setting(place / "one", 1, 2 * args.batch, args.steps)), "two": run(two)}
        curves = [losses(place / name) for name in ("one", "two")]
        difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
        killed = Setting(place / "killed", 2, args.batch, args.steps, kill_at=args.batch * args.steps * 5 // 8)
        codes["killed"] = run(killed)
        survivor = place / "killed" / "error-0.txt"
        said = survivor.read_text() if survivor.exists() else None
        codes["resumed"] = run(Setting(place / "killed", 2, args.batch, args.steps, resume=True))
        whole, again = (load_file(place / name / "final.safetensors") for name in ("two", "killed"))
        same = all(torch.equal(whole[name], again[name]) for name in whole)
        results = {
            "steps": args.steps,
            "exit_codes": codes,
            "largest_loss_difference": difference,
            "survivor_said": said and said.replace(str(place), "RUN"),
            "resumed_bitwise_equal": same,
            "resumed_log_equal": losses(place / "killed") == curves[1],
        }
    print(f"two processes against one with the doubled batch: losses differ by {difference:.1e} at most")
    print(f"one process killed: the other said: {results['survivor_said']}")
    print(f"resumed: weights {'equal' if same else 'DIFFER FROM'} those of the undisturbed run, bit by bit")
    write(args.json, results)


if __name__ == "__main__":
    main()
