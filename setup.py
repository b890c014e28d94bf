"""Builds the extensions: C++ for the CPU wherever there is a compiler, CUDA wherever there is nvcc. Without one the
install still works, and `python -m engine ops` says what is missing."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

CPU, CUDA = "engine._C", "engine._cuda"
SOURCES = sorted(str(p) for p in Path("engine/csrc").rglob("*.cpp") if "cuda" not in p.parts)
HEADERS = sorted(str(p) for p in Path("engine/csrc").rglob("*") if p.suffix in (".h", ".inl"))
# Contraction and reassociation change bits: the kernels spell out every fused multiply-add.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"]

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
CUDA_BINDINGS = ["engine/csrc/cuda/bindings.cpp"]
CUDA_KERNELS = sorted(str(p) for p in Path("engine/csrc/cuda").glob("*.cu"))
CUDA_ARGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-Wall", "--threads=0"]
# One fatbin: machine code for A100, H100 and B200, and for other GPUs code that their driver compiles.
CUDA_MACHINES = {"80": "sm_80", "90a": "sm_90a", "100a": "sm_100a"}


def needs_recompile(obj: str, source: str) -> bool:
    """A header or kernel body that changed recompiles everything: seconds, against a stale object's mystery."""
    cuda = "cuda" in Path(source).parts
    made_from = [source, *(header for header in HEADERS if cuda == ("cuda" in Path(header).parts)), "setup.py"]
    target = Path(obj)
    return not target.exists() or any(Path(p).stat().st_mtime > target.stat().st_mtime for p in made_from)


def architectures() -> list[str]:
    """-gencode options for those of CUDA_MACHINES that this nvcc knows."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    known = {each.removeprefix("compute_") for each in listed}
    chosen = [name for name in CUDA_MACHINES if name.rstrip("a") in known]
    machine_code = [f"-gencode=arch=compute_{name},code={CUDA_MACHINES[name]}" for name in chosen]
    return [*machine_code, f"-gencode=arch=compute_{chosen[0]},code=compute_{chosen[0]}"]


class BuildExtension(build_ext):
    """Keeps the objects in build/, so that an editable install compiles only what changed, and drops what an earlier
    build made, so that a failed one never leaves an extension older than its sources."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/objects"

    def build_extension(self, ext: Pybind11Extension) -> None:
        stem = ext.name.rsplit(".", 1)[-1]
        for stale in [Path(self.get_ext_fullpath(ext.name)), *Path("engine").glob(f"{stem}.*.so")]:
            stale.unlink(missing_ok=True)
        if ext.name == CUDA:
            self.compile_cuda(ext)
        super().build_extension(ext)

    def compile_cuda(self, ext: Pybind11Extension) -> None:
        """nvcc compiles the kernels, for the host's compiler to link with the static CUDA runtime: the installed
        extension needs a driver and nothing else."""
        ext.extra_objects = [f"{self.build_temp}/{Path(source).with_suffix('.o')}" for source in CUDA_KERNELS]
        pairs = zip(CUDA_KERNELS, ext.extra_objects, strict=True)
        changed = [(source, target) for source, target in pairs if needs_recompile(target, source)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(nvcc, changed))
        ext.library_dirs += [str(path) for path in cuda_libraries()]


def nvcc(pair: tuple[str, str]) -> None:
    source, target = pair
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    command = [NVCC, *CUDA_ARGS, *architectures(), "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode:
        raise CompileError(f"nvcc could not compile {source} (exit status {done.returncode})")


def cuda_libraries() -> list[Path]:
    """Where this nvcc keeps libcudart_static.a, as it says itself: the one in PATH may be a script that starts it."""
    said = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next(line.removeprefix("#$ TOP=") for line in said.splitlines() if line.startswith("#$ TOP="))
    return [found.parent for found in Path(top).resolve().glob("**/libcudart_static.a")]


def extension(name: str, sources: list[str], **options: list[str]) -> Pybind11Extension:
    link_args = ["-pthread"]
    return Pybind11Extension(name, sources, depends=HEADERS, cxx_std=20, extra_compile_args=COMPILE_ARGS + WARNINGS,
                             extra_link_args=link_args, optional=True, **options)  # fmt: skip


ParallelCompile(default=0, needs_recompile=needs_recompile).install()  # 0: one compiler per core

extensions = [extension(CPU, SOURCES)]
if NVCC:
    extensions.append(extension(CUDA, CUDA_BINDINGS, libraries=["cudart_static", "dl", "rt"]))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
