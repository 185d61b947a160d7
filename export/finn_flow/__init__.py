"""What runs FINN+: copied as it is into the folder of every FINN export.

The modules here use onnx, numpy, qonnx and FINN+, and nothing of this package, so that an export
folder needs no installation of it. Importing one of them imports no FINN, but for :mod:`steps`.
"""
