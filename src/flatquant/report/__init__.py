"""A report of one quantised model: one HTML file that needs nothing else. Reads JSON, imports no torch."""

from flatquant.report.page import FILE, figures, page, write
from flatquant.report.plots import standalone
from flatquant.report.raster import png

__all__ = ["FILE", "figures", "page", "png", "standalone", "write"]
