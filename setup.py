"""The packages of a wheel: those of wanlab, and three folders beside it, which pyproject.toml alone cannot list together.

Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["wanlab", "wanlab.*"]),
        "wanlab._data",
        "wanlab._notebooks",
        "wanlab._recipes",
    ]
)
