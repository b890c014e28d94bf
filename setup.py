"""Builds the extension: C++ for the CPU wherever there is a compiler. Without one the install still works, and
`python -m engine ops` says what is missing."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(str(p) for p in Path("engine/csrc").rglob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("engine/csrc").rglob("*") if p.suffix in (".h", ".inl"))


def needs_recompile(obj: str, source: str) -> bool:
    """A header or kernel body that changed recompiles everything: seconds, against a stale object's mystery."""
    target = Path(obj)
    return not target.exists() or any(Path(p).stat().st_mtime > target.stat().st_mtime for p in [source, *HEADERS])


ParallelCompile(needs_recompile=needs_recompile).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "engine._C",
            SOURCES,
            depends=HEADERS,
            cxx_std=20,
            # Contraction and reassociation change bits: the kernels spell out every fused multiply-add.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wno-psabi",
                                "-Wno-ignored-attributes", "-Wno-unknown-pragmas"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
