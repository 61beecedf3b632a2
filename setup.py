"""Packaging. `pip install -e . --no-build-isolation` in an environment that has torch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirement lines of a file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (HERE / name).read_text().splitlines())
    return [line for line in lines if line]


def version() -> str:
    """Read, not imported: importing virtex_d2 needs detectron2."""
    source = (HERE / "virtex_d2" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


setup(
    name="virtex-d2",
    version=version(),
    description="From captioned images to a detectron2 detector: caption pretraining, strict "
    "backbone transfer, fine-tuning",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["virtex_d2", "virtex_d2.*", "pretrain", "pretrain.*"]),
    package_data={"virtex_d2.studies": ["templates/*.html"]},
    # detectron2 is left out: the official build and PyPI's have different names, and an existing
    # one must not be replaced. OpenCV likewise. virtex_d2 checks for detectron2 when imported.
    install_requires=[
        line for line in requirements("requirements.txt") if not line.startswith("opencv")
    ],
    extras_require={
        "captions": requirements("requirements-captions.txt"),
        "words": requirements("requirements-words.txt"),
        "dev": requirements("requirements-dev.txt"),
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
