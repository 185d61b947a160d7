"""Federated methods the command line can name. One file, one method, both halves."""
