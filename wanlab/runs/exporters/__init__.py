"""Runs for other tools: a table as CSV or Parquet, and MLflow. One way only: the run folders stay the truth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
