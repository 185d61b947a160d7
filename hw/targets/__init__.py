"""Devices the command line can name. One file, one device: a cost model with its numbers."""
