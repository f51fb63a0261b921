"""One self-contained page about a run: what it did, in curves and pictures.

Needs the record of the run only, in a folder or a store: no cluster, no trainer, no network.
"""

from tempflow.report.gather import RunRecord, gather
from tempflow.report.page import page

__all__ = ["RunRecord", "gather", "page"]
