"""The package list; everything else is in pyproject.toml.

`kernels/` has no __init__.py, so that it can never be imported as a package of its own in place of another library's;
the symlink radio_fast/kernels makes it radio_fast.kernels, here and in wheels.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["radio_fast", "radio_fast.*"]), "radio_fast.kernels"])
