"""Quire: the command, the control plane, the router and the text side of the house."""
