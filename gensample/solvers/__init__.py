"""Solvers of the sampling ODEs and SDEs: pure updates over tensors, stage by stage."""
