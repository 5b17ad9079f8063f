"""Lyapunov exponents and stability measures of any map; nothing here knows NGC."""
