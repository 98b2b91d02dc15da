"""Runs pipelines without Gadgetron: socket server, offline replay, the `quantitron` command."""
