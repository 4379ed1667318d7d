"""Exporters: artifact -> the files of one runtime. They import `signround`'s artifact side, never its tuner.

`Exporter` is the contract (docs/writing_an_exporter.md); each folder is one format.
"""

from signround.exporting import ExportedModel, Exporter

__all__ = ["ExportedModel", "Exporter"]
