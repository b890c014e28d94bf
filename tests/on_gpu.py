"""Runs test files side by side, each in a process of its own: `python -m tests.on_gpu FILE...` (`make test-gpu`).

Most of the time goes into compiling kernels, which takes cores and not the GPU; and a kernel that reads astray ends the
CUDA context of its process, so every file has its own. Exits with 1 where a file failed, after its output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

MAX_PROCESSES = 8  # each has a CUDA context, and a core to compile on


def run(file: str, seconds: float) -> tuple[int, float, str]:
    """Exit status, seconds, and output of one file's tests; those that take longer than `seconds` are ended."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "--durations=5", file]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return 1, time.monotonic() - began, f"{text}\nended after {seconds:g} s"
    return done.returncode, time.monotonic() - began, done.stdout


def files_of(paths: list[str]) -> list[str]:
    """Test files, those in directories too."""
    found: list[str] = []
    for path in map(Path, paths):
        found += sorted(map(str, path.glob("test_*.py"))) if path.is_dir() else [str(path)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+", help="test files, and directories of them; the longest first")
    parser.add_argument("--seconds", type=float, default=420.0, help="for each file (default: %(default)g)")
    parser.add_argument("--processes", type=int, default=min(MAX_PROCESSES, len(os.sched_getaffinity(0))))
    args = parser.parse_args()
    failed = []
    with ThreadPoolExecutor(args.processes) as pool:
        running = {pool.submit(run, file, args.seconds): file for file in files_of(args.paths)}
        for future in as_completed(running):
            (status, seconds, output), file = future.result(), running[future]
            words = {0: "passed", 5: "had no tests"}.get(status, "FAILED")
            if words == "FAILED":
                failed.append(file)
                print(output)
            print(
                f"{file}: {words} in {seconds:.0f} s: {output.strip().splitlines()[-1] if output else ''}", flush=True
            )
    print(f"{len(failed)} of {len(running)} files failed: {' '.join(failed)}" if failed else "all files passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
