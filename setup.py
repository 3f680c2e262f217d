"""The compiled part of koret. It is optional: without a C compiler the Python code beside it does the same, slower."""

from glob import glob

from setuptools import Extension, setup

SOURCES = sorted(glob("src/koret/data/csrc/*.c"))
setup(ext_modules=[Extension("koret.data._scan", SOURCES, depends=["src/koret/data/csrc/text.h"], optional=True)])
