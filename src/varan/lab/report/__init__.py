"""The report: a static, self-contained site of the catalogue and what was measured."""

from .build import Built, build
from .folder import SiteError

__all__ = ["Built", "SiteError", "build"]
