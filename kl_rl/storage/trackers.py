"""Where numbers go besides the run's own files: TensorBoard, wandb, trackio. Each is optional."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kl_rl.storage.errors import RunError

__all__ = ["Sink", "tensorboard_sink", "tracking_sink"]


class Sink(Protocol):
    """Takes the numbers of a step: one outside reporter."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by name."""

    def close(self) -> None:
        """Hand over what is left."""


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RunError(f"this needs the package {name}: pip install 'kl-rl[{extra}]'") from error


class _TensorBoard:
    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracking:
    """wandb, and trackio, which has the same interface; what they print goes to standard error."""

    def __init__(self, package: Any):
        self._package = package

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._package.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._package.finish()


def tensorboard_sink(folder: Path, step: int) -> Sink:
    """TensorBoard event files; what a continued run had written behind ``step`` is hidden.

    Args:
      folder: of the event files.
      step: steps done.

    Returns:
      The sink.

    Raises:
      RunError: without the package tensorboardX.
    """
    package = _package("tensorboardX", "tensorboard")
    return _TensorBoard(package.SummaryWriter(str(folder), purge_step=step + 1))


def tracking_sink(name: str, project: str, run: str, config: Mapping[str, Any]) -> Sink:
    """An experiment tracker; a continued run goes on in the tracker's run of the same name.

    Args:
      name: package, "wandb" or "trackio".
      project: of the tracker.
      run: name of the run, unique in the project.
      config: settings to show.

    Returns:
      The sink.

    Raises:
      RunError: without the package.
    """
    package = _package(name, name)
    known = {"id": run} if name == "wandb" else {}  # trackio knows runs by name
    with contextlib.redirect_stdout(sys.stderr):
        package.init(project=project, name=run, config=dict(config), resume="allow", **known)
    return _Tracking(package)
