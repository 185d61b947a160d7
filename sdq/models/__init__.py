"""Networks the command line can name. One file, one network: ``build(...) -> nn.Module``."""
