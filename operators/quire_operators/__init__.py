"""Operators: desired state in, running processes out. Engines are processes here, never imports."""
