"""Data sets the command line can name. One file, one set: ``load(options) -> Splits``."""
