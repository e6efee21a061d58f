"""Modules that hold weights and call ops; no arithmetic of their own beyond residual adds."""
