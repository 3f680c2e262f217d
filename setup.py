"""The compiled parts of koret. They are optional: without a C compiler Python does the same, slower."""

from glob import glob

from setuptools import Extension, setup


def describe(name: str, *flags: str) -> Extension:
    folder = "/".join(["src", *name.split(".")[:-1], "csrc"])
    return Extension(
        name,
        sorted(glob(f"{folder}/*.c")),
        depends=sorted(glob(f"{folder}/*.h")),
        extra_compile_args=list(flags),
        extra_link_args=list(flags),
        optional=True,
    )


setup(ext_modules=[describe("koret.data._scan"), describe("koret.retrieval._kernels", "-O3", "-fopenmp")])
