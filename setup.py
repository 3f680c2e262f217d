"""The compiled part of koret. It is optional: without a C compiler the Python code beside it does the same, slower."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("koret.data._scan", ["src/koret/data/_scan.c"], optional=True)])
