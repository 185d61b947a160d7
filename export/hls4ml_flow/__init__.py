"""How a QONNX file of ours becomes an hls4ml project that computes the same codes."""
