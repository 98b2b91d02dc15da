"""Anatomy and protocol in, ISMRMRD raw file with its ground truth out."""
