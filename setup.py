"""Builds the extension: C++ for the CPU wherever there is a compiler. Without one the install still works, and
`python -m engine ops` says what is missing."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(str(p) for p in Path("engine/csrc").rglob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("engine/csrc").rglob("*") if p.suffix in (".h", ".inl"))
# Contraction and reassociation change bits: the kernels spell out every fused multiply-add.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"]


def needs_recompile(obj: str, source: str) -> bool:
    """A header or kernel body that changed recompiles everything: seconds, against a stale object's mystery."""
    made_from = [source, *HEADERS, "setup.py"]
    target = Path(obj)
    return not target.exists() or any(Path(p).stat().st_mtime > target.stat().st_mtime for p in made_from)


class BuildExtension(build_ext):
    """Keeps the objects in build/, so that an editable install compiles only what changed, and drops what an earlier
    build made, so that a failed one never leaves an extension older than its sources."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/objects"

    def build_extension(self, ext: Pybind11Extension) -> None:
        for stale in [Path(self.get_ext_fullpath(ext.name)), *Path("engine").glob("_C.*.so")]:
            stale.unlink(missing_ok=True)
        super().build_extension(ext)


ParallelCompile(default=0, needs_recompile=needs_recompile).install()  # 0: one compiler per core

setup(
    ext_modules=[
        Pybind11Extension(
            "engine._C",
            SOURCES,
            depends=HEADERS,
            cxx_std=20,
            extra_compile_args=COMPILE_ARGS + WARNINGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
