"""Packages of the wheel: the experiments go by a name there that cannot clash with an `experiments` folder of the user's own."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["metajax*", "kernels_pallas*"]), "metajax_experiments"],
    package_dir={"metajax_experiments": "experiments"},
)
