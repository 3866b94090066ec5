"""Serve a package over the Open Inference Protocol v2, and write what Triton and KServe need to serve it."""
