"""Families of cost model. A file in ``hw/targets`` is a family with a device's numbers."""
