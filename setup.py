"""The package list; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["radio_fast", "radio_fast.*"]))
