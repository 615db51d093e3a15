"""Kernels for TPU, in Pallas; each has a plain version elsewhere in the package, to which tests hold it."""
