"""Puts the configs and the tiny models of quick start and testbeds into the wheel, as `kdrl_pl/packaged/`.

In the repository they stand at the top, where people look for them; everything else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PACKAGED = ("configs", "checkpoints/testbeds")


class BuildWithPackaged(build_py):
    """`build_py` that copies the packaged folders too; an editable install reads them where they are."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "kdrl_pl" / "packaged"
        shutil.rmtree(target, ignore_errors=True)
        for folder in PACKAGED:
            shutil.copytree(HERE / folder, target / folder)


setup(cmdclass={"build_py": BuildWithPackaged})
