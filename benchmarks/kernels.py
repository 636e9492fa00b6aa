"""Which tests hold under which kernels: other instruction sets round differently, and so do two threads.

python benchmarks/kernels.py                          # all tests under six sets
python benchmarks/kernels.py tests/test_checkpoint.py # some of them
"""

from __future__ import annotations

import os
import subprocess
import sys

#: ATen's own kernels, oneDNN's, and threads. What a processor lacks falls back to the best that it has.
SETS = [
    ("default", "SSE41", 1),
    ("default", "SSE41", 2),
    ("avx2", "AVX2", 1),
    ("avx2", "AVX2", 2),
    ("avx512", "AVX512_CORE", 1),
    ("avx512", "DEFAULT", 2),
]


def main(arguments: list[str]) -> int:
    failed = 0
    for aten, onednn, threads in SETS:
        env = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "COMCAT_TEST_THREADS": str(threads)}
        env |= {"OMP_NUM_THREADS": str(threads)}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", *arguments],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = run.stdout.strip().splitlines()
        print(f"{aten:8} {onednn:12} {threads} threads: exit code {run.returncode}", flush=True)
        print("".join(f"    {line}\n" for line in lines if line.startswith(("FAILED", "ERROR"))), end="", flush=True)
        failed += run.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
