"""Triton kernels, one file each with its launcher; importing any of them imports Triton."""
