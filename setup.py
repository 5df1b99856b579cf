"""Build of dsdistill; everything that is not the native extension lives in pyproject.toml."""

from setuptools import setup

setup()
