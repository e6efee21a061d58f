"""The package list, the CUDA extension and the CPU kernels; everything else is in pyproject.toml.

`kernels/` has no __init__.py, so that it can never be imported as a package of its own in place of another library's;
the symlink radio_fast/kernels makes it radio_fast.kernels, here and in wheels.

csrc/build.py compiles the extension, csrc/build_cpu.py the CPU kernels: a shared library each in the package, plain C
behind ctypes, so that a wheel serves every Python and torch of its platform. Where neither can be built the package
installs without, as a pure one.
"""

import functools
import runpy
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
cuda = runpy.run_path(str(ROOT / "csrc" / "build.py"))
cpu = runpy.run_path(str(ROOT / "csrc" / "build_cpu.py"))


class BuildKernels(Command):
    """Build the libraries into the package: of the checkout for an editable install, else of the wheel.

    The attributes and get_* are setuptools' SubCommand protocol.
    """

    description = "build the CUDA extension and the CPU kernels"
    user_options = ()

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        try:
            cpu["build_into"](folder / "radio_fast")
            cuda["build_into"](folder / "radio_fast")
        except (cuda["BuildError"], cpu["BuildError"]) as error:
            raise CompileError(str(error)) from None

    def get_source_files(self):
        return []  # MANIFEST.in names them

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class RadioFast(Distribution):
    """A platform's wheel with a library, else a pure one."""

    def has_ext_modules(self):
        return _builds()


@functools.cache
def _builds():
    try:
        return cpu["why_not"]() is None or cuda["plan"]().reason is None
    except cuda["BuildError"]:
        return True  # build_kernels says what is wrong


class BdistWheel(bdist_wheel):
    """py3-none: the library is no Python extension, any Python loads it."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


build.sub_commands.append(("build_kernels", None))
setup(
    distclass=RadioFast,
    packages=[*find_packages(include=["radio_fast", "radio_fast.*"]), "radio_fast.kernels"],
    cmdclass={"build_kernels": BuildKernels, "bdist_wheel": BdistWheel},
)
