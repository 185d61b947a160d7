"""File formats. One module, one format: see :class:`export.format.Format` for what it holds."""
